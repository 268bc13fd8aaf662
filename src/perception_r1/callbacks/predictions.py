"""`predictions.jsonl`: what the policy answered, one line per sample, for whoever wants to look or to score offline."""

import json
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from perception_r1.callbacks.files import finite, run_folder
from perception_r1.scoring import Outcome
from perception_r1.task import Task

if TYPE_CHECKING:
    from perception_r1.modules.base import PolicyModule

_BATCH_END = "\n"
"""An empty line ends each batch of a part: the batches of the ranks take turns, whatever their sizes."""


class Predictions(Callback):
    """Write every outcome of `predict` to `predictions.jsonl` in the run's folder.

    Each rank writes its own part as it goes; rank zero joins them in the order of the data set. `Trainer.predict` then
    returns nothing: it would hold all pictures in memory, and it cannot move frozen records.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._part: IO[str] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part."""
        trainer.predict_loop.return_predictions = False
        self._folder = run_folder(trainer)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._part = _part_path(self._folder, trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the outcomes of one batch."""
        if self._part is not None:
            task = cast("PolicyModule", pl_module).task
            self._part.writelines(outcome_line(task, outcome) for outcome in outputs)
            self._part.write(_BATCH_END)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts."""
        self._close()
        trainer.strategy.barrier("predictions")
        if self._folder is not None and trainer.is_global_zero:
            parts = [_part_path(self._folder, rank) for rank in range(trainer.world_size)]
            join_parts(parts, self._folder / "predictions.jsonl")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the parts as they are, complete up to the last batch."""
        self._close()

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None


def outcome_line(task: Task[Any, Any], outcome: Outcome) -> str:
    """One outcome as a line of JSON, in ASCII, so that no character of a completion can break the line."""
    record = {
        "id": outcome.sample.id,
        "query": outcome.sample.query,
        "completion": outcome.completion,
        "prediction": task.describe(outcome.prediction, outcome.frame),
        "reward": outcome.score.reward,
        "terms": dict(outcome.score.terms),
        "figures": dict(outcome.score.figures),
        "num_tokens": outcome.num_tokens,
        "is_truncated": outcome.is_truncated,
    }
    return json.dumps(finite(record)) + "\n"


def join_parts(parts: Iterable[Path], path: Path) -> None:
    """Join the ranks' parts batch by batch in turn, as the sampler dealt the batches out, and remove the parts."""
    parts = list(parts)
    batches = [part.read_text(encoding="utf-8").split("\n" + _BATCH_END) for part in parts]
    with path.open("w", encoding="utf-8") as joined:
        for turn in zip_longest(*batches, fillvalue=""):
            joined.writelines(batch + "\n" for batch in turn if batch)
    for part in parts:
        part.unlink()


def _part_path(folder: Path, rank: int) -> Path:
    return folder / f"predictions.rank{rank}.jsonl"
