"""What run.json says of runs that finish, fail and are stopped."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

import perception_r1
from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.run_card import RunCard
from tests.callbacks.toy import ToyData, ToyModule, toy_trainer


def read_card(folder: Path) -> dict[str, Any]:
    assert not list((folder / "run").glob("*.tmp"))
    return json.loads((folder / "run" / "run.json").read_text())


def test_a_finished_run_is_told_in_full(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["perception-r1", "fit", "--data.batch_size", "2"])
    seed_everything(17)
    toy_trainer(tmp_path, [BeforeAfter(), RunCard()]).fit(ToyModule(), datamodule=ToyData())
    card = read_card(tmp_path)
    assert card["status"] == "finished"
    assert card["command"] == ["perception-r1", "fit", "--data.batch_size", "2"]
    assert card["versions"]["torch"] == torch.__version__
    assert card["versions"]["perception_r1"] == perception_r1.__version__
    assert card["hardware"]["cores"] > 0
    assert card["seeds"]["everything"] == 17
    assert card["task"] == {"class_path": "ToyTask"}
    assert card["data"] == {"fingerprint": "abc123", "splits": {"train": {"num_samples": 8}}}
    assert card["policy"] == {"num_parameters": 3}
    assert card["trainer"]["strategy"] == "SingleDeviceStrategy"
    assert card["steps"] == 4
    assert card["num_skipped_steps"] == 1
    assert card["phase_seconds"] == {"rollout": 1.5}
    assert card["validation_share"] == 0.25
    assert (card["before"]["accuracy"], card["after"]["accuracy"]) == (0.0, 1.0)
    assert card["margins_of_error"]["after"]["accuracy"] is None  # all samples have the same
    start, end = (datetime.fromisoformat(card[key]) for key in ("start", "end"))
    assert start.utcoffset() == timedelta(0)
    assert start <= end
    assert card["seconds"] > 0


def test_the_card_is_there_from_the_start(tmp_path: Path):
    class Peek(ToyModule):
        def on_train_start(self) -> None:
            assert read_card(tmp_path)["status"] == "running"

    toy_trainer(tmp_path, [RunCard()]).fit(Peek(), datamodule=ToyData())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("The toy broke.\nBadly."), "failed: RuntimeError: The toy broke."),
        (ValueError(), "failed: ValueError"),
        (SIGTERMException(), "stopped by SIGTERM"),
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
    ],
)
def test_a_run_that_breaks_off_says_why(error: BaseException, status: str, tmp_path: Path):
    with pytest.raises((type(error), SystemExit)):
        toy_trainer(tmp_path, [RunCard()]).fit(ToyModule(fail_at=2, error=error), datamodule=ToyData())
    card = read_card(tmp_path)
    assert card["status"] == status
    assert card["steps"] == 2
    assert card["after"] == {}


def test_a_checkpoint_keeps_the_seconds_until_then(tmp_path: Path):
    class Save(ToyModule):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / "now.ckpt")
            card = read_card(tmp_path)
            assert card["status"] == "running"
            seconds.append(card["seconds"])

    seconds: list[float] = []
    toy_trainer(tmp_path, [RunCard()]).fit(Save(), datamodule=ToyData())
    assert 0 < seconds[0] < seconds[-1] <= read_card(tmp_path)["seconds"]


def test_only_fits_have_a_card(tmp_path: Path):
    toy_trainer(tmp_path, [RunCard()]).validate(ToyModule(), datamodule=ToyData(), verbose=False)
    assert not list(tmp_path.rglob("run.json"))
