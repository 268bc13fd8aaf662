"""`perception-r1 report` on the command line, and on a run that a training has left."""

import json
import re
import subprocess
import sys

import pytest

from perception_r1.cli import main
from perception_r1.reporting.document import MARK
from tests.reporting.runs import make_evaluation, make_run


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_page_is_written_and_written_again(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_evaluation(tmp_path / "eval-1")
    assert main(["report", "a", "eval-1"]) == 0
    assert re.fullmatch(r"Wrote report\.html \(0\.1 MB\): open it in a browser\.\n", capsys.readouterr().err)
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    assert main(["report", "a", "--num_cards", "1"]) == 0
    second = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert MARK in second
    assert len(second) < len(first)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "eval-1", "report.html"}


def test_reading_a_run_changes_nothing_in_it(tmp_path):
    folder = make_run(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["report", "a"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "runs"),
        (["nowhere"], "nowhere is no run, which has a run.json, and no evaluation, which has a metrics.json"),
        (["a", "empty"], "empty is no run"),
        (["damaged"], "run.json cannot be read (JSONDecodeError"),
        (["a"] * 9, "9 runs are too many for one page: give at most 8"),
        (["a", "--num_cards", "-1"], "--num_cards is -1; it must be 0 or more"),
        (["a", "--output", "a/run.json"], "--output a/run.json exists and is no report"),
        (["a", "--output", "empty"], "--output empty exists and is no report"),
        (["a", "--output", "none/report.html"], "--output none/report.html cannot be written: No such file"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_lost(argv, words, tmp_path, capsys):
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "damaged") / "run.json").write_text("{")
    card = (tmp_path / "a" / "run.json").read_bytes()
    assert main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("perception-r1 report: error: ")
    assert words in error
    assert error.count("\n") == 1
    assert (tmp_path / "a" / "run.json").read_bytes() == card
    assert not (tmp_path / "report.html").exists()


def test_a_run_of_a_training_is_told(runs, tmp_path):
    assert main(["report", str(runs["full"]), str(runs["lora"])]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    tags = [chart["tag"] for group in data["curves"] for chart in group["charts"]]
    assert {"train/loss", "train/lr", "val/reward"} <= set(tags)
    assert [(column["run"], column["when"]) for column in data["columns"]] == [
        (run, when) for run in (0, 1) for when in ("before", "after")
    ]
    assert len(data["cards"]) == 2
    assert all(card["image"] is not None for card in data["cards"])
    assert "SFT · grounding" in page
    assert "<mark>model.policy.lora.r</mark>" in page


def test_it_starts_without_the_trainer(tmp_path):
    make_run(tmp_path / "a")
    words = ["-X", "importtime", "-m", "perception_r1", "report", "a"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert re.search(r"\bperception_r1\.reporting\.document\b", done.stderr)
    assert not re.search(r"\| +lightning$", done.stderr, re.MULTILINE)
