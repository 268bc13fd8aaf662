import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, Overlay, Sample
from perception_r1.rows import Row, RowError
from perception_r1.scoring import parse_completions, score_completions
from perception_r1.tasks.grounding import Grounding, GroundingPrediction, GroundingTarget
from tests.tasks import golden

FRAME = ImageSize(width=200, height=100, resized_width=196, resized_height=112)
REF = "<|object_ref_start|>cup<|object_ref_end|>"
LEFT = "<|box_start|>(0,0),(500,1000)<|box_end|>"
TARGET = GroundingTarget(box=(0.0, 0.0, 0.5, 1.0))


def parse(text: str) -> GroundingPrediction | None:
    return Grounding().parse_completion(text, CODECS["qwen2_vl"], FRAME)


@pytest.mark.parametrize("values", golden.read("grounding"), ids=str)
def test_golden_vectors(values):
    found = golden.flat(golden.score(Grounding(), "qwen2_vl", values))
    assert {name: found[name] for name in values["expect"]} == pytest.approx(values["expect"], abs=1e-6)


def test_row_and_prompt():
    row = Row({"question": "red cup", "box": [0, 0, 100, 100]}, width=200, height=100)
    assert Grounding().read_row(row) == ("red cup", TARGET)
    assert Grounding().prompt("red cup") == "Output the bounding box of the red cup in the image."
    with pytest.raises(RowError, match="question"):
        Grounding().read_row(Row({"box": [0, 0, 100, 100]}, width=200, height=100))


@pytest.mark.parametrize(
    ("text", "num_boxes", "is_well_formed"),
    [
        (REF + LEFT, 1, True),
        (LEFT, 1, False),
        (REF + LEFT + ".", 1, False),
        (REF + LEFT + LEFT, 2, False),
        (REF + "<|box_start|>(5,5),(1,1)<|box_end|>", 0, False),
        (REF + LEFT + "<|box_start|>(5,5),(1,1)<|box_end|>", 1, False),
    ],
)
def test_well_formed_is_exactly_one_labelled_box(text, num_boxes, is_well_formed):
    prediction = parse(text)
    assert prediction is not None
    assert len(prediction.boxes) == num_boxes
    assert prediction.is_well_formed == is_well_formed


def test_a_json_answer_needs_its_label_too():
    codec, task = CODECS["qwen3_vl"], Grounding()
    good = task.parse_completion('[{"bbox_2d": [0, 0, 500, 1000], "label": "cup"}]', codec, FRAME)
    unnamed = task.parse_completion('[{"bbox_2d": [0, 0, 500, 1000]}]', codec, FRAME)
    assert task.score(good, TARGET).reward == 2
    assert task.score(unnamed, TARGET).reward == 1


def test_weights_scale_the_components():
    task = Grounding(format_weight=0.5, iou_weight=3.0)
    prediction = GroundingPrediction(boxes=((0.0, 0.0, 0.25, 1.0),), label="cup", is_well_formed=True)
    assert task.score(prediction, TARGET).reward == pytest.approx(0.5 + 3 * 0.5**2)


@pytest.mark.parametrize(
    ("boxes", "metrics"),
    [
        # IoU 1, 0.8, 0.5 and 0.4 with the left half; the last has its center in it all the same
        (((0.0, 0.0, 0.5, 1.0),), (1, 1, 1, 1, 1, 0, 0)),
        (((0.0, 0.0, 0.4, 1.0),), (1, 1, 0, 2 / 3, 1, 0, 0)),
        (((0.0, 0.0, 0.25, 1.0),), (1, 0, 0, 1 / 3, 1, 0, 0)),
        (((0.0, 0.0, 0.2, 1.0),), (0, 0, 0, 0, 1, 1, 1)),
        (((0.5, 0.0, 1.0, 1.0),), (0, 0, 0, 0, 0, 1, 1)),
        (((0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.5, 1.0)), (0, 0, 0, 0, 0, 2, 1)),
        ((), (0, 0, 0, 0, 0, 0, 1)),
    ],
)
def test_figures_worked_by_hand(boxes, metrics):
    prediction = GroundingPrediction(boxes=boxes, label="cup", is_well_formed=len(boxes) == 1)
    found = Grounding().score(prediction, TARGET).metrics
    assert tuple(found[name] for name in Grounding.metric_names) == metrics


