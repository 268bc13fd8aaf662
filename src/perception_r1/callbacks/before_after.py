"""What training changed: greedy metrics on the test split before and after, as a table, and where its files are."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from math import isfinite, isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perception_r1.callbacks.files import PREDICTIONS, read_card, run_folder
from perception_r1.callbacks.kept_predictions import keep_telling_images, keeping
from perception_r1.data.base import BaseDataModule
from perception_r1.errors import UserError
from perception_r1.metrics import margins_of_error
from perception_r1.scoring import ScoredCompletion

if TYPE_CHECKING:
    from perception_r1.modules.evaluation import EvaluationModule


class BeforeAfter(Callback):
    """Evaluate the policy on the test split before the first step and after the last one, and show both.

    A resumed run keeps the metrics from before its very first step. `trainer.limit_test_batches` holds here too. Where
    the test split has several sources, the names of metrics begin with that of the source: "refcoco_val/accuracy_50".

    The answers stay in `predictions/test` in the run's folder, see `kept_predictions.py`.

    Args:
        enabled: Evaluate; otherwise only the run's files are named at the end.
        num_images: Samples whose small picture is kept beside the answers: those that tell most of what changed.

    Attributes:
        before: Metrics before training, by name; empty until they are known.
        after: Metrics after training, by name; empty until they are known.
        margins: Half the width of the 95 % confidence interval of each of them, for "before" and "after".
    """

    def __init__(self, enabled: bool = True, num_images: int = 96) -> None:
        if num_images < 0:
            raise UserError(f"num_images is {num_images}; use at least 0.")
        self.enabled = enabled
        self.num_images = num_images
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.margins: dict[str, dict[str, float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let a run that was stopped in its last evaluation come to its end again."""
        folder = run_folder(trainer)
        if stage == "fit" and self.enabled and folder is not None:
            is_missing = trainer.is_global_zero and not read_card(folder).get("after")
            if trainer.strategy.broadcast(is_missing):
                trainer.fit_loop.__class__ = _EndingLoop

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the untrained policy, unless this run goes on from a checkpoint."""
        if self.enabled and not self.before and trainer.ckpt_path is None:
            self.before, self.margins["before"] = _evaluate(trainer, pl_module, "before")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the trained policy, while it is still on its device."""
        if self.enabled:
            self.after, self.margins["after"] = _evaluate(trainer, pl_module, "after")
            self._keep_images(trainer)

    def _keep_images(self, trainer: Trainer) -> None:
        """Keep small pictures of the samples that tell most."""
        folder, datamodule = _kept(trainer), getattr(trainer, "datamodule", None)
        if folder is not None and isinstance(datamodule, BaseDataModule) and self.after and trainer.is_global_zero:
            samples = (sample for samples in datamodule.tested_samples().values() for sample in samples)
            keep_telling_images(folder, samples, self.num_images)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table and name the run's files."""
        files = _files(trainer)
        if not trainer.is_global_zero:
            return
        console = get_console()
        if self.after:
            module = cast("EvaluationModule", pl_module)
            primary = [tag.removeprefix("test/") for tag in module.primary_test_metrics]
            console.print(before_after_table(self.before, self.after, primary_metrics=primary))
        for name, path in files.items():
            console.print(Text.assemble((f"{name:<13}", "bold"), path), soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """The metrics from before training, for a resumed run."""
        return {"before": self.before, "margins": self.margins.get("before", {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the metrics from before training up again."""
        self.before, self.margins["before"] = dict(state_dict["before"]), dict(state_dict["margins"])


class _EndingLoop(_FitLoop):
    """Comes to the hooks at the end of a training also where no step is left to do."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train with."""
        return self.max_batches == 0


def before_after_table(
    before: Mapping[str, float], after: Mapping[str, float], *, primary_metrics: Collection[str]
) -> Table:
    """A row per metric, the primary ones first and bold; what is not known or not defined is shown as "-"."""
    table = Table(title="Greedy answers on the test split", title_justify="left")
    table.add_column("metric")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for metric in sorted(after, key=lambda name: name not in primary_metrics):
        is_primary = metric in primary_metrics
        numbers = [Text(_number(before.get(metric, nan))), Text(_number(after[metric])), Text("-")]
        if isfinite(before.get(metric, nan) - after[metric]):
            change = after[metric] - before[metric]
            color = "green" if change > 0 else "red"
            numbers[2] = Text(f"{change:+.4f}", style=color if is_primary and change else "")
        table.add_row(Text(metric), *numbers, style="bold" if is_primary else "", end_section=is_primary)
    return table


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.4f}"


def _evaluate(trainer: Trainer, pl_module: LightningModule, when: str) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the test split by the steps of `test`, in its precision, and how sure they are; answers are kept.

    Nothing when the data has no such split.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None or not is_overridden("test_dataloader", datamodule):
        return {}, {}
    module = cast("EvaluationModule", pl_module)
    datamodule.setup("test")  # a fit sets up the other splits only
    loaders = datamodule.test_dataloader()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    limited = [(loader, _limit(trainer, len(loader))) for loader in loaders]
    total = sum(num_batches for _, num_batches in limited)
    if total == 0:
        return {}, {}
    steps = (
        (datamodule.transfer_batch_to_device(batch, module.device, loader_index), batch_index, loader_index)
        for loader_index, (loader, num_batches) in enumerate(limited)
        for batch_index, batch in enumerate(islice(loader, num_batches))
    )
    console, folder = get_console() if trainer.is_global_zero else Console(quiet=True), _kept(trainer)
    module.on_test_start()
    with torch.no_grad(), nullcontext(list) if folder is None else keeping(trainer, folder, when, module.task) as keep:
        for step in _shown(steps, console, f"{when} training", total):
            keep(cast("list[ScoredCompletion]", trainer.strategy.test_step(*step)))
    margins = {tag: float(value) for found in module.test_metrics for tag, value in margins_of_error(found).items()}
    return _without_prefix(module.test_results()), _without_prefix(margins)


def _without_prefix(values: Mapping[str, float]) -> dict[str, float]:
    return {tag.removeprefix("test/"): value for tag, value in values.items()}


def _limit(trainer: Trainer, num_batches: int) -> int:
    limit = trainer.limit_test_batches
    if isinstance(limit, int):
        return min(limit, num_batches)
    return int(num_batches * (1.0 if limit is None else limit))


def _shown(batches: Iterable[Any], console: Console, when: str, total: int) -> Iterator[Any]:
    """Pass batches on and say how far it is: a status line in a terminal, else one plain line."""
    text = f"Evaluating on the test split {when}"
    if not console.is_interactive:
        console.print(f"{text}: {total} batches", highlight=False)
        yield from batches
        return
    with console.status(text) as status:
        for index, batch in enumerate(batches):
            status.update(f"{text}: batch {index + 1} of {total}")
            yield batch


def _kept(trainer: Trainer) -> Path | None:
    """Where answers to the test split are kept; asked on all ranks, since they agree on the folder."""
    folder = run_folder(trainer)
    return None if folder is None else folder / PREDICTIONS / "test"


def _files(trainer: Trainer) -> dict[str, str]:
    """Where the results of the run lie; asked on all ranks, since they agree on the folder."""
    folder = run_folder(trainer)
    if folder is None:
        return {}
    found = {name: str(folder / name) for name in ("checkpoints", "samples", "run.json") if (folder / name).exists()}
    has_events = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
    return {"TensorBoard": f"tensorboard --logdir {folder}"} | found if has_events else found
