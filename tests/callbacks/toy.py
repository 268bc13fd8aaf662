"""A toy task, module and data: enough of the real ones for a callback to see."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from perception_r1.data.loading import Batch
from perception_r1.metrics import MeanScore, update_metrics
from perception_r1.records import Box, ImageSize, Overlay, Sample, Score
from perception_r1.scoring import ScoredCompletion
from perception_r1.task import Task

FRAME = ImageSize(width=64, height=48, resized_width=64, resized_height=48)


@dataclass(frozen=True, kw_only=True)
class ToyTask(Task[Box, Box]):
    prompt_template: str = "Where is the {query}?"
    name: ClassVar[str] = "toy"
    component_names: ClassVar[tuple[str, ...]] = ("format",)
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy",)
    primary_metric: ClassVar[str] = "accuracy"
    row_keys: ClassVar[tuple[str, ...]] = ()

    def read_row(self, row: Any) -> tuple[str, Box]:
        raise NotImplementedError

    def format_target(self, sample: Sample[Box], codec: Any, image_size: ImageSize) -> str:
        return json.dumps(sample.target)

    def parse_answer(self, text: str, codec: Any, image_size: ImageSize) -> Box | None:
        return None

    def score(self, prediction: Box | None, target: Box) -> Score:
        value = float(prediction == target)
        return Score(reward=value, components={"format": value}, metrics={"accuracy": value})

    def overlays(self, answer: Box) -> Sequence[Overlay]:
        return [Overlay(shape=answer, caption="thing")]

    def serialize_prediction(self, prediction: Box | None, image_size: ImageSize) -> Any:
        return None if prediction is None else list(prediction)


def toy_samples(count: int) -> list[Sample[Box]]:
    image = Image.new("RGB", (64, 48), (200, 200, 200))
    return [
        Sample(id=f"toy-{index}", image=image, width=64, height=48, query="thing", target=(0.25, 0.25, 0.75, 0.75))
        for index in range(count)
    ]


def toy_scored(sample: Sample[Box], completion: str = "there", *, is_right: bool = True) -> ScoredCompletion:
    prediction = sample.target if is_right else None
    return ScoredCompletion(
        sample=sample,
        image_size=FRAME,
        completion=completion,
        prediction=prediction,
        score=ToyTask().score(prediction, sample.target),
        num_tokens=len(completion),
    )


class ToyData(LightningDataModule):
    """Batches of two samples, wrapped and unwrapped as the real ones are."""

    def _loader(self, num_batches: int) -> DataLoader[Any]:
        return DataLoader(toy_samples(2 * num_batches), batch_size=2, collate_fn=Batch)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(4)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(3)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(3)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(3)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch

    def fingerprint(self) -> str:
        return "abc123"

    def describe(self) -> dict[str, Any]:
        return {"train": {"num_samples": 8}}


class ToyModule(LightningModule):
    """Learns nothing, logs what the real ones log; it is right after the first training step."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        self.task = ToyTask()
        self.layer = torch.nn.Linear(2, 1)
        self.layer.bias.requires_grad_(False)
        self.phase_seconds, self.validation_share = {"rollout": 1.5}, 0.25
        self.num_skipped_steps = 1
        self.fail_at = fail_at
        self.error = error or RuntimeError("The toy broke.\nBadly.")
        self.num_evaluated: list[int] = []
        self.primary_test_metrics = ["test/accuracy"]
        self.test_metrics = [MetricCollection({"scores": MeanScore(self.task)}, prefix="test/")]

    def describe(self) -> dict[str, Any]:
        return {"task": {"class_path": "ToyTask"}, "policy": {"num_parameters": 3}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.layer.weight], lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise self.error
        self.log_dict({"train/reward": self.global_step + 0.5, "train/kl": 0.01, "train/reward/format": 1.0})
        return self.layer(torch.ones(1, 2)).sum()

    def score_greedy(self, batch: Batch) -> list[ScoredCompletion]:
        return [toy_scored(sample, is_right=self.global_step > 0) for sample in batch]

    def validation_step(self, batch: Any, batch_idx: int) -> list[ScoredCompletion]:
        return self.score_greedy(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[ScoredCompletion]:
        scored_completions = self.score_greedy(batch)
        self.tested += scored_completions
        update_metrics(self.test_metrics[0], scored_completions)
        return scored_completions

    def predict_step(self, batch: Any, batch_idx: int) -> list[ScoredCompletion]:
        return self.score_greedy(batch)

    def on_test_start(self) -> None:
        self.tested: list[ScoredCompletion] = []
        self.test_metrics[0].reset()

    def test_results(self) -> dict[str, float]:
        self.num_evaluated.append(len(self.tested))
        accuracy = sum(scored.score.metrics["accuracy"] for scored in self.tested) / len(self.tested)
        return {"test/errors": 1.0 - accuracy, "test/accuracy": accuracy}


def toy_trainer(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """A quick trainer on the CPU that logs to TensorBoard in `folder/run`."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": TensorBoardLogger(folder, name="", version="run"),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 1,
        "val_check_interval": 2,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(hasattr(callback, "get_metrics") for callback in callbacks),
    }
    return Trainer(callbacks=callbacks, **(defaults | options))
