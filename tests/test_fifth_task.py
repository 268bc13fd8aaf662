"""A fifth task is one short Python file and one YAML file: those of the documentation, as they stand there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from perception_r1.cli import main
from perception_r1.tasks.grounding import GroundingPrediction, GroundingTarget
from tests.readme import ROOT, commands, file_blocks
from tests.test_readme import SMALL, expanded

PAGE = "docs/own-task.md"
FILES = file_blocks(PAGE)
SOURCE, CONFIG = "src/perception_r1/tasks/colour.py", "configs/task/colour.yaml"
REWARD = "strict_grounding.py"
RUN_ALL = """
import json, sys
from perception_r1.cli import main
for arguments in json.loads(sys.argv[1]):
    if status := main(arguments):
        sys.exit(status)
"""
"""Runs several command lines in one process, whose start is most of the time."""


def test_a_task_is_a_python_file_of_at_most_60_lines_and_a_yaml_file() -> None:
    assert set(FILES) == {SOURCE, CONFIG, REWARD}
    assert len(FILES[SOURCE].splitlines()) <= 60


@pytest.mark.slow
def test_two_files_in_the_project_make_a_task(tmp_path: Path) -> None:
    """In a copy of the project, so that the files can lie where the documentation puts them."""
    for folder in ("src", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in (SOURCE, CONFIG):
        (tmp_path / path).write_text(FILES[path], encoding="utf-8")
    write_rows(tmp_path / "shapes.jsonl")
    (tmp_path / "answers.jsonl").write_text(
        '{"width": 8, "height": 8, "shape": "circle", "colour": "red", "completion": "red<|im_end|>"}\n'
        '{"width": 8, "height": 8, "shape": "circle", "colour": "red", "completion": "blue"}\n',
        encoding="utf-8",
    )
    trainings = [found[1:] for command in commands(PAGE) for found in expanded(command) if "fit" in found]
    lines = [
        *([*training, *SMALL] for training in trainings),
        ["validate", *trainings[0][1:], *SMALL, "--ckpt_path", "best"],
        ["score", "--task", "colour", "--codec", "qwen2_vl", "answers.jsonl"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(lines)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("logs/colour/*/run.json"))]
    assert [(card["status"], card["steps"]) for card in cards] == [("finished", 2)] * 2
    assert {"reward", "match", "accuracy"} <= {name.removeprefix("reward/") for name in cards[0]["after"]}
    assert [json.loads(line)["reward"] for line in done.stdout.splitlines() if line.startswith("{")] == [1.0, 0.0]


def test_a_task_that_is_there_gets_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / REWARD).write_text(FILES[REWARD], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["--data.task", "strict_grounding.StrictGrounding", "--task", "grounding", *SMALL]
    try:
        assert main(["fit", *options]) == 0
        task = sys.modules["strict_grounding"].StrictGrounding()
    finally:
        sys.modules.pop("strict_grounding", None)
    target = GroundingTarget(box=(0.0, 0.0, 0.5, 0.5))
    for width, reward in ((0.5, 1.0), (0.4, 1.0), (0.3, 0.0)):
        found = GroundingPrediction(boxes=((0.0, 0.0, width, 0.5),), label="cup", is_well_formed=True)
        assert task.score(found, target).reward == reward
    card = json.loads((tmp_path / "logs/grounding/version_0/run.json").read_text(encoding="utf-8"))
    assert card["steps"] == 2


def test_the_files_may_lie_outside_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "colour.py").write_text(FILES[SOURCE], encoding="utf-8")
    (tmp_path / CONFIG).parent.mkdir(parents=True)
    config = FILES[CONFIG].replace("ColourData", "colour.ColourData")
    (tmp_path / CONFIG).write_text(config, encoding="utf-8")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["perception-r1"])
    options = [*SMALL, "--data", "rows.jsonl"]
    try:
        assert main(["fit", "--task", "colour", *options]) == 0
    finally:
        sys.modules.pop("colour", None)
    card = json.loads((tmp_path / "logs/colour/version_0/run.json").read_text(encoding="utf-8"))
    assert (card["status"], card["steps"]) == ("finished", 2)


def write_rows(path: Path) -> None:
    """A data file of the task, with its images."""
    for index in range(6):
        Image.new("RGB", (56, 56), (40 * index, 0, 0)).save(path.parent / f"{index}.png")
    rows = [{"image": f"{index}.png", "shape": "circle", "colour": "red"} for index in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
