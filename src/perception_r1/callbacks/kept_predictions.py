"""What a run answered to held-out samples, kept for those who see it later: rows, and small pictures of some.

predictions/SPLIT/before.jsonl, after.jsonl   rows as in `predictions.jsonl` of an evaluation
predictions/SPLIT/images/                     pictures of the samples that tell most
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from lightning.pytorch import Trainer
from PIL import Image

from perception_r1.callbacks.files import IMAGES, image_name, save_image
from perception_r1.callbacks.predictions import Key, prediction_row, read_rows, row_key, row_line, write_rows
from perception_r1.callbacks.selection import most_telling
from perception_r1.data.loading import load_sample_image
from perception_r1.records import Sample
from perception_r1.scoring import ScoredCompletion
from perception_r1.task import AnyTask, task_of

IMAGE_SIDE = 448
"""Longest side of a small picture, in pixels."""
_QUALITY = 88
"""Of a JPEG: text on a page stays sharp."""
Keep: TypeAlias = Callable[[Iterable[ScoredCompletion]], None]
"""Takes the answers of a batch."""


@contextmanager
def keeping(trainer: Trainer, folder: Path, name: str, task: AnyTask) -> Iterator[Keep]:
    """Keep what is answered meanwhile, on all devices together, in `NAME.jsonl`; a reader sees all of it or none.

    To be entered on all devices at once.
    """
    path, part = folder / f"{name}.jsonl", folder / f"{name}.rank{trainer.global_rank}.part"
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_global_zero:
        for stale in folder.glob(f"{name}.rank*.part"):  # of a run that was killed
            stale.unlink()
    trainer.strategy.barrier("predictions begin")
    with part.open("w", encoding="utf-8") as lines:
        yield lambda answers: lines.writelines(_lines(task, answers))
    trainer.strategy.barrier("predictions end")
    if trainer.is_global_zero:
        parts = sorted(folder.glob(f"{name}.rank*.part"))
        write_rows(path, (row for each in parts for row in read_rows(each)))
        for each in parts:
            each.unlink()


def keep(folder: Path, name: str, task: AnyTask, answers: Sequence[ScoredCompletion]) -> None:
    """Keep a few answers and the pictures of all their samples."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}.jsonl", (prediction_row(task_of(task, each.sample), each) for each in answers))
    keep_images(folder, (answer.sample for answer in answers))


def keep_telling_images(folder: Path, samples: Iterable[Sample[Any]], count: int) -> None:
    """Keep the pictures of the samples that tell most of what changed between `before.jsonl` and `after.jsonl`."""
    before, after = (_rewards(folder / f"{name}.jsonl") for name in ("before", "after"))
    chosen = set(most_telling(before, after, count))
    keep_images(folder, (sample for sample in samples if (sample.source, sample.id) in chosen))


def keep_images(folder: Path, samples: Iterable[Sample[Any]]) -> None:
    """Write small pictures of samples, but for those that are there."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for sample in samples:
        path = folder / IMAGES / image_name(sample.source, sample.id)
        if not path.exists():
            image = load_sample_image(sample).image.convert("RGB")
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
            save_image(image, path, quality=_QUALITY, subsampling=0)


def _lines(task: AnyTask, answers: Iterable[ScoredCompletion]) -> Iterator[str]:
    return (row_line(prediction_row(task_of(task, answer.sample), answer)) for answer in answers)


def _rewards(path: Path) -> Mapping[Key, float]:
    return {row_key(row): row["reward"] for row in read_rows(path)} if path.is_file() else {}
