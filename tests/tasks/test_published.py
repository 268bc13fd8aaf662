"""Published scorers beside a plain restatement of what the public evaluation code does, on mutated answers."""

import contextlib
import io
import json
import math
import random
import re
from pathlib import Path

import nltk
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, LabelledBox, Sample
from perception_r1.scoring import parse_completions, score_as_published, score_completions
from perception_r1.task import MAX_TEXT
from perception_r1.tasks import TASKS
from perception_r1.tasks.counting import CountingTarget
from perception_r1.tasks.detection import Detection, DetectionTarget
from perception_r1.tasks.grounding import GroundingTarget
from perception_r1.tasks.ocr import OcrTarget
from tests.hostile import WORST

NUM_ANSWERS = 2000
FRAME = ImageSize(width=1000, height=1000, resized_width=980, resized_height=1008)
LABELS = ("cat", "dog", "cow")


def mutated(rng, text, alphabet):
    """A text with some damage."""
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 1, 1, 3, 20)))
        inserted = rng.choice(("", "", rng.choice(alphabet), text[start:end] * 2, "Sure! ", "\n", " "))
        text = text[:start] + inserted + text[end:]
    return text + rng.choice(("", "", "<|im_end|>"))


def random_box(rng):
    x1, y1 = rng.randrange(0, 900), rng.randrange(0, 900)
    return x1, y1, rng.randrange(x1 + 7, 1000), rng.randrange(y1 + 7, 1000)


def near(rng, box):
    return tuple(side + rng.choice((0, 0, 3, -11, 40)) for side in box)


def fractions(box):
    return tuple(side / 1000 for side in box)


def score(task, codec, target, text, number=0):
    sample = Sample(id=str(number), image=Path(), width=1000, height=1000, query="cat", target=target)
    parsed = parse_completions(task, CODECS[codec], samples=[sample], image_sizes=[FRAME], completions=[text])
    return score_as_published(task, CODECS[codec], score_completions(task, parsed, is_evaluation=True))[0]


# ---------------------------------------------------------------------------------------------- grounding


def grounding_reference(text, target):
    """IoU and whether the center is right, of the first four numbers in square or round brackets or in two pairs."""
    number = r"(-?\d+(?:\.\d*)?)"
    comma = r",\s*"
    four, pair = number + comma + number + comma + number + comma + number, number + comma + number
    for pattern in (rf"\[\s*{four}\s*\]", rf"\(\s*{four}\s*\)", rf"\(\s*{pair}\)\s*,\s*\(\s*{pair}\s*\)"):
        found = re.search(pattern, text)
        if found:
            box = [float(number) for number in found.groups()]
            break
    else:
        box = [0.0] * 4
    if "<|box_start|>" not in text:
        box = [int(number * 1000) for number in box]
    left, top = max(box[0], target[0]), max(box[1], target[1])
    right, bottom = min(box[2], target[2]), min(box[3], target[3])
    shared = max(0, right - left) * max(0, bottom - top)
    area = (box[2] - box[0]) * (box[3] - box[1]) + (target[2] - target[0]) * (target[3] - target[1])
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    is_inside = target[0] <= x <= target[2] and target[1] <= y <= target[3]
    return shared / (area - shared + 1e-10), is_inside


def grounding_answer(rng, box):
    x1, y1, x2, y2 = near(rng, box)
    forms = [f"<|object_ref_start|>the cat<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"] * 3
    forms += [f"[{x1 / 1000}, {y1 / 1000}, {x2 / 1000}, {y2 / 1000}]", f"({x1}, {y1}, {x2}, {y2})<|box_start|>", "none"]
    return mutated(rng, rng.choice(forms), "0123456789(),.[]- <|>")


def test_grounding():
    rng, task, overlapping = random.Random(1), TASKS["grounding"](), 0
    for _ in range(NUM_ANSWERS):
        box = random_box(rng)
        text = grounding_answer(rng, box)
        metrics = score(task, "qwen2_vl", GroundingTarget(box=fractions(box)), text)
        iou, is_inside = grounding_reference(text, box)
        assert metrics.score.components["iou"] == pytest.approx(iou, abs=1e-6), text
        for name, threshold in (("accuracy_50", 0.5), ("accuracy_75", 0.75), ("accuracy_95", 0.95)):
            if abs(iou - threshold) > 1e-6:
                assert metrics.score.metrics[name] == (iou >= threshold), text
        assert metrics.score.metrics["center_accuracy"] == is_inside, text
        overlapping += iou > 0.5
    assert NUM_ANSWERS / 4 < overlapping < NUM_ANSWERS  # the answers are neither all right nor all wrong


# ----------------------------------------------------------------------------------------------- counting


def counting_reference(text):
    """Number of boxes whose text between the tokens Python reads as two pairs of numbers; None for none.

    Deviation: that code also takes expressions with operators, such as 12|6; ours evaluates nothing.
    """
    count = 0
    for block in re.findall(r"<\|box_start\|>(.*?)<\|box_end\|>", text.replace("<|endoftext|>", "")):
        if set(block) & set("<|>"):
            continue
        try:
            (x1, y1), (x2, y2) = eval(block, {"__builtins__": {}})
            _ = (x1 + x2) / 2, (y1 + y2) / 2
            count += 1
        except Exception:
            continue
    return count or None


def counting_answer(rng, count):
    text = "<|object_ref_start|>cats<|object_ref_end|>"
    for _ in range(max(0, count + rng.choice((0, 0, 0, 1, -1)))):
        x1, y1, x2, y2 = random_box(rng)
        text += f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    return mutated(rng, text, "0123456789(),.[] <|>")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_counting():
    rng, task, right = random.Random(2), TASKS["counting"](), 0
    for _ in range(NUM_ANSWERS):
        count = rng.randrange(0, 6)
        text = counting_answer(rng, count)
        metrics = score(task, "qwen2_vl", CountingTarget(count=count), text).score.metrics
        found = counting_reference(text)
        assert metrics["count_accuracy"] == (found == count), text
        assert metrics["count"] == (found or 0), text
        right += found == count
    assert NUM_ANSWERS / 4 < right < NUM_ANSWERS


