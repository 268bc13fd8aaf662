"""Cards of held-out samples before training and at every validation: picture, prompt, target, answer and reward."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image

from perception_r1.callbacks.files import PREDICTIONS, run_folder, save_image
from perception_r1.callbacks.kept_predictions import keep
from perception_r1.data.loading import load_sample_image
from perception_r1.drawing import contact_sheet, draw_card
from perception_r1.errors import UserError
from perception_r1.scoring import ParsedCompletion, ScoredCompletion
from perception_r1.task import Task, task_of

if TYPE_CHECKING:
    from perception_r1.modules.evaluation import EvaluationModule


class LogSamples(Callback):
    """Draw what the policy answers to the first held-out samples, always the same ones.

    Cards go to TensorBoard as `val/sample_0`, `val/sample_1`, ... and, those from before training and of the last
    validation, as PNG files to `samples/first` and `samples/last` in the run's folder, and side by side to
    `samples/sheet.png`. The answers themselves stay in `predictions/val`, see `kept_predictions.py`.

    Args:
        num_samples: Samples to draw; 0 draws nothing.
        panel_width: Width of the picture on a card in pixels; the words beside it get as much.
    """

    def __init__(self, num_samples: int = 8, panel_width: int = 448) -> None:
        if num_samples < 0 or panel_width < 64:
            raise UserError(
                f"num_samples is {num_samples} and panel_width {panel_width}; use at least 0 and 64 pixels."
            )
        self.num_samples, self.panel_width = num_samples, panel_width
        self._scored_completions: list[ScoredCompletion] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the untrained policy answers, unless this run goes on from a checkpoint."""
        folder, datamodule = run_folder(trainer), getattr(trainer, "datamodule", None)
        if trainer.ckpt_path is not None or datamodule is None or not self.num_samples:
            return
        module, strategy = cast("EvaluationModule", pl_module), trainer.strategy
        for batch in datamodule.val_dataloader() if is_overridden("val_dataloader", datamodule) else ():
            batch = datamodule.transfer_batch_to_device(batch, module.device, 0)
            num_missing = self.num_samples - len(self._scored_completions) if trainer.is_global_zero else 0
            chosen = batch.select(range(min(len(batch), num_missing)))
            with trainer.precision_plugin.val_step_context(), torch.no_grad():  # on all devices: each may have a share
                self._scored_completions += module.score_greedy(chosen)
            if strategy.broadcast(len(self._scored_completions) >= self.num_samples):
                break
        if trainer.is_global_zero:
            self._log(trainer, module, folder, "before")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the completions of the validation before."""
        self._scored_completions = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the first completions."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._scored_completions += (outputs or [])[: self.num_samples - len(self._scored_completions)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, log and save the cards."""
        folder = run_folder(trainer)
        if self._scored_completions:
            self._log(trainer, cast("EvaluationModule", pl_module), folder, "after")

    def _log(self, trainer: Trainer, module: "EvaluationModule", folder: Path | None, when: str) -> None:
        cards = [
            sample_card(
                task_of(module.task, scored.sample), scored, step=trainer.global_step, panel_width=self.panel_width
            )
            for scored in self._scored_completions
        ]
        answers, self._scored_completions = self._scored_completions, []
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for index, card in enumerate(cards):
                    step = max(0, trainer.fit_loop.total_batch_idx)  # that of the metrics of this validation
                    logger.experiment.add_image(f"val/sample_{index}", np.asarray(card), step, dataformats="HWC")
                logger.save()  # what is not written is lost in a kill, and not made again after the checkpoint
        if folder is not None:
            _save(cards, folder / "samples")
            keep(folder / PREDICTIONS / "val", when, module.task, answers)


def sample_card(
    task: Task[Any, Any], scored: ScoredCompletion, *, step: int | None, panel_width: int = 448
) -> Image.Image:
    """The card of one completion, written after so many steps of training (None: that is not of interest)."""
    sample = load_sample_image(scored.sample)
    return draw_card(
        sample.image,
        title=sample.id if step is None else f"{sample.id}, step {step}",
        fields={
            "prompt": task.prompt(sample.query),
            "target": task.describe(sample.target),
            **answer_fields(task, scored),
            "reward": _reward(scored),
        },
        target_overlays=task.overlays(sample.target),
        predicted_overlays=[] if scored.prediction is None else task.overlays(scored.prediction),
        panel_width=panel_width,
    )


def answer_fields(task: Task[Any, Any], parsed: ParsedCompletion) -> dict[str, str]:
    """The fields of a card that say what was answered: as it was read, unless the text says just that, and as text."""
    prediction = parsed.prediction
    words = "no answer could be read" if prediction is None else task.describe(prediction)
    cut = f"\n[cut off after {parsed.num_tokens} tokens]" if parsed.is_truncated else ""
    fields = {} if words in parsed.completion else {"prediction": words}
    return fields | {"completion": parsed.completion + cut}


def _reward(scored: ScoredCompletion) -> str:
    components = ", ".join(f"{name} {value:.2f}" for name, value in scored.score.components.items())
    return f"{scored.score.reward:.3f}" + (f"\n{components}" if components else "")


def _save(cards: Sequence[Image.Image], folder: Path) -> None:
    """Write the last cards, the first ones too where there are none yet, and a sheet with a row for each sample."""
    first = folder / "first"
    if not first.exists():
        draft = folder / "first.tmp"
        _write(cards, draft)
        draft.rename(first)  # a kill leaves all of them or none
    _write(cards, folder / "last")
    pairs = [(first / f"{index}.png", card) for index, card in enumerate(cards)]
    sheet = contact_sheet([each for path, card in pairs if path.exists() for each in (Image.open(path), card)])
    save_image(sheet, folder / "sheet.png")


def _write(cards: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, card in enumerate(cards):
        save_image(card, folder / f"{index}.png")
