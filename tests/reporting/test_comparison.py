"""Differences of metrics and of settings."""

import json

import numpy as np
import pytest
from scipy import stats

from perception_r1.reporting.comparison import compare_metrics, differing, paired_difference, settings_of
from perception_r1.reporting.folder import Metric, read_record
from tests.reporting.runs import AFTER, BEFORE, CONFIG, make_evaluation, make_run, row

REWARD = Metric("counting", "reward")


def test_the_interval_is_that_of_a_paired_t_test():
    values = np.random.default_rng(0).normal(0.1, 1.0, size=37)
    interval = stats.ttest_rel(values, np.zeros(37)).confidence_interval(0.95)
    found = paired_difference(values.tolist())
    assert found.value - found.margin == pytest.approx(interval.low, abs=1e-12)
    assert found.value + found.margin == pytest.approx(interval.high, abs=1e-12)


def test_a_difference_is_clear_when_its_interval_leaves_zero_out():
    assert paired_difference([1.0, 1.1, 0.9]).is_clear
    assert not paired_difference([1.0, -1.0, 0.1]).is_clear
    assert not paired_difference([1.0]).is_clear


def test_before_and_after_are_compared_sample_by_sample(tmp_path):
    record = read_record(make_run(tmp_path / "run"))
    found = compare_metrics((record, "before"), (record, "after"))
    oracle = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95)
    assert found[REWARD].value == pytest.approx(np.mean(AFTER) - np.mean(BEFORE), abs=1e-12)
    assert found[REWARD].margin == pytest.approx((oracle.high - oracle.low) / 2, abs=1e-12)
    assert found[Metric("counting", "reward/format")].margin is None  # all are equal


def test_a_metric_of_other_samples_has_a_difference_without_interval(tmp_path):
    folder = make_run(tmp_path / "run")
    card = json.loads((folder / "run.json").read_text())
    card["after"] |= {"reward": 0.9, "ap": 0.5}
    card["before"] |= {"ap": 0.25}
    (folder / "run.json").write_text(json.dumps(card))
    record = read_record(folder)
    found = compare_metrics((record, "before"), (record, "after"))
    assert found[REWARD].margin is None  # the answers are not those that the metric is of
    assert found[Metric("counting", "ap")].value == 0.25
    assert found[Metric("counting", "ap")].margin is None


def test_a_run_and_an_evaluation_are_compared_on_the_same_samples(tmp_path):
    run, evaluation = (
        read_record(make_run(tmp_path / "run")),
        read_record(make_evaluation(tmp_path / "eval-1", (1.0,) * 4)),
    )
    found = compare_metrics((run, "after"), (evaluation, "after"))
    oracle = stats.ttest_rel((1.0,) * 4, AFTER).confidence_interval(0.95)
    assert found[REWARD].margin == pytest.approx((oracle.high - oracle.low) / 2, abs=1e-12)


def test_samples_with_other_targets_are_not_the_same(tmp_path):
    rows = [row(index, reward, target_in_words="something else") for index, reward in enumerate(AFTER)]
    record = read_record(make_run(tmp_path / "run", rows=rows))
    assert compare_metrics((record, "before"), (record, "after"))[REWARD].margin is None


def test_settings_have_the_names_of_the_command_line(tmp_path):
    first = settings_of(read_record(make_run(tmp_path / "a")))
    assert first["model"] == "GRPO"
    assert first["model.group_size"] == "4"
    assert first["model.policy.name"] == "tiny"
    assert first["data.task"] == "Counting"
    model = {**CONFIG["model"], "init_args": {"group_size": 8, "policy": {"name": "tiny"}, "betas": [0.9, 0.98]}}
    second = settings_of(read_record(make_run(tmp_path / "b", config={**CONFIG, "model": model})))
    assert differing([first, second]) == ["model.group_size", "model.betas"]
    assert differing([first, first]) == differing([first]) == []


def test_a_file_that_unfolds_without_end_is_cut(tmp_path):
    folder = make_run(tmp_path / "run")
    levels = [
        f"a{level}: &a{level} {{{', '.join(f'k{i}: *a{level - 1}' for i in range(10))}}}" for level in range(1, 9)
    ]
    (folder / "config.yaml").write_text("\n".join(["a0: &a0 {x: 1}", *levels]))
    assert len(settings_of(read_record(folder))) == 5000
