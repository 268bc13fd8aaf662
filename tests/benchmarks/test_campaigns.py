"""The campaigns go on where they were, tell what is wrong, and find nothing wrong in a small share of their trials."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

campaigns = program("campaigns")
trials, answers, malformed_rows, malformed_sources, mutations, results, soak, data, report, odd_settings = (
    program(f"campaigns.{name}")
    for name in (
        *("trials", "answers", "malformed_rows", "malformed_sources", "mutations", "results", "soak", "data", "report"),
        "odd_settings",
    )
)


class Coins(trials.Campaign):
    """Every third trial is wrong."""

    name, duty, size = "coins", "coins", 6
    done: list[int] = []  # noqa: RUF012

    def trial(self, number, folder):
        self.done.append(number)
        (folder / "coin").write_text("heads")
        return {"what": "coin", "faults": ["tails"] if number % 3 == 2 else []}

    def measures(self, outcomes):
        return {"num_coins": len(outcomes)}

    def rows(self, summary):
        return ["coins"], [[str(summary["num_coins"])]]


def test_a_campaign_goes_on_and_keeps_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Coins, "done", [])
    campaign = Coins(tmp_path, seed=7)
    campaign.run(range(4))
    lines = (tmp_path / "trials.jsonl").read_text()
    (tmp_path / "trials.jsonl").write_text(lines[:-5])  # stopped while it wrote the last one
    Coins(tmp_path, seed=7).run(range(6))
    assert Coins.done == [0, 1, 2, 3, 3, 4, 5]
    assert [outcome["trial"] for outcome in campaign.outcomes()] == [0, 1, 2, 3, 4, 5]
    assert {outcome["seed"] for outcome in campaign.outcomes()} == {7}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "5"]
    summary = campaign.summary()
    assert (summary["num_trials"], summary["num_faulty_trials"], summary["num_coins"]) == (6, 2, 6)
    assert summary["faulty_trials"] == [{"trial": n, "what": "coin", "faults": ["tails"]} for n in (2, 5)]
    assert "coins 5: coin: 1 wrong, see " in capsys.readouterr().out


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    campaign = Coins(tmp_path)
    with trials.FileLock(tmp_path / ".lock"), pytest.raises(SystemExit, match="is at work already"):
        campaign.run(range(1))


def test_damage_depends_on_the_draw_alone():
    values = [mutations.damaged_value({"box": [1, 2, 3, 4], "label": "cup"}, random.Random(5)) for _ in range(2)]
    assert repr(values[0]) == repr(values[1])
    texts = {mutations.damaged_text("a good text", random.Random(seed), ("(", "|")) for seed in range(50)}
    assert len(texts) > 25
    lines = {mutations.damaged_line(b'{"a": 1}', random.Random(seed)) for seed in range(50)}
    assert len(lines) > 25


def test_hostile_answers_of_every_kind_have_a_score():
    for kind in range(len(answers.KINDS)):
        found = answers.score_many(random.Random(kind), kind, 30)
        assert found.faults == []
        assert found.slowest.milliseconds > 0


def test_an_answer_that_breaks_a_score_is_told(monkeypatch):
    monkeypatch.setattr(answers, "score_completions", lambda *args, **kwargs: 1 / 0)
    found = answers.score_many(random.Random(0), 0, 1)
    assert len(found.faults) == 1
    assert found.faults[0].startswith("grounding, qwen2_vl: ZeroDivisionError: division by zero for ")


@pytest.mark.parametrize("kind", range(len(malformed_rows.KINDS)))
def test_damaged_rows_of_every_source_are_refused_or_used(tmp_path, kind):
    name, read = malformed_rows.read_many(random.Random(kind), kind, 40, tmp_path)
    assert read.faults == []
    assert name == malformed_rows.KINDS[kind][0]
    assert (read.num_rows, read.num_refused > 0) == (40, True)


def test_a_source_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(malformed_rows, "check", lambda *args: [][0])
    _, read = malformed_rows.read_many(random.Random(0), 0, 5, tmp_path)
    assert [fault.partition(" read for ")[2][:30] for fault in read.faults] == [
        f"{task}: IndexError: list index out of range"[:30] for task in malformed_rows.TASKS
    ]


@pytest.mark.slow
def test_an_odd_setting_ends_well_or_in_a_sentence(monkeypatch):
    monkeypatch.setattr(odd_settings, "_names", lambda *args: ["data.init_args.held_out_share"])
    monkeypatch.setattr(odd_settings, "VALUES", ("null", "0.2", "[]"))
    found = [odd_settings.try_setting(random.Random(seed)) for seed in range(3)]
    assert [fault for _, _, fault in found] == [None] * 3
    assert {status for _, status, _ in found} <= {0, 2}


def test_a_traceback_of_a_setting_is_told(monkeypatch):
    monkeypatch.setattr(odd_settings, "_names", lambda *args: ["trainer.max_steps"])
    monkeypatch.setattr(odd_settings, "perception_r1", lambda argv: 1 / 0)
    _, status, fault = odd_settings.try_setting(random.Random(0))
    assert (status, fault) == (None, "ZeroDivisionError: division by zero")


def test_a_slope_is_that_of_a_line_and_its_interval_holds_the_true_one():
    draw = np.random.default_rng(0)
    steps = np.arange(0, 5000, 10)
    noise = draw.normal(0, 1e5, len(steps))
    noise[::50] += 5e7  # a few validations
    points = [
        {"step": int(step), "resident": 0.0, "cpu_seconds": 1.0, "descriptors": 9, "threads": 3}
        | {"private": 1e9 + 700.0 * step + noise[index]}
        for index, step in enumerate(steps)
    ]
    found = soak.slopes(points)
    assert found["num_points"] == 250
    assert found["private"]["low"] < 700 < found["private"]["high"]
    assert found["private"]["slope"] == pytest.approx(700, abs=30)
    assert soak.faults(found) == []
    for point in points:
        point["private"] += 600.0 * point["step"]
        point["descriptors"] += point["step"] // 1000
    words = soak.faults(soak.slopes(points))
    assert [fault.partition(" from")[0].partition(" by")[0] for fault in words] == [
        "private memory grows",
        "descriptors grow",
    ]


def test_results_differ_by_one_bit():
    weights = {"state_dict": {"a": torch.ones(3), "b": [torch.zeros(()), float("nan")]}}
    other = {"state_dict": {"a": torch.ones(3), "b": [torch.zeros(()), float("nan")]}}
    assert results.differences(results.flat(weights), results.flat(other)) == []
    other["state_dict"]["a"][1] = 1 + torch.finfo(torch.float32).eps
    assert results.differences(results.flat(weights), results.flat(other)) == ["state_dict/a"]


def test_drafts_are_no_results(tmp_path):
    for name in ("a.png", "first.tmp/0.png", "last.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(results.files(tmp_path)) == ["a.png"]


def test_every_case_writes_its_source(tmp_path):
    assert len(malformed_sources.CASES) >= 200
    for number, (name, case) in enumerate(malformed_sources.CASES.items()):
        if name != "picture: 6,000 x 4,000":
            folder = tmp_path / str(number)
            folder.mkdir()
            assert set(case.write(folder, random.Random(0))) == {"class_path", "init_args"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["picture: CMYK JPEG", "picture: JPEG cut off", "box: NaN", "COCO: cut off"])
def test_something_malformed_is_refused_or_trained_on(tmp_path, name):
    number = list(malformed_sources.CASES).index(name)
    (tmp_path / "trial").mkdir()
    outcome = data.Data(tmp_path).trial(number, tmp_path / "trial")
    assert outcome["faults"] == []
    assert outcome["became"] == malformed_sources.CASES[name].expected != malformed_sources.EITHER


def only(monkeypatch, kind, name):
    """Let a campaign try one command alone; others are still there for those that read a run."""
    scenarios = program("campaigns.references").scenarios
    chosen = lambda *args: [each for each in scenarios(*args) if each.name == name]  # noqa: E731
    monkeypatch.setattr(program("campaigns.references"), "scenarios", chosen)


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(program("campaigns.kill"), "_WEIGHTS", (1, 0, 0, 0))
    only(monkeypatch, "kill", "convert")
    monkeypatch.setattr(program("campaigns.references").References, "reference", without_a_run)
    campaign = campaigns.CAMPAIGNS["kill"](tmp_path)
    campaign.run(range(1))
    (outcome,) = campaign.outcomes()
    assert (outcome["what"], outcome["faults"]) == ("convert", [])
    assert {each["signal"] for each in outcome["signals"]} <= {"SIGKILL"}


def without_a_run(known, scenario):
    """The reference of a command that reads no run."""
    place = known.place / "references" / scenario.name
    if not (place / "reference.json").exists():
        known._make(scenario, place)
    kept = json.loads((place / "reference.json").read_text())
    kind = program("campaigns.references").Reference
    return kind(result=kept["result"], points=[tuple(each) for each in kept["points"]], folder=place / "folder")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("mount") is None or subprocess.run(["id", "-u"], capture_output=True, text=True).stdout.strip() != "0",
    reason="mounts",
)
@pytest.mark.parametrize("kind", ["full", "read-only", "slow"])
def test_a_command_on_such_a_disk_ends_in_a_sentence_and_goes_on(tmp_path, monkeypatch, kind):
    disk = program("campaigns.disk")
    monkeypatch.setattr(disk, "KINDS", (kind,))
    monkeypatch.setattr(disk, "_COMMANDS", ("convert",))
    only(monkeypatch, "disk", "convert")
    monkeypatch.setattr(program("campaigns.references").References, "reference", without_a_run)
    (tmp_path / "trial").mkdir()
    outcome = disk.Disk(tmp_path).trial(0, tmp_path / "trial")
    assert outcome["faults"] == []
    assert bool(outcome["told"]) or kind != "read-only"


def test_the_committed_page_says_what_the_committed_summaries_say():
    page = (ROOT / "docs" / "campaigns.md").read_text(encoding="utf-8")
    assert report.filled(page, RESULTS / "campaigns") == page
    assert all(f"<!-- campaign: {name} -->" in page for name in campaigns.CAMPAIGNS)
    for path in (RESULTS / "campaigns").glob("*.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        assert (summary["campaign"], len(summary["commits"]) > 0) == (Path(path).stem, True)