# ---------------------------------------------------------------------------------------------- detection


def detection_reference(text, image_id):
    """Detections of one answer in the form of COCO's results, up to the entry at which reading fails."""
    found = []
    text = text.removesuffix("<|im_end|>")
    try:
        if "<answer>" in text:
            text = text.split("<answer>")[1].split("</answer>")[0]
        for entry in json.loads(text.replace("```json", "").replace("```", "")):
            number = {name: number for number, name in enumerate(LABELS, 1)}.get(entry["label"])
            if number is None:
                continue
            x1, y1, x2, y2 = entry["bbox_2d"]
            box = [x1, y1, x2 - x1, y2 - y1]
            found.append({"image_id": image_id, "category_id": number, "bbox": box, "score": 1.0})
    except Exception:
        return found
    return found


def detection_answer(rng, objects):
    entries = [{"bbox_2d": list(near(rng, box)), "label": label} for label, box in objects]
    for entry in entries:
        damage = rng.random()
        if damage < 0.05:
            entry["label"] = rng.choice(("cow", "horse", None, 3, ["cat"]))
        elif damage < 0.1:
            entry["bbox_2d"] = rng.choice(
                ([5, 5, 1, 9], [9, 9, 1, 1], [3, 3, 3, 3], [1, 2, 3], "1234", [1, 2, None, 4])
            )
        elif damage < 0.13:
            del entry[rng.choice(("label", "bbox_2d"))]
    text = json.dumps(entries)
    text = rng.choice((text, text, f"```json\n{text}\n```", f"<think>hm</think><answer>{text}</answer>"))
    return mutated(rng, text, '0123456789,.[]{}":-') if rng.random() < 0.3 else text


def coco_stats(images, detections):
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number, _ in images],
        "categories": [{"id": number} for number in range(1, len(LABELS) + 1)],
        "annotations": [
            {
                "id": 1000 * image_id + index,
                "image_id": image_id,
                "category_id": LABELS.index(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for image_id, objects in images
            for index, (label, (x1, y1, x2, y2)) in enumerate(objects, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_detection():
    rng, task = random.Random(3), Detection(categories=LABELS)
    images, detections, scored, texts = [], [], [], []
    for number in range(1, NUM_ANSWERS + 1):
        objects = [(rng.choice(LABELS), random_box(rng)) for _ in range(rng.randrange(0, 5))]
        texts.append(detection_answer(rng, objects))
        target = DetectionTarget(objects=tuple(LabelledBox(label=name, box=fractions(box)) for name, box in objects))
        images.append((number, objects))
        detections += detection_reference(texts[-1], number)
        scored.append(score(task, "qwen2_5_vl", target, texts[-1], number))
    metrics = make_metrics(task)
    update_metrics(metrics, scored)
    found, expected = metrics.compute(), coco_stats(images, detections)
    assert 0.2 < expected[1] < 0.9
    for name, index in (("ap", 0), ("ap50", 1), ("ap75", 2), ("ap_medium", 4), ("ap_large", 5), ("ar", 8)):
        assert float(found[name]) == pytest.approx(expected[index], abs=1e-9), name


def test_detection_maps_back_only_when_asked():
    text = '[{"bbox_2d": [98, 504, 490, 1008], "label": "cat"}]'
    target = DetectionTarget(objects=())
    unmapped = score(Detection(categories=LABELS), "qwen2_5_vl", target, text).prediction.objects[0].box
    mapped = score(Detection(categories=LABELS, published_boxes="resized"), "qwen2_5_vl", target, text)
    assert unmapped == pytest.approx((0.098, 0.504, 0.49, 1.008))
    assert mapped.prediction.objects[0].box == pytest.approx((0.1, 0.5, 0.5, 1.0))


# ---------------------------------------------------------------------------------------------------- ocr


def test_ocr():
    rng, task = random.Random(4), TASKS["ocr"]()
    for _ in range(NUM_ANSWERS):
        page = "".join(rng.choice("abc de\n") for _ in range(rng.randrange(1, 30)))
        text = mutated(rng, page, ("<|box_start|>", "<|image_pad|>", "<|endoftext|>", "<|unknown|>", "q", "\n"))
        plain = text
        for token in ("<|box_start|>", "<|image_pad|>", "<|endoftext|>", "<|im_end|>"):
            plain = plain.replace(token, "")
        expected = nltk.edit_distance(plain, page) / max(len(plain), len(page))
        found = score(task, "qwen2_vl", OcrTarget(text=page), text).score.metrics["edit_distance"]
        assert found == pytest.approx(expected), text


# --------------------------------------------------------------------------------------------- any answer


TARGETS = {
    "grounding": GroundingTarget(box=(0.1, 0.2, 0.3, 0.4)),
    "counting": CountingTarget(count=3),
    "detection": DetectionTarget(objects=(LabelledBox(label="cat", box=(0.1, 0.2, 0.3, 0.4)),)),
    "ocr": OcrTarget(text="two\nlines"),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("text", [*WORST, "[" * 30000, "(" + "1" * 30000, "<|box_start|>" * 2500, '"' + "9" * 5000])
def test_any_text_is_read(name, text):
    task = TASKS[name]()
    target = TARGETS[name]
    scored = score(task, "qwen2_5_vl", target, text[:MAX_TEXT])
    assert all(map(math.isfinite, scored.score.metrics.values()))
