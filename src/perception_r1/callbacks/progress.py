"""How far a run is: the callback that follows the trainer and tells a display, bars or plain lines."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.text import Text

from perception_r1.displays import Display, open_display

DEFAULT_METRICS = ("train/reward", "train/kl", "train/completion_length", "train/lr", "val/frac_seconds")


class Progress(ProgressBar):
    """Show steps, time gone, time left and metrics of the whole fit, and each validation on a bar of its own.

    Steps are those of the optimiser where `trainer.max_steps` is set, else batches of all epochs. (Lightning's own
    RichProgressBar knows one epoch only, and writes nothing into a log file before the end.)

    Args:
        metrics: Tags of the metrics to show, those that are logged.
        plain_seconds: Without a terminal: the longest time between two lines while there is progress.
    """

    def __init__(self, metrics: Sequence[str] = DEFAULT_METRICS, plain_seconds: float = 20.0) -> None:
        super().__init__()
        self.metrics = list(metrics)
        self.plain_seconds = plain_seconds
        self._is_enabled = True
        self._display: Display | None = None
        self._split, self._num_done = "", 0

    def disable(self) -> None:
        """Show nothing from now on."""
        self._is_enabled = False
        self._close()

    def enable(self) -> None:
        """Show progress from now on."""
        self._is_enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown; a module that prints asks."""
        return self._is_enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        if self._is_enabled:
            get_console().print(*(Text(str(argument)) for argument in args))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or take up where a checkpoint left off."""
        self._start("training", *fit_progress(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step and its metrics."""
        if self._display is not None:
            logged = trainer.callback_metrics
            metrics = {tag.removeprefix("train/"): float(logged[tag]) for tag in self.metrics if tag in logged}
            self._display.advance("training", fit_progress(trainer)[0], metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal to those who report after training."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar of a validation."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._start_split("validation", batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Advance the bar of a validation, a test or a prediction."""
        self._num_done += 1
        if self._display is not None:
            self._display.advance(self._split, self._num_done, {})

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar of a validation."""
        if self._display is not None:
            self._display.finish(self._split)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar of a test."""
        self._start_split("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar of a prediction."""
        self._start_split("prediction", trainer.num_predict_batches)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal in order."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self._close()

    def _start(self, name: str, done: int, total: int | None) -> None:
        if self._is_enabled:
            self._display = self._display or open_display(get_console(), self.plain_seconds)
            self._display.start(name, done, total)

    def _start_split(self, name: str, batches: Sequence[int | float]) -> None:
        self._split, self._num_done = name, 0
        self._start(name, 0, _whole(sum(batches)))

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None


def fit_progress(trainer: Trainer) -> tuple[int, int | None]:
    """Steps done and steps of the whole fit, None where it has no end."""
    if trainer.max_steps > 0:
        return trainer.global_step, trainer.max_steps
    done, max_epochs = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.max_epochs
    if max_epochs is None or max_epochs < 0:
        return done, None
    return done, _whole(trainer.num_training_batches * max_epochs)


def _whole(number: float) -> int | None:
    return int(number) if math.isfinite(number) else None
