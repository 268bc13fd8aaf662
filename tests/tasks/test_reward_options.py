"""Rewards beside the paper's: their definitions in plain Python, and what must hold for any of them."""

import itertools
import random
from dataclasses import replace
from math import dist, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.errors import UserError
from perception_r1.records import LabelledBox
from perception_r1.task import Mixture, at_progress
from perception_r1.tasks import TASKS
from perception_r1.tasks.counting import Counting, CountingPrediction, CountingTarget
from perception_r1.tasks.detection import Detection, DetectionPrediction, DetectionTarget
from perception_r1.tasks.grounding import Grounding, GroundingPrediction, GroundingTarget
from perception_r1.tasks.ocr import Ocr, OcrTarget

THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
NAMES = ("cat", "dog")
sides = st.tuples(*[st.integers(0, 19)] * 2).filter(lambda pair: pair[0] != pair[1])
boxes = st.builds(lambda x, y: tuple(value / 20 for value in (min(x), min(y), max(x), max(y))), sides, sides)
KINDS = st.sampled_from(["boxes", "points", "count"])
items = st.lists(st.builds(LabelledBox, label=st.sampled_from(NAMES), box=boxes), max_size=4)


def naive_iou(a, b):
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0, across) * max(0, down)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap / (area - overlap)


def naive_hull(a, b):
    return (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))


def reached(value):
    return sum(value >= threshold - 1e-9 for threshold in THRESHOLDS) / 10


def naive_f1(shares, num_predicted, num_targets):
    """The best of all ways to pair them."""
    if not num_predicted and not num_targets:
        return 1.0
    rows, columns = len(shares), num_targets
    if rows <= columns:
        ways = (sum(shares[k][j] for k, j in enumerate(way)) for way in itertools.permutations(range(columns), rows))
    else:
        ways = (sum(shares[k][j] for j, k in enumerate(way)) for way in itertools.permutations(range(rows), columns))
    return 2 * max(ways, default=0.0) / (num_predicted + num_targets)


@given(predicted=items, targets=items, num_invalid=st.integers(0, 2))
def test_mean_f1_of_detection_is_the_best_pairing_over_all_thresholds(predicted, targets, num_invalid):
    task = Detection(categories=NAMES, reward="mean_f1")
    prediction = DetectionPrediction(objects=tuple(predicted), num_listed=len(predicted) + num_invalid, is_exact=True)
    shares = [
        [reached(naive_iou(one.box, other.box)) * (one.label == other.label) for other in targets] for one in predicted
    ]
    expected = naive_f1(shares, len(predicted) + num_invalid, len(targets))
    score = task.score(prediction, DetectionTarget(objects=tuple(targets)))
    assert score.reward == score.metrics["mean_f1"] == pytest.approx(expected)
    assert (
        Detection(categories=NAMES).score(prediction, DetectionTarget(objects=tuple(targets))).metrics == score.metrics
    )
    inexact = DetectionPrediction(objects=tuple(predicted), num_listed=len(predicted), is_exact=False)
    assert task.score(inexact, DetectionTarget(objects=tuple(targets))).reward == 0


@given(predicted=st.lists(boxes, max_size=4), targets=st.lists(boxes, max_size=4), kind=KINDS)
def test_mean_f1_of_counting_is_the_best_pairing_over_all_thresholds(predicted, targets, kind):
    centers = [[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for box in targets]
    target = CountingTarget(
        count=len(targets),
        points=None if kind == "count" else tuple(map(tuple, centers)),
        boxes=tuple(targets) if kind == "boxes" else None,
    )
    prediction = CountingPrediction(count=len(predicted), boxes=tuple(predicted), label="cup", is_well_formed=True)
    if kind == "boxes":
        shares = [[reached(naive_iou(one, other)) for other in targets] for one in predicted]
    elif kind == "points":
        mine = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in predicted]
        near = [[dist(one, other) / sqrt(2) for other in centers] for one in mine]
        shares = [[sum(value <= step / 100 + 1e-9 for step in range(1, 11)) / 10 for value in row] for row in near]
    else:
        shares = [[1.0] * len(targets) for _ in predicted]
    score = Counting(reward="mean_f1").score(prediction, target)
    assert score.reward == pytest.approx(naive_f1(shares, len(predicted), len(targets)))
    assert score.reward == score.metrics["mean_f1"] or not predicted


