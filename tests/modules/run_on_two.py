"""Trains on two processes and writes what each of them saw and ended with; started by `test_two_processes.py`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.callbacks.online_curriculum import OnlineCurriculum
from perception_r1.callbacks.run_card import RunCard
from perception_r1.modules import GRPO, SFT
from tests.modules.test_mixture import mixed
from tests.modules.test_resampling import Rarely
from tests.modules.toy import Checkpoints, Gradients, Log, Lottery, make_data, make_module, make_trainer
from tests.modules.toy import trained_weights as weights_of


class Samples(Callback):
    """The samples of every step."""

    def __init__(self) -> None:
        self.ids: list[list[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ids.append(["/".join(filter(None, (sample.source, sample.id))) for sample in batch])


class Updating(GRPO):
    """Keeps the experience of every update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experiences: list[Any] = []

    def update(self, experience: Any, *logprobs: Any) -> Any:
        self.experiences.append(experience)
        return super().update(experience, *logprobs)


def settings(kind: str, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the module and of the trainer."""
    exact = {"max_grad_norm": 1e9, "loss_type": "dapo"}
    return {
        "grpo": ({"micro_batch_tokens": 150}, {}),
        # without KL penalty a group of equal rewards is left out: here those of the second process
        "uneven": ({"micro_batch_tokens": 150, "kl_coef": 0.0, "task": Lottery(spread=1.0 - rank)}, {}),
        "parts": (exact | {"micro_batch_tokens": None if rank else 1}, {"precision": "64-true"}),
        "whole": (exact, {"precision": "64-true"}),
        # one prompt of the two of each device is a reserve
        "reserve": ({"num_prompts": 1, "kl_coef": 0.0, "group_size": 2, "task": Rarely()}, {}),
        "mixture": ({"kl_coef": 0.0, "group_size": 2, "scale_rewards": "task", "max_new_tokens": 40}, {}),
        "sft": ({"kind": SFT, "micro_batch_tokens": 1 if rank else None}, {}),
        "sft_whole": ({"kind": SFT, "max_grad_norm": 1e9}, {"precision": "64-true"}),
    }[kind]


def train(model: str, folder: Path, kind: str) -> None:
    samples, log, gradients, curriculum = Samples(), Log(), Gradients(), OnlineCurriculum(enabled=kind == "uneven")
    trainer = make_trainer(
        folder,
        [samples, log, gradients, curriculum, Checkpoints(), LogSamples(1, 64), RunCard()],
        strategy="ddp",
        devices=2,
        limit_val_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        **settings(kind, 0)[1],
    )
    data = mixed(batch_size=2) if kind == "mixture" else None
    options = {"kind": Updating} | settings(kind, trainer.global_rank)[0] | ({"task": data.task} if data else {})
    module = make_module(Path("tiny" if data else model), **options)
    module_kind = type(module)
    trainer.fit(module, datamodule=data or make_data(module.task))
    experiences = getattr(module, "experiences", [])
    result = {
        "ids": samples.ids,
        "memory": curriculum.memory.state_dict(),
        "steps": log.steps,
        "num_parts": [len(experience.micro_batches) for experience in experiences],
        "completions": [[row.tolist() for row in experience.completions] for experience in experiences],
        "loss": log.steps[1]["train/loss"],
        "validated": float(trainer.callback_metrics["val/where/reward" if data else "val/length"])
        if module_kind is not SFT
        else 0.0,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
    torch.save((gradients.first, weights_of(module)), folder / f"rank{trainer.global_rank}.pt")


def main(model: str, out: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    for kind in kinds:
        train(model, Path(out) / kind, kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
