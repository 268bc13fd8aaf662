"""What training changed: greedy metrics on the test split before and after, as a table, and where to look next."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perception_r1.callbacks.files import run_folder

if TYPE_CHECKING:
    from perception_r1.modules.base import PolicyModule


class BeforeAfter(Callback):
    """Evaluate the policy on the test split before the first step and after the last one, and show both.

    A resumed run keeps the metrics from before its very first step. `trainer.limit_test_batches` holds here too.

    Args:
        enabled: Evaluate; otherwise only the run's files are named at the end.

    Attributes:
        before: Metrics before training, by name; empty until they are known.
        after: Metrics after training, by name; empty until they are known.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the untrained policy, unless this run goes on from a checkpoint."""
        if self.enabled and not self.before and trainer.ckpt_path is None:
            self.before = _evaluate(trainer, pl_module, "before training")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the trained policy, while it is still on its device."""
        if self.enabled:
            self.after = _evaluate(trainer, pl_module, "after training")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table and name the run's files."""
        places = _places(trainer)
        if not trainer.is_global_zero:
            return
        console = get_console()
        if self.after:
            task = cast("PolicyModule", pl_module).task
            console.print(before_after_table(self.before, self.after, primary_metric=task.primary_metric))
        for name, place in places.items():
            console.print(Text.assemble((f"{name:<13}", "bold"), place), soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """The metrics from before training, for a resumed run."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the metrics from before training up again."""
        self.before = dict(state_dict["before"])


def before_after_table(before: Mapping[str, float], after: Mapping[str, float], *, primary_metric: str) -> Table:
    """A row per metric, the primary metric first and bold; a metric that is not known is shown as "-"."""
    table = Table(title="Greedy answers on the test split", title_justify="left")
    table.add_column("metric")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for metric in sorted(after, key=lambda name: name != primary_metric):
        change = after[metric] - before[metric] if metric in before else None
        row = (
            Text(metric),
            _metric(before.get(metric)),
            _metric(after[metric]),
            Text("-") if change is None else Text(f"{change:+.4f}"),
        )
        is_primary = metric == primary_metric
        if is_primary and change:
            row[3].stylize("green" if change > 0 else "red")
        table.add_row(*row, style="bold" if is_primary else "", end_section=is_primary)
    return table


def _metric(value: float | None) -> Text:
    return Text("-" if value is None else f"{value:.4f}")


def _evaluate(trainer: Trainer, pl_module: LightningModule, when: str) -> dict[str, float]:
    """Greedy metrics on the test split; nothing when the data has none."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None or not is_overridden("test_dataloader", datamodule):
        return {}
    datamodule.setup("test")  # a fit sets up the other splits only
    loader = datamodule.test_dataloader()
    num_batches = _limit(trainer, len(loader))
    if num_batches == 0:
        return {}
    batches = (datamodule.transfer_batch_to_device(batch, pl_module.device, 0) for batch in islice(loader, num_batches))
    console = get_console() if trainer.is_global_zero else Console(quiet=True)
    return cast("PolicyModule", pl_module).evaluate(_shown(batches, console, when, num_batches))


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


def _places(trainer: Trainer) -> dict[str, str]:
    """Where the results of the run lie; asked on all ranks, since they agree on the folder."""
    folder = run_folder(trainer)
    if folder is None:
        return {}
    found = {name: str(folder / name) for name in ("checkpoints", "samples", "run.json") if (folder / name).exists()}
    return {"TensorBoard": f"tensorboard --logdir {folder}"} | found
