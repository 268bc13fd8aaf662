import json
from itertools import permutations

import numpy as np
import pytest

from perception_r1.data.categories import COCO_NAMES
from perception_r1.policy.families import CODECS
from perception_r1.records import Box, ImageSize, LabelledBox, Overlay
from perception_r1.rows import Row, RowError
from perception_r1.tasks.detection import Detection, DetectionPrediction, DetectionTarget
from tests.tasks import golden

FRAME = ImageSize(width=100, height=50, resized_width=84, resized_height=56)
CAT = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))
DOG = LabelledBox(label="dog", box=(0.5, 0.5, 1.0, 1.0))
TASK = Detection(categories=("cat", "dog"))


def prediction(*objects: LabelledBox, num_listed: int | None = None, is_exact: bool = True) -> DetectionPrediction:
    count = len(objects) if num_listed is None else num_listed
    return DetectionPrediction(objects=objects, num_listed=count, is_exact=is_exact)


@pytest.mark.parametrize("values", golden.read("detection"), ids=str)
def test_golden_vectors(values):
    task = Detection(missing_weight=values["missing_weight"])
    found = golden.flat(golden.score(task, "qwen2_5_vl", values))
    assert {name: found[name] for name in values["expect"]} == pytest.approx(values["expect"], abs=1e-6)


def test_the_default_categories_are_those_of_coco():
    assert list(COCO_NAMES) == json.loads((golden.FOLDER / "coco_names.json").read_text())
    assert Detection().prompt("") == f"Please output bbox coordinates and names of {', '.join(COCO_NAMES)}."
    assert TASK.prompt("") == "Please output bbox coordinates and names of cat, dog."


def naive_cost(a: LabelledBox, b: LabelledBox) -> tuple[float, float]:
    """The cost of a pair, component by component, and its IoU."""

    def cxcywh(box: Box) -> tuple[float, float, float, float]:
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]

    inner = [max(a.box[k], b.box[k]) for k in (0, 1)] + [min(a.box[k], b.box[k]) for k in (2, 3)]
    outer = [min(a.box[k], b.box[k]) for k in (0, 1)] + [max(a.box[k], b.box[k]) for k in (2, 3)]
    intersection = max(0, inner[2] - inner[0]) * max(0, inner[3] - inner[1])
    areas = [cxcywh(item.box)[2] * cxcywh(item.box)[3] for item in (a, b)]
    union, hull = sum(areas) - intersection, (outer[2] - outer[0]) * (outer[3] - outer[1])
    giou = intersection / union - (hull - union) / hull
    l1 = sum(abs(u - v) for u, v in zip(cxcywh(a.box), cxcywh(b.box), strict=True))
    return 5 * l1 - (a.label == b.label) - 2 * giou, intersection / union


@pytest.mark.parametrize("seed", range(8))
def test_score_agrees_with_all_assignments_tried_out(seed):
    rng = np.random.default_rng(seed)

    def shaken(item: LabelledBox) -> LabelledBox:
        x1, y1, x2, y2 = (float(v) for v in np.array(item.box) + rng.normal(0, 0.03, 4))
        return LabelledBox(label=str(rng.choice(["cat", "dog"])), box=(x1, y1, x2, y2))

    corners = rng.uniform(0.1, 0.4, (5, 2)).tolist()
    targets = [LabelledBox(label=str(rng.choice(["cat", "dog"])), box=(x, y, x + 0.4, y + 0.4)) for x, y in corners]
    objects = [shaken(item) for item in targets[: 3 + seed % 3]]
    rng.shuffle(objects)
    least = min(
        permutations(range(len(targets)), len(objects)),
        key=lambda chosen: sum(naive_cost(item, targets[j])[0] for item, j in zip(objects, chosen, strict=True)),
    )
    pairs = [(item, targets[j], naive_cost(item, targets[j])[1]) for item, j in zip(objects, least, strict=True)]
    pairs = [pair for pair in pairs if pair[2] > 0.5]
    precision, recall = len(pairs) / len(objects), len(pairs) / len(targets)
    wanted = {
        "format": 1.0,
        "f1": 2 * precision * recall / (precision + recall) if pairs else 0.0,
        "class": sum(a.label == b.label for a, b, _ in pairs) / len(pairs) if pairs else 0.0,
        "iou": sum(overlap for _, _, overlap in pairs) / len(pairs) if pairs else 0.0,
        "missing": 1 - recall,
    }
    found = TASK.score(prediction(*objects), DetectionTarget(objects=tuple(targets)))
    assert found.components == pytest.approx(wanted)
    reward = 0.25 + 0.75 * wanted["f1"] + wanted["class"] + wanted["iou"] - 0.5 * wanted["missing"]
    assert found.reward == pytest.approx(max(reward, 0))


def test_the_label_decides_between_equal_boxes():
    twin = LabelledBox(label="dog", box=CAT.box)
    target = DetectionTarget(objects=(CAT, twin))
    assert TASK.score(prediction(twin, CAT), target).components["class"] == 1
    sequential = Detection(categories=("cat", "dog"), matching="sequential")
    assert sequential.score(prediction(twin, CAT), target).components["class"] == 0


@pytest.mark.parametrize(
    ("answer", "objects", "reward"),
    [
        (prediction(), (), 3.0),
        (prediction(), (CAT,), 0.0),  # 0.25 for the form, less 0.5
        (prediction(CAT), (), 0.25),
        (prediction(num_listed=1), (), 0.0),
        (prediction(CAT, is_exact=False), (CAT,), 2.75),
        (None, (), 0.0),
        (None, (CAT,), 0.0),
    ],
)
def test_rewards_worked_by_hand(answer, objects, reward):
    assert TASK.score(answer, DetectionTarget(objects=objects)).reward == pytest.approx(reward)


