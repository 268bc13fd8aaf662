"""Several tasks in one run: their data modules, mixed by weight."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from perception_r1.data.base import BaseDataModule
from perception_r1.data.loading import shuffled
from perception_r1.data.module import TaskDataModule
from perception_r1.data.samples import concat, subset
from perception_r1.data.sources.base import Lazy
from perception_r1.data.splits import Samples
from perception_r1.errors import UserError
from perception_r1.records import Sample, Split
from perception_r1.task import Mixture

_NUM_FIRST = 8
"""Samples of each task with which an evaluation begins."""


class MixedData(BaseDataModule):
    """Samples of several tasks. Every stretch of the training order holds them by their weights, as nearly as it can.

    A task begins anew, in another order, once all of its samples were shown; so its weight does not depend on how many
    it has. Validation and test show every sample of each task once, with metrics of its own.

    Args:
        tasks: The data modules of the tasks. The name of each stands before its metrics; batches, workers, seed and the
            split to test are those of this module.
        weights: Shares of the training samples, in any unit; a task that is not named has 1.
        **kwargs: Those of `BaseDataModule`.

    Attributes:
        parts: The data modules of the tasks.

    Raises:
        UserError: There is no task, a weight is wrong, or a task has a setting that does nothing here.
    """

    def __init__(
        self, tasks: dict[str, TaskDataModule], weights: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not tasks:
            raise UserError("tasks is empty; a mixture needs the data module of at least one task")
        unknown = [name for name in weights or {} if name not in tasks]
        if unknown:
            raise UserError(f"weights names {unknown[0]}, which is none of the tasks {', '.join(tasks)}")
        self.weights = {name: 1.0 for name in tasks} | (weights or {})
        for name, part in tasks.items():
            _check(name, part, self.weights[name])
            part.seed, part.eval_split = self.seed, self.eval_split
        self.parts = tasks

    @cached_property
    def task(self) -> Mixture:
        """All tasks with the labels of their data."""
        return Mixture(tasks={name: part.task for name, part in self.parts.items()})

    def setup(self, stage: str | None = None) -> None:
        """Load and check the splits of a stage; raises as `TaskDataModule.setup` does."""
        for part in self.parts.values():
            part.setup(stage)

    def samples(self, split: Split) -> Samples:
        """The samples of all tasks, one after another; those to evaluate begin with a few of each in turn.

        So the cards of the first validation samples show all tasks.
        """
        samples = {name: part.samples(split) for name, part in self.parts.items()}
        return _joined(samples) if split == "train" else _begun_in_turn(samples)

    def validated_samples(self) -> Samples:
        """Those of all tasks, each bounded by its own `num_val`."""
        return _begun_in_turn({name: part.validated_samples() for name, part in self.parts.items()})

    @property
    def tested_sources(self) -> tuple[str, ...]:
        """Task, and source where the data has names."""
        return tuple(_source(name, source) for name, part in self.parts.items() for source in part.tested_sources)

    def tested_samples(self) -> Mapping[str, Samples]:
        """Those of each task."""
        return {
            _source(name, source): _named(name, samples)
            for name, part in self.parts.items()
            for source, samples in part.tested_samples().items()
        }

    def train_order(self, epoch: int) -> Sequence[int]:
        """As many indices as there are samples, by the weights."""
        sizes = [len(part.samples("train")) for part in self.parts.values()]
        shares = np.array(list(self.weights.values())) / sum(self.weights.values())
        turns = interleaved(shares, sum(sizes))
        counts = np.bincount(turns, minlength=len(sizes)).tolist()
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        streams = [
            _stream(size, count * epoch, count, self.seed * len(sizes) + number, start)
            for number, (size, count, start) in enumerate(zip(sizes, counts, starts, strict=True))
        ]
        return [next(streams[number]) for number in turns]

    def num_train_pixels(self) -> Sequence[int]:
        """Those of all tasks."""
        return [pixels for part in self.parts.values() for pixels in part.num_train_pixels()]

    def fingerprint(self, split: Split | None = None) -> str:
        """A hex digest of the samples of all tasks and of their weights."""
        parts = [f"{name} {self.weights[name]!r} {part.fingerprint(split)}" for name, part in self.parts.items()]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Those of each task, as TASK/SPLIT."""
        described = {name: part.describe() for name, part in self.parts.items()}
        return {f"{name}/{split}": value for name, splits in described.items() for split, value in splits.items()}


def parts_of(data: BaseDataModule) -> Mapping[str, TaskDataModule]:
    """The data modules of single tasks by the name with which their sources begin; it is empty where there is one."""
    if isinstance(data, MixedData):
        return data.parts
    return {"": data} if isinstance(data, TaskDataModule) else {}


def interleaved(shares: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    """[size] whose turn it is, spread evenly by their shares.

    >>> interleaved([0.5, 0.25, 0.25], 8).tolist()
    [0, 1, 2, 0, 0, 1, 2, 0]
    """
    # the k-th turn of one with share s lies in the middle of the k-th of the equal stretches that s makes of the whole
    shares = np.asarray(shares, dtype=float)
    counts = np.floor(shares * size).astype(int)
    rest = np.argsort(-(shares * size - counts), kind="stable")[: size - counts.sum()]
    counts[rest] += 1
    times = [(np.arange(count) + 0.5) / count for count in counts]
    owners = np.repeat(np.arange(len(shares)), counts)
    return owners[np.argsort(np.concatenate(times), kind="stable")]


def _stream(size: int, first: int, count: int, seed: int, offset: int) -> Iterator[int]:
    """`count` indices of a task from the `first` on: all of its samples in a random order, then in another one."""
    order: list[int] = []
    for number in range(first, first + count):
        if number == first or number % size == 0:
            order = shuffled(size, seed, number // size)
        yield offset + order[number % size]


def _joined(samples: Mapping[str, Samples]) -> Samples:
    """The samples of several tasks, one after another."""
    return concat([_named(name, part) for name, part in samples.items()])


def _begun_in_turn(samples: Mapping[str, Samples]) -> Samples:
    """The same, but for the first of each task in turn at the beginning."""
    whole, sizes = _joined(samples), [len(part) for part in samples.values()]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    first = [
        start + turn for turn in range(_NUM_FIRST) for start, size in zip(starts, sizes, strict=True) if turn < size
    ]
    return subset(whole, [*first, *sorted(set(range(len(whole))) - set(first))])


def _named(name: str, samples: Samples) -> Samples:
    """Samples whose sources have the name of their task before their own."""

    def sample(index: int) -> Sample[Any]:
        found = samples[index]
        return replace(found, source=_source(name, found.source))

    return Lazy(sample, len(samples))


def _source(name: str, source: str) -> str:
    return f"{name}/{source}" if source else name


def _check(name: str, part: TaskDataModule, weight: float) -> None:
    """Refuse what is wrong or would do nothing.

    Raises:
        UserError: Names it.
    """
    if not name or "/" in name:
        raise UserError(f"a task cannot be named {name!r}; give it a name without a slash")
    if not 0 < weight < float("inf"):
        raise UserError(f"weights.{name} must be above 0, got {weight}")
    own = {setting: parameter.default for setting, parameter in inspect.signature(BaseDataModule).parameters.items()}
    own |= {"shuffle": True, "curriculum": None}
    for setting, default in own.items():
        if getattr(part, setting) != default and setting != "seed":
            raise UserError(f"tasks.{name}.{setting} has no effect in a mixture; set data.{setting} where there is one")