@given(box=boxes, target=boxes)
def test_rewards_of_grounding_are_those_of_their_names(box, target):
    answer = GroundingPrediction(boxes=(box,), label="cup", is_well_formed=True)
    overlap = naive_iou(box, target)
    union = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (box, target)) / (1 + overlap)
    generalised = overlap - (naive_hull(box, target) - union) / naive_hull(box, target)
    rewards = {"thresholds": reached(overlap), "giou": (1 + generalised) / 2}
    for name, expected in rewards.items():
        assert Grounding(reward=name).score(answer, GroundingTarget(box=target)).reward == pytest.approx(expected)
        for wrong in (
            GroundingPrediction(boxes=(box,), label="", is_well_formed=False),
            GroundingPrediction(boxes=(target, target), label="cup", is_well_formed=False),
            None,
        ):
            assert Grounding(reward=name).score(wrong, GroundingTarget(box=target)).reward == 0


@pytest.mark.parametrize(
    ("text", "lines"),
    [("a b\nc\nd", 1.0), ("a b\nc", 2 / 3), ("a b\nx\nd", 2 / 3), ("a b\nc\nd\ne", 3 / 4), ("c\nd", 2 / 3), ("", 0.0)],
)
def test_lines_of_a_page_are_right_or_wrong(text, lines):
    target = OcrTarget(text="a b\nc\nd")
    plain = Ocr().score(text, target)
    assert Ocr(reward="lines").score(text, target).reward == pytest.approx((plain.reward + lines) / 2)
    assert Ocr(reward="lines").score(None, target).reward == 0


def scored_lists(reward: str, seed: int):
    """Answers of all kinds to one image, with reward and the metrics that a report has of them."""
    draw = random.Random(seed)

    def some_box():
        x, y = draw.random() * 0.8, draw.random() * 0.8
        return x, y, x + 0.05 + draw.random() * 0.15, y + 0.05 + draw.random() * 0.15

    targets = [LabelledBox(label=draw.choice(NAMES), box=some_box()) for _ in range(4)]
    task = Detection(categories=NAMES, reward=reward)
    for _ in range(60):
        found = []
        for item in targets:
            for _ in range(draw.choice([0, 1, 1, 1, 2])):
                moved = tuple(value + draw.gauss(0, 0.01) * draw.choice([0, 1, 2]) for value in item.box)
                found.append(LabelledBox(label=draw.choice([item.label] * 3 + [NAMES[0]]), box=moved))
        prediction = DetectionPrediction(objects=tuple(found), num_listed=len(found), is_exact=True)
        score = task.score(prediction, DetectionTarget(objects=tuple(targets)))
        if len(found) <= 6:  # all ways to pair more would take long
            yield score.reward, [f1_at(threshold, found, targets) for threshold in THRESHOLDS]


def f1_at(threshold, found, targets):
    hits = [
        [(naive_iou(one.box, other.box) >= threshold) * (one.label == other.label) for other in targets]
        for one in found
    ]
    return naive_f1(hits, len(found), len(targets))


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_that_is_worse_at_every_threshold_never_earns_more(seed):
    """The mean of F1 cannot be gamed; the paper's reward can, which shows that this search would find it."""
    for reward, is_safe in (("mean_f1", True), ("perception_r1", False)):
        answers = list(scored_lists(reward, seed))
        gaps = [
            one - other
            for (one, mine), (other, theirs) in itertools.permutations(answers, 2)
            if all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs
        ]
        assert len(gaps) > 50
        assert (max(gaps) <= 1e-9) is is_safe