def test_the_reward_stays_between_nothing_and_full_marks():
    task = Detection(categories=("cat", "dog"), f1_weight=2.0, class_weight=0.5, missing_weight=5.0)
    assert task.score(prediction(CAT, DOG), DetectionTarget(objects=(DOG, CAT))).reward == pytest.approx(3.75)
    assert task.score(prediction(), DetectionTarget(objects=())).reward == pytest.approx(3.75)
    assert task.score(prediction(), DetectionTarget(objects=(CAT,))).reward == 0


@pytest.mark.parametrize(
    ("answer", "objects", "metrics"),
    [
        (prediction(CAT, DOG), (CAT,), (0.5, 1, 2, 1, 0)),
        (prediction(CAT), (CAT, DOG), (1, 0.5, 1, 0, 1)),
        (prediction(LabelledBox(label="dog", box=CAT.box)), (CAT,), (1, 1, 1, 0, 0)),
        (prediction(), (), (1, 1, 0, 0, 0)),
        (None, (CAT,), (0, 0, 0, 0, 1)),
    ],
)
def test_figures_worked_by_hand(answer, objects, metrics):
    found = TASK.score(answer, DetectionTarget(objects=objects)).metrics
    assert tuple(found[name] for name in Detection.metric_names if name != "mean_f1") == metrics


@pytest.mark.parametrize("codec", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("text", ["", "{}", "no objects", "<|im_end|>", "[", "[[]"])
def test_what_is_no_list_is_no_answer(codec, text):
    assert TASK.parse_completion(text, CODECS[codec], FRAME) is None


def test_text_around_a_qwen2_list_costs_the_format_only():
    text = CODECS["qwen2_vl"].format_boxes([CAT, DOG], FRAME)
    target = DetectionTarget(objects=(CAT, DOG))
    found = TASK.score(TASK.parse_completion(f"I see {text}", CODECS["qwen2_vl"], FRAME), target)
    assert found.components == pytest.approx({"format": 0, "f1": 1, "class": 1, "iou": 1, "missing": 0})


def test_the_categories_are_those_of_the_data_unless_they_are_given():
    data = Detection(missing_weight=0.25).with_labels(iter(["dog", "cat", "dog"]))
    assert data == Detection(categories=("dog", "cat"), missing_weight=0.25)
    assert data.labels == ("dog", "cat")
    given = Detection(categories=("cat",))
    assert given.with_labels(["dog"]) is given


def test_rows_with_unknown_labels_are_refused():
    row = Row({"objects": [{"box": [0, 0, 50, 25], "label": "unicorn"}]}, width=100, height=50)
    with pytest.raises(RowError, match="'unicorn'"):
        TASK.read_row(row)
    row = Row({"objects": [{"box": [0, 0, 50, 25], "label": "cat"}]}, width=100, height=50)
    assert TASK.read_row(row) == ("", DetectionTarget(objects=(CAT,), areas=(None,)))
    assert TASK.read_row(Row({"objects": []}, width=100, height=50)) == ("", DetectionTarget(objects=()))


def test_a_crowd_is_no_target():
    area, crowd = {"area": 700}, {"crowd": True}
    objects = [
        {"box": [0, 0, 50, 25], "label": "cat"} | area,
        {"box": [50, 25, 100, 50], "label": "dog"} | crowd,
        {"box": [50, 25, 100, 50], "label": "dog", "crowd": False},
    ]
    _, target = TASK.read_row(Row({"objects": objects}, width=100, height=50))
    assert target == DetectionTarget(objects=(CAT, DOG), areas=(700.0, None), crowds=(DOG,))
    without = DetectionTarget(objects=(CAT, DOG))
    for answer in (prediction(CAT, DOG), prediction(CAT), prediction(), None):
        assert TASK.score(answer, target) == TASK.score(answer, without)
    assert list(TASK.overlays(target)) == list(TASK.overlays(without))
    row = Row({"objects": [{"box": [0, 0, 9, 9], "label": "unicorn"} | crowd]}, width=100, height=50)
    with pytest.raises(RowError, match="'unicorn'"):
        TASK.read_row(row)


def test_marks_and_description():
    assert list(TASK.overlays(DetectionTarget(objects=(CAT,)))) == [Overlay(shape=CAT.box, caption="cat")]
    assert TASK.serialize_prediction(prediction(CAT), FRAME) == {
        "objects": [{"box": [0.0, 0.0, 50.0, 25.0], "label": "cat"}]
    }
    assert TASK.serialize_prediction(None, FRAME) is None
    assert TASK.describe(DetectionTarget(objects=(DOG, CAT, DOG))) == "3 boxes: cat, 2x dog"
    assert TASK.describe(DetectionTarget(objects=(), areas=(), crowds=(DOG,))) == "no objects"
    assert TASK.describe(prediction(CAT)) == "1 box: cat"
    assert TASK.describe(prediction()) == "no objects"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ()}, "categories"),
        ({"categories": ("cat", "cat")}, "categories"),
        ({"matching": "greedy"}, "matching"),
        ({"missing_weight": -0.5}, "missing_weight"),
        ({"iou_weight": float("inf")}, "iou_weight"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Detection(**options)
