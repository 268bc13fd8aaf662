"""A real module, data module and trainer with a reward that differs from text to text: something to learn."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.data.loading import Batch
from perception_r1.modules import GRPO
from perception_r1.modules.base import LRSchedulerConfig, PolicyModule
from perception_r1.policy.load import PolicyConfig
from perception_r1.records import ImageSize, Sample, Score
from perception_r1.scoring import ScoredCompletion
from perception_r1.tasks.grounding import Grounding, GroundingData


@dataclass(frozen=True, kw_only=True)
class Lottery(Grounding):
    """Grounding that pays by lot: every text has its own reward, which random text never has in the real task."""

    spread: float = 1.0

    name = "lottery"
    component_names = ("luck",)
    metric_names = ("length",)
    primary_metric = "reward/luck"

    def parse_answer(self, text: str, codec: Any, image_size: Any) -> Any:
        return text

    def score(self, prediction: Any, target: Any) -> Score:
        luck = zlib.crc32(prediction.encode()) % 1000 / 999
        return Score(reward=self.spread * luck, components={"luck": luck}, metrics={"length": float(len(prediction))})

    def overlays(self, score_greedy: Any) -> Sequence[Any]:
        return []

    def serialize_prediction(self, prediction: Any, image_size: Any) -> Any:
        return prediction


def make_data(task: Any = None, **options: Any) -> GroundingData:
    defaults = {"num_train": 40, "num_val": 4, "num_test": 4, "batch_size": 2, "eval_batch_size": 2}
    return GroundingData(task or Lottery(), **(defaults | options))


def make_module(
    folder: Path,
    kind: type = GRPO,
    *,
    task: Any = None,
    policy: dict | None = None,
    decay: str = "linear",
    **options: Any,
) -> Any:
    defaults: dict[str, Any] = {"max_new_tokens": 6}
    if issubclass(kind, GRPO):
        defaults |= {"group_size": 4, "kl_coef": 0.1}
    return kind(
        task or Lottery(),
        policy=PolicyConfig(name=str(folder), **(policy or {})),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
        lr_scheduler=LRSchedulerConfig(warmup_steps=2, type=decay),
        **(defaults | options),
    )


def make_trainer(folder: Path, callbacks: Sequence[Callback] = (), *, version: int = 0, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "max_epochs": -1,
        "logger": CSVLogger(folder, name="", version=version),
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(callback, Checkpoints) for callback in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


class Log(Callback):
    """What was logged in each step, without times."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps[trainer.global_step] = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not any(word in name for word in ("seconds", "per_second", "memory"))
        }


def fit(folder: Path, tmp_path: Path, module: Any = None, callbacks: Sequence[Callback] = (), **options: Any) -> Any:
    """A short run; returns its module and its trainer."""
    ckpt_path, data = options.pop("ckpt_path", None), options.pop("data", None)
    module = module or make_module(folder)
    trainer = make_trainer(tmp_path, callbacks, **options)
    trainer.fit(module, datamodule=data or make_data(module.task), ckpt_path=ckpt_path)
    return module, trainer


def trained_weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.policy.named_parameters() if value.requires_grad}


class Gradients(Callback):
    """The gradients with which the first update is made, after clipping."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self.first:
            named = pl_module.named_parameters()
            self.first = {name: value.grad.detach().clone() for name, value in named if value.grad is not None}


class Quick(PolicyModule):
    """A policy of two weights, with all that the real trainings share; a fit takes some 50 ms."""

    def __init__(self) -> None:
        super().__init__(
            Lottery(),
            policy=PolicyConfig(),
            optimizer=partial(torch.optim.AdamW, lr=0.1),
            lr_scheduler=LRSchedulerConfig(warmup_steps=2),
            max_new_tokens=1,
            max_grad_norm=1.0,
            micro_batch_tokens=None,
            eval_batch_tokens=None,
            seed=0,
        )

    def configure_model(self) -> None:
        self.policy = torch.nn.Linear(1, 1)
        with torch.no_grad():
            self.policy.weight.fill_(0.5)
            self.policy.bias.fill_(0.25)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        numbers = torch.tensor([[float(sample.id)] for sample in batch])
        for _ in range(self.updates_per_batch):
            loss = (self.policy(numbers) - numbers.sin()).square().mean()
            self.manual_backward(loss)
            metrics = self.apply_gradients(float(loss.detach()))
        self.log_train(metrics | {"loss": loss.detach()})

    def score_greedy(self, samples: Batch) -> list[ScoredCompletion]:
        value = float(self.policy.weight.sum() * 3 + self.policy.bias.sum())
        score = Score(reward=value, components={"luck": math.sin(9 * value)}, metrics={"length": value})
        image_size = ImageSize(width=8, height=8, resized_width=8, resized_height=8)
        return [
            ScoredCompletion(sample=sample, image_size=image_size, completion=f"{value}", prediction=None, score=score)
            for sample in samples
        ]


class TwoUpdates(Quick):
    """Two updates of each batch."""

    @property
    def updates_per_batch(self) -> int:
        return 2


class Numbers(GroundingData):
    """Samples that need no drawing."""

    def setup(self, stage: str | None = None) -> None:
        image = Image.new("RGB", (8, 8))
        samples = [Sample(id=str(i), image=image, width=8, height=8, query="", target=(0, 0, 1, 1)) for i in range(8)]
        self._samples = {split: samples[: self.num_scenes[split]] for split in ("train", "val")}