def naive_metrics(box: list[int], target: list[int]) -> dict[str, Fraction]:
    """The protocol's metrics in whole pixels, without any rounding."""
    inside = overlap = both = 0
    across, down = (
        [max(box[k], target[k]), min(box[k + 2], target[k + 2]), box[k] + box[k + 2], 2 * target[k], 2 * target[k + 2]]
        for k in (0, 1)
    )
    overlap = max(across[1] - across[0], 0) * max(down[1] - down[0], 0)
    both = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, target)) - overlap
    inside = all(low <= twice_center <= high for _, _, twice_center, low, high in (across, down))
    iou = Fraction(overlap, both)
    accuracies = [Fraction(iou >= Fraction(threshold, 100)) for threshold in (50, 75, 95)]
    return {
        "iou": iou,
        "accuracy_50": accuracies[0],
        "accuracy_75": accuracies[1],
        "accuracy_95": accuracies[2],
        "accuracy_mean": sum(accuracies) / 3,
        "center_accuracy": Fraction(inside),
    }


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_whole_pixels_also_on_the_thresholds(seed):
    rng = random.Random(seed)
    samples, image_sizes, completions, wanted = [], [], [], []
    for number in range(400):
        width, height = rng.randrange(60, 900), rng.randrange(60, 900)
        x, y, w, h = rng.randrange(width - 40), rng.randrange(height - 40), 20, rng.randrange(1, 41)
        target = [x, y, x + w, y + h]
        cut, move = rng.choice([0, 1, 5, 10, 12]), rng.choice([0, 0, 10, -10, 3])
        box = [x + move, y, x + move + w - cut, y + h]
        if box[0] < 0 or box[2] > width:
            box = target
        task, row = Grounding(), Row({"question": "cup", "box": target}, width=width, height=height)
        sample = Sample(
            id=str(number), image=Path(), width=width, height=height, query="", target=task.read_row(row)[1]
        )
        samples.append(sample)
        image_sizes.append(ImageSize(width=width, height=height, resized_width=width, resized_height=height))
        completions.append(f'[{{"bbox_2d": {box}, "label": "cup"}}]')
        wanted.append(naive_metrics(box, target))
    parsed = parse_completions(
        task, CODECS["qwen2_5_vl"], samples=samples, image_sizes=image_sizes, completions=completions
    )
    scored_completions = score_completions(task, parsed, is_evaluation=True)
    for scored, metrics in zip(scored_completions, wanted, strict=True):
        found = golden.flat(scored.score)
        assert {name: found[name] for name in metrics} == pytest.approx(
            {k: float(v) for k, v in metrics.items()}, abs=1e-9
        )
    metrics = make_metrics(task)
    rng.shuffle(scored_completions)
    for start in range(0, 400, 33):
        update_metrics(metrics, scored_completions[start : start + 33])
    values = metrics.compute()
    for name in wanted[0]:
        mean = math.fsum(metrics[name] for metrics in wanted) / 400
        tag = f"reward/{name}" if name in task.component_names else name
        assert values[tag].item() == pytest.approx(mean, abs=1e-9, rel=0)
        assert 0 < mean < 1


def test_marks_and_description():
    prediction = parse(REF + LEFT)
    assert prediction is not None
    assert list(Grounding().overlays(prediction)) == [Overlay(shape=TARGET.box, caption="cup")]
    assert list(Grounding().overlays(TARGET)) == [Overlay(shape=TARGET.box)]
    assert Grounding().serialize_prediction(prediction, FRAME) == {"boxes": [[0.0, 0.0, 100.0, 100.0]]}
    assert Grounding().serialize_prediction(None, FRAME) is None
    assert Grounding().describe(TARGET) == "1 box"
    assert Grounding().describe(prediction) == "1 box: cup"
    assert Grounding().describe(replace(prediction, boxes=())) == "no box"


def test_the_answer_names_the_query(tmp_path):
    sample = Sample(id="1", image=tmp_path, width=200, height=100, query="cup", target=TARGET)
    assert Grounding().format_target(sample, CODECS["qwen2_vl"], FRAME) == REF + LEFT


@pytest.mark.parametrize("options", [{"format_weight": -1.0}, {"iou_weight": float("nan")}])
def test_bad_weights_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Grounding(**options)
