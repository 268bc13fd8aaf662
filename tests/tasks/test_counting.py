import random
from itertools import permutations
from math import dist, sqrt
from pathlib import Path

import numpy as np
import pytest

from perception_r1.geometry import center
from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, Overlay, Sample
from perception_r1.rows import Row, RowError
from perception_r1.scoring import parse_completions, score_completions
from perception_r1.tasks.counting import Counting, CountingPrediction, CountingTarget
from tests.tasks import golden

FRAME = ImageSize(width=1000, height=500, resized_width=980, resized_height=504)
REF = "<|object_ref_start|>cup<|object_ref_end|>"
BOX = "<|box_start|>(0,0),(500,500)<|box_end|>"
TARGET = CountingTarget(count=2, points=((0.25, 0.25), (0.75, 0.75)))


def prediction(*centers: tuple[float, float], is_well_formed: bool = True) -> CountingPrediction:
    boxes = tuple((x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in centers)
    return CountingPrediction(count=len(boxes), boxes=boxes, label="cup", is_well_formed=is_well_formed)


@pytest.mark.parametrize("values", golden.read("counting"), ids=str)
def test_golden_vectors(values):
    found = golden.flat(golden.score(Counting(), "qwen2_vl", values))
    assert {name: found[name] for name in values["expect"]} == pytest.approx(values["expect"], abs=1e-6)


@pytest.mark.parametrize(("num_boxes", "num_points"), [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_reward_agrees_with_all_assignments_tried_out(num_boxes, num_points):
    rng = np.random.default_rng(num_boxes * 10 + num_points)
    centers = [tuple(xy) for xy in rng.uniform(0.1, 0.9, (num_boxes, 2)).tolist()]
    points = tuple(tuple(xy) for xy in rng.uniform(0, 1, (num_points, 2)).tolist())
    short, long = sorted([centers, list(points)], key=len)
    least = min(sum(map(dist, short, chosen)) for chosen in permutations(long, len(short))) / len(short)
    found = Counting().score(prediction(*centers), CountingTarget(count=num_points, points=points))
    ratio = len(short) / len(long)
    assert found.components["closeness"] == pytest.approx(1 - 1000 * least / (1000 * sqrt(2)))
    assert found.reward == pytest.approx(ratio * (1 - least / sqrt(2)))


@pytest.mark.parametrize("seed", range(3))
def test_means_are_the_share_of_right_counts_and_the_mean_absolute_error(seed):
    rng = random.Random(seed)
    samples, completions, is_right, errors = [], [], [], []
    for number in range(200):
        wanted, found = rng.randrange(6), rng.randrange(6)
        is_wordy = rng.random() < 0.2
        target = CountingTarget(count=wanted)
        samples.append(Sample(id=str(number), image=Path(), width=1000, height=500, query="cup", target=target))
        completions.append(("I see " if is_wordy else "") + (REF + BOX * found if found else "none"))
        is_right.append(found == wanted and found > 0 and not is_wordy)
        errors.append(abs(found - wanted))
    parsed = parse_completions(
        Counting(), CODECS["qwen2_vl"], samples=samples, image_sizes=[FRAME] * 200, completions=completions
    )
    scored_completions = score_completions(Counting(), parsed)
    metrics = make_metrics(Counting())
    rng.shuffle(scored_completions)
    for start in range(0, 200, 33):
        update_metrics(metrics, scored_completions[start : start + 33])
    values = metrics.compute()
    assert values["count_accuracy"].item() == pytest.approx(sum(is_right) / 200, abs=1e-9, rel=0)
    assert values["absolute_error"].item() == pytest.approx(sum(errors) / 200, abs=1e-9, rel=0)


def test_sequential_matching_pays_for_the_order():
    crossed = prediction((0.75, 0.75), (0.25, 0.25))
    assert Counting().score(crossed, TARGET).reward == pytest.approx(1)
    assert Counting(matching="sequential").score(crossed, TARGET).reward == pytest.approx(0.5)


def test_a_count_without_points_has_no_place_to_miss():
    assert Counting().score(prediction((0.1, 0.1)), CountingTarget(count=4)).reward == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("answer", "metrics"),
    [
        (prediction((0.3, 0.3), (0.7, 0.7)), (1, 0, 2, 0, 0)),
        (prediction((0.3, 0.3), (0.7, 0.7), is_well_formed=False), (0, 0, 2, 0, 0)),
        (prediction((0.3, 0.3)), (0, 1, 1, 0, 1)),
        (prediction((0.3, 0.3), (0.7, 0.7), (0.5, 0.5)), (0, 1, 3, 1, 0)),
        (None, (0, 2, 0, 0, 2)),
    ],
)
def test_figures_worked_by_hand(answer, metrics):
    found = Counting().score(answer, TARGET).metrics
    assert tuple(found[name] for name in Counting.metric_names if name != "mean_f1") == metrics


def test_any_count_alone_can_be_scored():
    found = Counting(reward="mean_f1").score(prediction((0.1, 0.1)), CountingTarget(count=2**31 - 1))
    assert found.reward == pytest.approx(2 / 2**31)  # no matrix of two billion entries


def test_nothing_to_count_is_worth_nothing():
    assert Counting().score(prediction((0.3, 0.3)), CountingTarget(count=0, points=())).reward == 0
    assert Counting().score(None, CountingTarget(count=0)).reward == 0


@pytest.mark.parametrize(
    ("text", "count", "is_well_formed"),
    [
        (REF + BOX, 1, True),
        (REF + BOX + BOX, 2, True),
        (REF + BOX + REF + BOX, 2, False),
        (REF + BOX + "<|object_ref_start|>dog<|object_ref_end|>" + BOX, 2, False),
        (REF + BOX + "<|box_start|>(9,9),(1,1)<|box_end|>", 2, False),
        ("There are: " + REF + BOX, 1, False),
    ],
)
def test_well_formed_is_one_label_and_its_boxes(text, count, is_well_formed):
    found = Counting().parse_completion(text, CODECS["qwen2_vl"], FRAME)
    assert found is not None
    assert (found.count, found.is_well_formed) == (count, is_well_formed)


def test_rows_give_points_a_count_or_boxes():
    def read(**values: object) -> tuple[str, CountingTarget]:
        return Counting().read_row(Row({"label": "cup", **values}, width=1000, height=500))

    assert read(points=[[250, 125], [750, 375]]) == ("cup", TARGET)
    assert read(points=[[250, 125], [750, 375]], count=2) == ("cup", TARGET)
    assert read(count=7) == ("cup", CountingTarget(count=7))
    assert read(boxes=[[0, 0, 500, 250]]) == (
        "cup",
        CountingTarget(count=1, points=((0.25, 0.25),), boxes=((0.0, 0.0, 0.5, 0.5),)),
    )
    with pytest.raises(RowError, match="count gives 3"):
        read(points=[[250, 125]], count=3)
    with pytest.raises(RowError, match="points"):
        read()
    with pytest.raises(RowError, match="label"):
        Counting().read_row(Row({"count": 3}, width=1000, height=500))
    with pytest.raises(RowError, match="count"):
        read(count=-1)


@pytest.mark.parametrize("point", [(0.5, 0.5), (0.01, 0.5), (0.995, 0.004), (0.0, 0.0), (1.0, 1.0), (0.0005, 0.9999)])
def test_a_point_is_written_as_a_small_square_around_it(tmp_path, point):
    sample = Sample(
        id="1", image=tmp_path, width=1000, height=500, query="cup", target=CountingTarget(count=1, points=(point,))
    )
    codec = CODECS["qwen2_vl"]
    item = codec.parse_boxes(Counting().format_target(sample, codec, FRAME), FRAME).items[0]
    assert item.box is not None
    assert center(item.box) == pytest.approx(point, abs=0.0015)
    assert max(item.box[2] - item.box[0], item.box[3] - item.box[1]) <= 0.04 + 1e-9


def test_boxes_are_written_as_they_are_and_a_count_cannot_be(tmp_path):
    def written(target: CountingTarget) -> str:
        sample = Sample(id="1", image=tmp_path, width=1000, height=500, query="cup", target=target)
        return Counting().format_target(sample, CODECS["qwen2_vl"], FRAME)

    assert written(CountingTarget(count=1, points=((0.25, 0.25),), boxes=((0.0, 0.0, 0.5, 0.5),))) == REF + BOX
    with pytest.raises(ValueError, match="points or boxes"):
        written(CountingTarget(count=1))


def test_marks_and_description():
    task = Counting()
    assert list(task.overlays(TARGET)) == [Overlay(shape=(0.25, 0.25)), Overlay(shape=(0.75, 0.75))]
    boxed = CountingTarget(count=1, points=((0.25, 0.25),), boxes=((0.0, 0.0, 0.5, 0.5),))
    assert list(task.overlays(boxed)) == [Overlay(shape=(0.0, 0.0, 0.5, 0.5))]
    assert list(task.overlays(CountingTarget(count=3))) == []
    found = task.parse_completion(REF + BOX, CODECS["qwen2_vl"], FRAME)
    assert found is not None
    assert list(task.overlays(found)) == [Overlay(shape=(0.0, 0.0, 0.5, 0.5), caption="cup")]
    assert task.serialize_prediction(found, FRAME) == {"count": 1, "boxes": [[0.0, 0.0, 500.0, 250.0]]}
    assert [task.describe(CountingTarget(count=count)) for count in (0, 1, 3)] == [
        "no objects",
        "1 object",
        "3 objects",
    ]
    assert task.describe(found) == "1 object"
    assert task.prompt("cups") == "Output all the bounding boxes of the cups"


def test_an_unknown_matching_is_refused():
    with pytest.raises(ValueError, match="matching"):
        Counting(matching="greedy")  # type: ignore[arg-type]
