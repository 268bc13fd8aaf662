"""Trains on two processes and writes what each of them saw and ended with; started by `test_two_processes.py`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from perception_r1.modules import SFT
from tests.modules.toy import Checkpoints, Log, Lottery, make_data, make_module, make_trainer, trained_weights


class Samples(Callback):
    """The samples of every step."""

    def __init__(self) -> None:
        self.ids: list[list[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ids.append([sample.id for sample in batch])


def main(model: str, out: str, kind: str) -> None:
    torch.set_num_threads(1)
    samples, log = Samples(), Log()
    folder = Path(out)
    trainer = make_trainer(
        folder,
        [samples, log, Checkpoints()],
        strategy="ddp",
        devices=2,
        limit_val_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    options: dict[str, Any] = {"kind": SFT} if kind == "sft" else {"micro_batch_tokens": 150}
    if kind == "uneven":  # without KL penalty a group of equal rewards is left out: here those of the second process
        options |= {"kl_coef": 0.0, "task": Lottery(spread=0.0 if trainer.global_rank else 1.0)}
    module = make_module(Path(model), **options)
    trainer.fit(module, datamodule=make_data(module.task))
    weights = torch.cat([value.flatten().double() for value in trained_weights(module).values()])
    result = {
        "ids": samples.ids,
        "steps": log.steps,
        "weights": [float(weights.sum()), float(weights.abs().sum())],
        "validated": float(trainer.callback_metrics["val/length"]) if kind != "sft" else 0.0,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
