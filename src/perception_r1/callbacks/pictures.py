"""Cards of held-out samples at every validation: picture, prompt, target, completion and reward."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from perception_r1.callbacks.files import run_folder
from perception_r1.drawing import contact_sheet, draw_card
from perception_r1.errors import UserError
from perception_r1.records import Mark
from perception_r1.scoring import Outcome
from perception_r1.task import Task

if TYPE_CHECKING:
    from perception_r1.modules.base import PolicyModule


class Pictures(Callback):
    """Draw what the policy answers to the first held-out samples, always the same ones.

    Cards go to TensorBoard as `val/picture_0`, `val/picture_1`, ... and, those of the first and of the last validation,
    as PNG files to `pictures/first` and `pictures/last` in the run's folder, with all of them on `sheet.png`.

    Args:
        num_pictures: Samples to draw; 0 draws nothing.
        panel_width: Width of the picture on a card in pixels; the words beside it get as much.
    """

    def __init__(self, num_pictures: int = 8, panel_width: int = 448) -> None:
        if num_pictures < 0 or panel_width < 64:
            raise UserError(
                f"num_pictures is {num_pictures} and panel_width {panel_width}; use at least 0 and 64 pixels."
            )
        self.num_pictures = num_pictures
        self.panel_width = panel_width
        self._outcomes: list[Outcome] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the outcomes of the validation before."""
        self._outcomes = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first outcomes."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._outcomes += (outputs or [])[: self.num_pictures - len(self._outcomes)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, log and save the cards."""
        folder = run_folder(trainer)
        if not self._outcomes:
            return
        task = cast("PolicyModule", pl_module).task
        cards = [
            outcome_card(task, outcome, step=trainer.global_step, panel_width=self.panel_width)
            for outcome in self._outcomes
        ]
        self._outcomes = []
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for index, card in enumerate(cards):
                    logger.experiment.add_image(
                        f"val/picture_{index}", np.asarray(card), trainer.global_step, dataformats="HWC"
                    )
        if folder is not None:
            if not (folder / "pictures" / "first").exists():
                _save(cards, folder / "pictures" / "first")
            _save(cards, folder / "pictures" / "last")


def outcome_card(task: Task[Any, Any], outcome: Outcome, *, step: int | None, panel_width: int = 448) -> Image.Image:
    """The card of one completion, written after so many steps of training (None: that is not of interest).

    Raises:
        TypeError: The sample's image is not loaded.
    """
    sample = outcome.sample
    if not isinstance(sample.image, Image.Image):
        raise TypeError(f"The image of sample {sample.id} is still a path; load it before it is drawn.")
    target_marks = task.marks(sample.target)
    return draw_card(
        sample.image,
        title=sample.id if step is None else f"{sample.id}, step {step}",
        fields={
            "prompt": task.prompt(sample.query),
            "target": summarise(sample.target, target_marks),
            "completion": outcome.completion + _remarks(outcome),
            "reward": _reward(outcome),
        },
        target_marks=target_marks,
        predicted_marks=[] if outcome.prediction is None else task.marks(outcome.prediction),
        panel_width=panel_width,
    )


def summarise(target: object, marks: Sequence[Mark]) -> str:
    """A target in words: what there is to draw, by caption and number, or else its record's own fields.

    >>> summarise(None, [Mark(shape=(0, 0, 1, 1), caption="cat")] * 2 + [Mark(shape=(0, 0, 1, 1), caption="dog")])
    '3 boxes: 2 cat, dog'
    """
    if marks:
        kind = ("point", "points") if len(marks[0].shape) == 2 else ("box", "boxes")
        captions = Counter(mark.caption for mark in marks if mark.caption)
        names = ", ".join(name if count == 1 else f"{count} {name}" for name, count in captions.items())
        return f"{len(marks)} {kind[len(marks) != 1]}" + (f": {names}" if names else "")
    if not is_dataclass(target):
        return str(target)
    values = {field.name: getattr(target, field.name) for field in fields(target)}
    if len(values) == 1:
        (value,) = values.values()
        return "nothing" if value == () else str(value)
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _reward(outcome: Outcome) -> str:
    terms = ", ".join(f"{name} {value:.2f}" for name, value in outcome.score.terms.items())
    return f"{outcome.score.reward:.3f}" + (f"\n{terms}" if terms else "")


def _remarks(outcome: Outcome) -> str:
    if outcome.is_truncated:
        return f"\n[cut off after {outcome.num_tokens} tokens]"
    return "\n[no answer could be read]" if outcome.prediction is None else ""


def _save(cards: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, card in enumerate(cards):
        card.save(folder / f"{index}.png")
    contact_sheet(cards).save(folder / "sheet.png")
