"""The lines of predictions.jsonl."""

import json
from pathlib import Path

import pytest

from perception_r1.callbacks.predictions import Predictions, join_parts, outcome_line
from tests.callbacks.toy import ToyData, ToyModule, ToyTask, toy_outcome, toy_samples, toy_trainer


def test_predict_writes_one_line_per_sample_and_no_parts(tmp_path: Path):
    toy_trainer(tmp_path, [Predictions()]).predict(ToyModule(), datamodule=ToyData())
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"toy-{index}" for index in range(6)]
    assert [path.name for path in (tmp_path / "run").glob("predictions*")] == ["predictions.jsonl"]
    assert json.loads(lines[0]) == {
        "id": "toy-0",
        "query": "thing",
        "completion": "there",
        "prediction": None,
        "reward": 0.0,
        "terms": {"format": 0.0},
        "figures": {"accuracy": 0.0},
        "num_tokens": 5,
        "is_truncated": False,
    }


@pytest.mark.parametrize("completion", ["two\nlines", "\u2028\x85\x00", "\ud800", "中文"])
def test_no_completion_breaks_its_line(completion: str):
    line = outcome_line(ToyTask(), toy_outcome(toy_samples(1)[0], completion))
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert json.loads(line)["completion"] == completion


def test_parts_are_joined_batch_by_batch_in_turn(tmp_path: Path):
    parts = [tmp_path / "0", tmp_path / "1"]
    parts[0].write_text("a\nb\n\ne\n\n")
    parts[1].write_text("c\nd\n\n")
    join_parts(parts, tmp_path / "joined")
    assert (tmp_path / "joined").read_text() == "a\nb\nc\nd\ne\n"
    assert not parts[0].exists()


def test_a_failure_leaves_the_part_with_what_was_predicted(tmp_path: Path):
    class Breaks(ToyModule):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("The toy broke.")
            return self.answer(batch)

    with pytest.raises(RuntimeError, match="The toy broke"):
        toy_trainer(tmp_path, [Predictions()]).predict(Breaks(), datamodule=ToyData())
    part = (tmp_path / "run" / "predictions.rank0.jsonl").read_text()
    assert [json.loads(line)["id"] for line in part.split("\n") if line] == ["toy-0", "toy-1", "toy-2", "toy-3"]
