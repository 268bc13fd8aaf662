"""What an evaluation leaves behind, and how one that was killed goes on.

Each device appends its rows to a part of its own while it works. Whoever starts the same evaluation again, on however
many devices, finds these parts in its folder: finished samples are scored again from their completions and not answered
again. At the end the parts become `predictions.jsonl`, in the order of the data, with `metrics.json`,
`margins_of_error.json`, `evaluation.json`, which says how all of it was made, and the report.

Only a folder that has the name of its evaluation is known to hold the answers to the same question. In any other, and
where `trainer.limit_test_batches` leaves samples out, an evaluation begins anew.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MetricCollection

from perception_r1.callbacks.files import EVALUATION_CARD, run_folder, write_json
from perception_r1.callbacks.kept_predictions import keep_images
from perception_r1.callbacks.predictions import Key, prediction_row, read_rows, rescore, row_key, row_line, write_rows
from perception_r1.callbacks.run_card import now, set_up
from perception_r1.callbacks.selection import most_telling
from perception_r1.data.base import BaseDataModule
from perception_r1.errors import UserError
from perception_r1.evaluation.key import EVALUATION
from perception_r1.evaluation.paper import compare
from perception_r1.evaluation.report import Metrics, TaskResults, write_report
from perception_r1.metrics import make_metrics, margins_of_error, published_values, update_metrics
from perception_r1.scoring import ScoredCompletion, score_as_published
from perception_r1.task import Task, part_of, task_of, task_of_source, tasks_of

if TYPE_CHECKING:
    from perception_r1.modules.evaluation import EvaluationModule

_DIGITS = 12
"""Significant digits of a metric in metrics.json: more than that depends on the order of addition."""


class Evaluation(Callback):
    """Keep the rows of `test`, go on from those that are there, and write metrics and report at the end.

    Args:
        num_samples: Worst and best samples that are drawn in the report.
        num_images: Samples whose small picture is kept for `perception-r1 report`: the worst, and others at even
            distances.
    """

    def __init__(self, num_samples: int = 8, num_images: int = 96) -> None:
        if num_images < 0:
            raise UserError(f"num_images is {num_images}; use at least 0.")
        self.num_samples = num_samples
        self.num_images = num_images
        self._folder: Path | None = None
        self._part: TextIO | None = None
        self._published: list[MetricCollection | None] = []
        self._margins: list[dict[str, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collect what an earlier try has answered; the data module is set up, its loaders are not yet made."""
        if stage != "test":
            return
        self._published = []
        folder, datamodule = run_folder(trainer), getattr(trainer, "datamodule", None)
        if folder is None or not isinstance(datamodule, BaseDataModule):
            self._folder = None
            return
        self._folder = folder
        trainer.test_loop.verbose = False  # the report has a table of its own
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            limit = trainer.limit_test_batches
            is_limited = isinstance(limit, int) or limit != 1.0  # 1 is a single batch, 1.0 all of them
            if is_limited or not folder.name.startswith(EVALUATION):
                for file in self._files():
                    file.unlink(missing_ok=True)
            write_rows(self._answers, self._collect(datamodule).values())
            for part in self._parts():
                part.unlink()
        trainer.strategy.barrier("answers")
        datamodule.leave_out({row_key(row) for row in read_rows(self._answers)})

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the samples that are answered already, on one device; open this device's part."""
        if self._folder is None:
            return
        module, datamodule = cast("EvaluationModule", pl_module), _data(trainer)
        tasks = [task_of_source(module.task, source) for source in datamodule.tested_sources]
        self._published = [
            make_metrics(task).to(module.device) if task.published_metric_names else None for task in tasks
        ]
        if trainer.is_global_zero:
            rows = {row_key(row): row for row in read_rows(self._answers)}
            for sample in datamodule.samples(datamodule.eval_split) if rows else ():
                if (row := rows.get((sample.source, sample.id))) is not None:
                    scored = rescore(task_of(module.task, sample), module.codec, sample, row)
                    index = datamodule.tested_sources.index(sample.source)
                    update_metrics(module.test_metrics[index], [scored])
                    self._update_published(module, index, [scored])
        self._part = (self._folder / f"answers.rank{trainer.global_rank}.jsonl").open("w", encoding="utf-8")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the completions of one batch to the disk, and score them as published."""
        if self._part is not None:
            module = cast("EvaluationModule", pl_module)
            for scored in outputs:
                self._part.write(row_line(prediction_row(task_of(module.task, scored.sample), scored)))
            self._part.flush()
            self._update_published(module, dataloader_idx, outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the published metrics, and find out how sure the others are; all devices compute them together."""
        module = cast("EvaluationModule", pl_module)
        self._margins = [] if self._folder is None else [margins_of_error(tested) for tested in module.test_metrics]
        sources = _data(trainer).tested_sources if self._published else ()
        for index, source in enumerate(sources):
            tested, published = module.test_metrics[index], self._published[index]
            if published is not None:
                values = published_values(task_of_source(module.task, source), published)
                module.log_dict({f"{tested.prefix}{name}": value for name, value in values.items()}, batch_size=1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts; write metrics and report."""
        if self._folder is None:
            return
        self._close(trainer)
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        module, datamodule = cast("EvaluationModule", pl_module), _data(trainer)
        answered, samples = self._collect(datamodule), datamodule.samples(datamodule.eval_split)
        rows = list(answered.values())
        indices = [index for index, sample in enumerate(samples) if (sample.source, sample.id) in answered]
        write_rows(self._folder / "predictions.jsonl", rows)
        metrics, margins = {}, {}
        for index, source in enumerate(datamodule.tested_sources):
            tested = module.test_metrics[index]
            values = _without_prefix(tested, tested.compute())
            margins[source or "test"] = _rounded(_without_prefix(tested, self._margins[index]))
            published = self._published[index]
            if published is not None:
                values |= published_values(task_of_source(module.task, source), published)
            metrics[source or "test"] = _rounded(values)
        write_json(self._folder / "metrics.json", metrics)
        write_json(self._folder / "margins_of_error.json", margins)
        checkpoint = str(trainer.ckpt_path) if trainer.ckpt_path else None
        write_json(
            self._folder / EVALUATION_CARD, {"end": now(), "checkpoint": checkpoint, **set_up(trainer, pl_module)}
        )

        def scored_completion(index: int) -> tuple[Task[Any, Any], ScoredCompletion]:
            task = task_of(module.task, sample := samples[indices[index]])
            return task, rescore(task, module.codec, sample, rows[index])

        write_report(
            self._folder,
            _task_results(module, metrics, margins, rows),
            split=datamodule.eval_split,
            scored_completion=scored_completion,
            rewards=[row["reward"] for row in rows],
            num_samples=self.num_samples,
            checkpoint=checkpoint,
        )
        told = most_telling(
            {}, {index: row["reward"] for index, row in zip(indices, rows, strict=True)}, self.num_images
        )
        keep_images(self._folder, (samples[index] for index in told))
        for part in [self._answers, *self._parts()]:
            part.unlink(missing_ok=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the parts as they are."""
        self._close(trainer)

    def _update_published(self, module: "EvaluationModule", index: int, scored: Sequence[ScoredCompletion]) -> None:
        """Add what was just scored strictly to the published metrics of a source."""
        published = self._published[index]
        if published is not None:
            update_metrics(published, score_as_published(module.task, module.codec, scored))

    @property
    def _answers(self) -> Path:
        """Rows of earlier tries."""
        return cast(Path, self._folder) / "answers.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(cast(Path, self._folder).glob("answers.rank*.jsonl"))

    def _files(self) -> list[Path]:
        return [cast(Path, self._folder) / "predictions.jsonl", self._answers, *self._parts()]

    def _collect(self, datamodule: BaseDataModule) -> dict[Key, Mapping[str, Any]]:
        """All rows that are there for samples of the data, each once, in the order of the data."""
        rows = {row_key(row): row for file in self._files() if file.is_file() for row in read_rows(file)}
        keys = ((sample.source, sample.id) for sample in datamodule.samples(datamodule.eval_split)) if rows else ()
        return {key: rows[key] for key in keys if key in rows}

    def _close(self, trainer: Trainer) -> None:
        """Whoever uses the data next sees all of it."""
        if self._part is not None:
            self._part.close()
            self._part = None
            _data(trainer).leave_out(frozenset())


def _without_prefix(metrics: MetricCollection, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {tag.removeprefix(str(metrics.prefix)): value for tag, value in values.items()}


def _rounded(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(f"{float(value):.{_DIGITS}g}") for name, value in values.items()}


def _task_results(
    module: "EvaluationModule", metrics: Metrics, margins: Metrics, rows: Sequence[Mapping[str, Any]]
) -> list[TaskResults]:
    """What was found of each task."""
    results = []
    for name, task in tasks_of(module.task).items():
        comparison = compare(
            task,
            max_new_tokens=module.max_new_tokens,
            repetition_penalty=module.repetition_penalty,
            rows=[row for row in rows if part_of(module.task, row["source"]) == name],
        )
        own, own_margins = (
            {source: values for source, values in found.items() if part_of(module.task, source) == name}
            for found in (metrics, margins)
        )
        results.append(TaskResults(task=task, metrics=own, margins=own_margins, comparison=comparison))
    return results


def _data(trainer: Trainer) -> BaseDataModule:
    return cast(BaseDataModule, getattr(trainer, "datamodule", None))
