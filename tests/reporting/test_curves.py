"""Curves from event files."""

import math

import pytest

from perception_r1.reporting.curves import MAX_POINTS, grouped, read_curves
from tests.reporting.runs import write_scalars


def test_a_curve_is_what_was_logged_with_its_margins(tmp_path):
    scalars = {
        "train/reward": {0: 0.5, 1: 0.25, 2: math.nan},
        "val/reward": {1: 0.5, 3: 0.75},
        "val/margin_of_error/reward": {3: 0.125},
        "val/ocr/exact_match": {1: 1.0},
        "val/ocr/margin_of_error/exact_match": {1: 0.5},
        "test/reward": {0: 1.0},
        "epoch": {0: 0.0},
    }
    write_scalars(tmp_path, scalars)
    curves = read_curves(tmp_path)
    assert set(curves) == {"train/reward", "val/reward", "val/ocr/exact_match"}
    assert (curves["train/reward"].steps, curves["train/reward"].values) == ([0, 1, 2], [0.5, 0.25, None])
    assert curves["val/reward"].margins == [None, 0.125]
    assert curves["val/ocr/exact_match"].margins == [0.5]


def test_a_step_that_was_logged_again_counts_once(tmp_path):
    write_scalars(tmp_path, {"train/reward": {0: 0.5, 1: 0.25}})
    write_scalars(tmp_path, {"train/reward": {1: 0.75, 2: 1.0}})
    curve = read_curves(tmp_path)["train/reward"]
    assert curve.steps == [0, 1, 2]
    assert curve.values[0] == 0.5
    assert curve.values[2] == 1.0


@pytest.mark.parametrize(("count", "size"), [(MAX_POINTS, 1), (MAX_POINTS + 1, 2), (1200, 3)])
def test_a_long_curve_is_thinned_to_means(tmp_path, count, size):
    write_scalars(tmp_path, {"train/loss": {step: float(step) for step in range(count)}})
    curve = read_curves(tmp_path)["train/loss"]
    assert curve.num_steps == size
    assert len(curve.steps) == math.ceil(count / size) <= MAX_POINTS
    assert curve.values[0] == (size - 1) / 2  # 0, 1, ..., size - 1


def test_no_events_and_half_an_event_are_no_error(tmp_path):
    assert read_curves(tmp_path) == {}
    write_scalars(tmp_path, {"train/reward": {step: 1.0 for step in range(9)}})
    (path,) = tmp_path.glob("events.out.tfevents*")
    path.write_bytes(path.read_bytes()[:-7])
    assert len(read_curves(tmp_path)["train/reward"].steps) == 8
    path.write_bytes(b"no events at all")
    assert read_curves(tmp_path) == {}


def test_every_tag_is_in_one_group():
    tags = [
        "train/kl",
        "val/reward",
        "val/ocr/edit_distance",
        "train/reward/iou",
        "train/seconds/reward",
        "val/seconds",
    ]
    tags += ["train/lr", "train/count_accuracy", "train/ocr/reward", "train/reward_std", "train/completion_length"]
    groups = dict(grouped(tags))
    assert sorted(tag for found in groups.values() for tag in found) == sorted(tags)
    assert groups["Validation"] == ["val/reward", "val/ocr/edit_distance"]
    assert groups["Reward of sampled completions"] == ["train/ocr/reward", "train/reward/iou"]
    assert groups["Time, tokens and memory"] == ["val/seconds", "train/seconds/reward"]