@given(predicted=items, targets=items, beta=st.sampled_from([0.5, 2.0]))
def test_beta_weighs_what_is_missing_against_what_is_wrong(predicted, targets, beta):
    prediction = DetectionPrediction(objects=tuple(predicted), num_listed=len(predicted), is_exact=True)
    target = DetectionTarget(objects=tuple(targets))
    score = Detection(categories=NAMES, reward="mean_f1", beta=beta).score(prediction, target)
    f1 = score.metrics["mean_f1"]
    if not predicted and not targets:
        assert score.reward == f1 == 1
    else:
        hits = f1 * (len(predicted) + len(targets)) / 2
        precision, recall = hits / max(1, len(predicted)), hits / max(1, len(targets))
        weighed = (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if hits else 0.0
        assert score.reward == pytest.approx(weighed)
    boxes_alone = CountingPrediction(
        count=len(predicted), boxes=tuple(one.box for one in predicted), label="cup", is_well_formed=True
    )
    points = tuple(((one.box[0] + one.box[2]) / 2, (one.box[1] + one.box[3]) / 2) for one in targets)
    counted = CountingTarget(count=len(targets), boxes=tuple(one.box for one in targets), points=points)
    one_name = [LabelledBox(label="cat", box=one.box) for one in predicted]
    same = Detection(categories=NAMES, reward="mean_f1", beta=beta).score(
        DetectionPrediction(objects=tuple(one_name), num_listed=len(one_name), is_exact=True),
        DetectionTarget(objects=tuple(LabelledBox(label="cat", box=one.box) for one in targets)),
    )
    assert Counting(reward="mean_f1", beta=beta).score(boxes_alone, counted).reward == pytest.approx(same.reward)


@given(box=boxes, target=boxes, threshold=st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_below_the_threshold_a_box_of_grounding_earns_its_format_alone(box, target, threshold):
    answer = GroundingPrediction(boxes=(box,), label="cup", is_well_formed=True)
    overlap = naive_iou(box, target)
    is_near = overlap >= threshold - 1e-9
    plain = Grounding().score(answer, GroundingTarget(box=target))
    score = Grounding(iou_threshold=threshold).score(answer, GroundingTarget(box=target))
    assert score.reward == pytest.approx(1 + (overlap**2 if is_near else 0))
    assert (score.metrics, score.components) == (plain.metrics, plain.components)
    generalised = Grounding(reward="giou").score(answer, GroundingTarget(box=target)).reward
    of_giou = Grounding(reward="giou", iou_threshold=threshold).score(answer, GroundingTarget(box=target)).reward
    assert of_giou == (generalised if is_near else 0)


@pytest.mark.parametrize(("threshold", "num_pairs"), [(0.5, 2), (0.7, 1), (0.9, 0)])
def test_pairs_of_detection_need_more_than_the_threshold(threshold, num_pairs):
    targets = tuple(LabelledBox(label="cat", box=(x, 0.0, x + 0.2, 0.5)) for x in (0.0, 0.5))
    # IoU 0.6 and 0.8
    found = tuple(LabelledBox(label="cat", box=(x, 0.0, x + 0.2, 0.5 * part)) for x, part in ((0.0, 0.6), (0.5, 0.8)))
    task = Detection(categories=NAMES, iou_threshold=threshold)
    score = task.score(
        DetectionPrediction(objects=found, num_listed=2, is_exact=True), DetectionTarget(objects=targets)
    )
    assert score.components["missing"] == pytest.approx(1 - num_pairs / 2)
    assert score.metrics["false_positives"] == 2 - num_pairs


@pytest.mark.parametrize("kind", [Grounding, Detection])
def test_the_threshold_goes_evenly_to_its_final_value(kind):
    task = kind(iou_threshold=0.25, final_iou_threshold=0.75)
    assert [task.at_progress(progress).iou_threshold for progress in (0.0, 0.5, 1.0)] == [0.25, 0.5, 0.75]
    assert at_progress(Mixture(tasks={"one": task}), 0.5).tasks["one"] == task.at_progress(0.5)
    steady = replace(task, final_iou_threshold=None)
    assert steady.at_progress(0.5) == steady
    assert Counting().at_progress(0.5) == Counting()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grounding(iou_threshold=-0.1), "iou_threshold must lie in 0..1, not -0.1"),
        (lambda: Detection(final_iou_threshold=95), "final_iou_threshold must lie in 0..1, not 95"),
        (lambda: Detection(reward="mean_f1", iou_threshold=0.7), "mean_f1 has thresholds of its own"),
        (lambda: Detection(beta=2.0), "beta belongs to the reward mean_f1"),
        (lambda: Counting(reward="mean_f1", beta=0.0), "beta must be a number above 0, not 0.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


PAGE = "a quick brown fox\njumps over\nthe lazy dog"


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        (PAGE, 1),
        (PAGE.replace("fox", "fix"), (4 + 16 / 17) / 5),  # nearly: one of 17 characters
        ("jumps over\na quick brown fox\nthe lazy dog", 4 / 5),  # one pair out of order
        ("a quick brown fox\nthe lazy dog", 2 / 5),  # a line and both of its pairs are missing
        (PAGE + "\nand runs", 5 / 6),  # a line too many
        (PAGE + "\n" + PAGE, 5 / 8),
        ("\n".join([PAGE] * 3), 0),  # more than twice the lines
        ("", 0),
    ],
)
def test_unit_tests_of_a_page_pass_or_fail(text, passed):
    target = OcrTarget(text=PAGE)
    assert Ocr(reward="unit_tests").score(text, target).reward == pytest.approx(passed)
    assert Ocr(reward="unit_tests").score(None, target).reward == 0


@pytest.mark.parametrize("name", TASKS)
def test_unknown_rewards_are_refused(name):
    with pytest.raises(UserError, match="reward must be one of"):
        TASKS[name](reward="best")
