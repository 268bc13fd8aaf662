"""Metrics before and after training, and what is said at the end."""

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from perception_r1.callbacks.before_after import BeforeAfter, before_after_table
from perception_r1.callbacks.files import read_card
from perception_r1.callbacks.run_card import RunCard
from tests.callbacks.toy import ToyData, ToyModule, toy_trainer


def test_the_policy_is_evaluated_before_and_after(tmp_path: Path, console: Console):
    callback, module = BeforeAfter(), ToyModule()
    toy_trainer(tmp_path, [callback]).fit(module, datamodule=ToyData())
    assert callback.before == {"errors": 1.0, "accuracy": 0.0}
    assert callback.after == {"errors": 0.0, "accuracy": 1.0}
    assert module.num_evaluated == [6, 6]
    assert list(callback.margins["after"]) == ["reward", "reward/format", "accuracy"]
    text = console.file.getvalue()
    assert "before training: 3 batches" in text
    assert "+1.0000" in text
    assert f"tensorboard --logdir {tmp_path / 'run'}\n" in text  # on one line, however long


def test_the_primary_metric_comes_first_and_bold():
    table = before_after_table(
        {"errors": 1.0, "accuracy": 0.25}, {"errors": 1.5, "accuracy": 0.5}, primary_metrics={"accuracy"}
    )
    console = Console(width=80, force_terminal=True)
    with console.capture() as capture:
        console.print(table)
    first, second = [line for line in capture.get().splitlines() if "accuracy" in line or "errors" in line]
    assert all(value in first for value in ("accuracy", "0.2500", "0.5000", "+0.2500"))
    assert all(value in second for value in ("errors", "1.0000", "1.5000", "+0.5000"))
    assert "\x1b[1m" in first
    assert "\x1b[1m" not in second


@pytest.mark.parametrize(
    ("before", "after", "num_dashes"),
    [({}, 0.5, 2), ({"accuracy": math.nan}, 0.5, 2), ({"accuracy": math.nan}, math.nan, 3)],
)
def test_metrics_that_are_not_known_or_not_defined_are_dashes(before: dict[str, float], after: float, num_dashes: int):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(before_after_table(before, {"accuracy": after}, primary_metrics={"accuracy"}))
    row = next(line for line in capture.get().splitlines() if "accuracy" in line)
    assert row.count("-") == num_dashes
    assert "nan" not in row


def test_a_resumed_run_keeps_the_metrics_from_before(tmp_path: Path, console: Console):
    checkpoint = ModelCheckpoint(tmp_path / "run" / "checkpoints", save_last=True)
    toy_trainer(tmp_path, [BeforeAfter(), checkpoint], enable_checkpointing=True, max_steps=2).fit(
        ToyModule(), datamodule=ToyData()
    )
    callback, module = BeforeAfter(), ToyModule()
    toy_trainer(tmp_path, [callback], max_epochs=-1, max_steps=4).fit(
        module, datamodule=ToyData(), ckpt_path=tmp_path / "run/checkpoints/last.ckpt", weights_only=False
    )
    assert callback.before == {"errors": 1.0, "accuracy": 0.0}
    assert list(callback.margins["before"]) == ["reward", "reward/format", "accuracy"]
    assert module.num_evaluated == [6]
    assert str(tmp_path / "run" / "checkpoints") in console.file.getvalue()


def test_a_run_that_was_killed_in_its_last_evaluation_does_it_when_it_goes_on(tmp_path: Path, console: Console):
    class Killed(ToyModule):
        def on_test_start(self) -> None:
            if self.global_step:
                raise RuntimeError("killed")
            super().on_test_start()

    checkpoint = ModelCheckpoint(tmp_path / "run" / "checkpoints", save_last=True, every_n_train_steps=4)
    length: Any = {"max_epochs": -1, "max_steps": 4}
    with pytest.raises(RuntimeError, match="killed"):
        toy_trainer(tmp_path, [BeforeAfter(), RunCard(), checkpoint], enable_checkpointing=True, **length).fit(
            Killed(), datamodule=ToyData()
        )
    options: Any = {"ckpt_path": tmp_path / "run/checkpoints/last.ckpt", "weights_only": False}
    for expected in ([6], []):  # once more it has all that it needs
        module = ToyModule()
        toy_trainer(tmp_path, [BeforeAfter(), RunCard()], **length).fit(module, datamodule=ToyData(), **options)
        assert module.num_evaluated == expected
        card = read_card(tmp_path / "run")
        assert (card["status"], card["steps"]) == ("finished", 4)
        assert (card["before"]["accuracy"], card["after"]["accuracy"]) == (0.0, 1.0)


def test_limit_test_batches_holds(tmp_path: Path, console: Console):
    for limit, expected in ((1, 2), (0.67, 4), (1.0, 6)):
        module = ToyModule()
        toy_trainer(tmp_path, [BeforeAfter()], limit_test_batches=limit).fit(module, datamodule=ToyData())
        assert module.num_evaluated == [expected, expected]
    module = ToyModule()
    toy_trainer(tmp_path, [BeforeAfter()], limit_test_batches=0).fit(module, datamodule=ToyData())
    assert module.num_evaluated == []


def test_nothing_is_evaluated_when_switched_off_or_without_test_data(tmp_path: Path, console: Console):
    class NoTest(LightningDataModule):
        def train_dataloader(self):
            return ToyData().train_dataloader()

        transfer_batch_to_device = ToyData.transfer_batch_to_device

    for callback, data in ((BeforeAfter(enabled=False), ToyData()), (BeforeAfter(), NoTest())):
        module = ToyModule()
        toy_trainer(tmp_path, [callback], limit_val_batches=0, val_check_interval=1.0).fit(module, datamodule=data)
        assert module.num_evaluated == []
        assert callback.after == {}
    assert "metric" not in console.file.getvalue()
    assert "tensorboard" in console.file.getvalue()


def test_a_failed_run_shows_no_table(tmp_path: Path, console: Console):
    with pytest.raises(RuntimeError):
        toy_trainer(tmp_path, [BeforeAfter()]).fit(ToyModule(fail_at=1), datamodule=ToyData())
    assert "metric" not in console.file.getvalue()
