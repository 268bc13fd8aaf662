"""Base of the tasks' data modules: synthetic scenes or sources in, checked splits of samples out."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track

from perception_r1.data.base import BaseDataModule, check_numbers
from perception_r1.data.curriculum import easy_to_hard
from perception_r1.data.image_cache import ImageCache
from perception_r1.data.loading import shuffled
from perception_r1.data.samples import NUM_SILENT, ImageCheck, OnBadRow, SampleCheck, concat, load, subset
from perception_r1.data.sources import DataError, Source
from perception_r1.data.sources.base import Lazy, resolve_take
from perception_r1.data.splits import Samples, divide, sources_by_split
from perception_r1.data.synthetic.scenes import SyntheticScenes, scene_fingerprint
from perception_r1.data.synthetic.worlds import World
from perception_r1.errors import UserError
from perception_r1.records import LoadedSample, Sample, Split, UnloadedSample
from perception_r1.rows import Row
from perception_r1.task import Task

_STAGES: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), None: get_args(Split)}
"""Splits of a stage, but for "test", which `eval_split` decides."""


class TaskDataModule(BaseDataModule):
    """Samples of one task: synthetic scenes, or with sources the rows of those.

    Attributes:
        task_without_labels: The task as it was given; `task` knows the labels of the data besides.
        check_sample: Set before `setup`, it makes bad rows of those that the model cannot take.

    Args:
        task: The task that reads the rows.
        world: The world of the synthetic scenes.
        train_file: JSON lines of the project's own form to train on instead of synthetic scenes.
        val_file: JSON lines to validate on; without them a share of the training rows is held out.
        test_file: JSON lines to test on; without them a share of the training rows is held out.
        train: Sources to train on by name, in place of train_file (see `data/sources`).
        val: Sources to validate on by name, in place of val_file.
        test: Sources to test on by name, in place of test_file; each gets metrics of its own.
        train_take: Which of the training rows of all sources together: "all", "first:N", "last:N" or "random:N", N a
            number or a percentage; what is held out is held out before.
        num_train: Synthetic scenes per training epoch.
        num_val: Synthetic scenes for validation; of the rows of sources no more than this, drawn by the seed, so that
            validations do not take longer than the training between them. A test answers all rows.
        num_test: Synthetic scenes for testing.
        held_out_share: Share of the training images for each split that has no source of its own. All rows of an
            image are in the same split.
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and reports them.
        image_check: "decode" decodes every image once before its first training, "header" reads only its beginning and
            its end: then an image that is damaged in between stops the run when its turn comes. What was checked is
            kept, see `ImageCache`.
        shuffle: Show the training samples in a new random order in every epoch.
        curriculum: `predictions.jsonl` of an evaluation on the training rows: they are shown from high reward to low,
            and not shuffled.
        **kwargs: Those of `BaseDataModule`.

    Raises:
        UserError: A number is out of range, or a split has both a file and sources.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        world: World,
        *,
        train_file: Path | None = None,
        val_file: Path | None = None,
        test_file: Path | None = None,
        train: dict[str, Source] | None = None,
        val: dict[str, Source] | None = None,
        test: dict[str, Source] | None = None,
        train_take: str = "all",
        num_train: int = 8192,
        num_val: int = 200,
        num_test: int = 400,
        held_out_share: float = 0.1,
        on_bad_row: OnBadRow = "error",
        image_check: ImageCheck = "decode",
        shuffle: bool = True,
        curriculum: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.world = world
        self.sources = sources_by_split(
            {"train": train_file, "val": val_file, "test": test_file}, {"train": train, "val": val, "test": test}
        )
        self.num_scenes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.train_take, self.held_out_share = train_take, held_out_share
        self.on_bad_row, self.image_check = on_bad_row, image_check
        self.shuffle = shuffle and curriculum is None
        self.curriculum = None if curriculum is None else Path(curriculum)
        self.check_sample: SampleCheck | None = None
        self.task_without_labels = task
        self._samples: dict[Split, Samples] = {}
        self._easy_to_hard: Sequence[int] | None = None
        check_numbers({f"num_{split}": size for split, size in self.num_scenes.items()}, 1)
        if not 0 < held_out_share < 0.5:
            raise UserError(f"held_out_share must be more than 0 and less than 0.5, got {held_out_share}")

    @cached_property
    def task(self) -> Task[Any, Any]:
        """The task with the labels of its data, which the command line hands to the module.

        Raises:
            DataError: A source cannot be read.
        """
        return self.task_without_labels.with_labels(self._labels())

    def setup(self, stage: str | None = None) -> None:
        """Load and check the splits of a stage; those that are there already are kept.

        Raises:
            DataError: A source cannot be used, or a split that the stage needs has none.
            UserError: The world has too few different scenes.
        """
        for split in (self.eval_split,) if stage == "test" else _STAGES[stage]:
            if split not in self._samples and (stage is not None or self._has_source(split)):
                loaded = self._load(split)
                if "train" in loaded and self.train_take != "all":
                    size = len(loaded["train"])
                    loaded["train"] = subset(loaded["train"], resolve_take(self.train_take, size, self.seed))
                self._samples |= loaded

    def samples(self, split: Split) -> Samples:
        """The samples of a split that is set up, source by source; images of files are not loaded."""
        if split not in self._samples:
            raise RuntimeError(f"the {split} samples are not loaded: call setup first")
        return self._samples[split]

    def validated_samples(self) -> Samples:
        """At most `num_val`, the same ones in every validation, in the order of the sources."""
        samples, most = self.samples("val"), self.num_scenes["val"]
        if len(samples) <= most:
            return samples
        return subset(samples, resolve_take(f"random:{most}", len(samples), self.seed))

    @property
    def tested_sources(self) -> tuple[str, ...]:
        """Names of the sources that `test` evaluates, as in `Sample.source`, at least one: each has a loader."""
        return tuple(self.sources.get(self.eval_split) or self.sources.get("train") or {"": None})

    def tested_samples(self) -> Mapping[str, Samples]:
        """The split as it is, or divided by the sources of its rows."""
        samples, sources = self.samples(self.eval_split), self.tested_sources
        if len(sources) == 1:
            return {sources[0]: samples}
        indices: dict[str, list[int]] = {source: [] for source in sources}
        for index, sample in enumerate(samples):
            indices[sample.source].append(index)
        return {source: subset(samples, chosen) for source, chosen in indices.items()}

    def train_order(self, epoch: int) -> Sequence[int]:
        """A new random order in every epoch, that of the curriculum, or as the samples are."""
        samples = self.samples("train")
        if self.curriculum is not None:
            if self._easy_to_hard is None:
                self._easy_to_hard = easy_to_hard(samples, self.curriculum)
            return self._easy_to_hard
        return shuffled(len(samples), self.seed, epoch) if self.shuffle else range(len(samples))

    def num_train_pixels(self) -> Sequence[int]:
        """Pixels of the image of each training sample; 0 for scenes, which are all small and are not drawn for this."""
        samples = self.samples("train")
        if not self.sources:
            return [0] * len(samples)
        is_silent = len(samples) < NUM_SILENT or getattr(rank_zero_only, "rank", 0) != 0
        shown = track(samples, "Looking for the largest images", disable=is_silent)
        return [sample.width * sample.height for sample in shown]

    def fingerprint(self, split: Split | None = None) -> str:
        """A hex digest of everything that determines the samples of a split, or of all; it needs no setup."""
        splits = get_args(Split) if split is None else (split,)
        if self.sources:
            named = [(each, *item) for each in self.sources if each in splits for item in self.sources[each].items()]
            parts = [f"{each} {name} {source.fingerprint()}" for each, name, source in named]
            parts += [str(self.held_out_share), self.on_bad_row, self.train_take]
        else:
            parts = [scene_fingerprint(self.world, each, self.seed, self.num_scenes[each]) for each in splits]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """See `BaseDataModule`; of a source its name in messages, and its id where it is on the hub."""
        described: dict[str, Any] = {}
        for split, samples in self._samples.items():
            sources = self.sources.get(split) or self.sources.get("train", {})
            described[split] = {
                "num_samples": len(samples),
                "is_held_out": bool(self.sources) and split not in self.sources,
                "sources": {name: {"name": str(source), "hub_id": source.hub_id} for name, source in sources.items()},
                "world": None if self.sources else type(self.world).__name__,
            }
        return described

    def _labels(self) -> Iterator[str]:
        """Names of the sources' objects, else of the synthetic ones; sources are read when the first is asked for."""
        sources = [source for group in self.sources.values() for source in group.values()]
        yield from [label for source in sources for label in source.labels()] or self.world.labels

    def _has_source(self, split: Split) -> bool:
        return not self.sources or split in self.sources or "train" in self.sources

    def _load(self, split: Split) -> dict[Split, Samples]:
        """The samples of a split, and of those that come from the same sources."""
        if not self.sources:
            size = self.num_scenes[split]
            return {split: _SyntheticSamples(self.task, SyntheticScenes(self.world, split, self.seed, size))}
        if not self._has_source(split):
            raise DataError(f"the {split} samples have no source: give {split}_file or train_file")
        if split != "train" and split in self.sources:
            return {split: self._read(split)}
        held_out: list[Split] = [name for name in ("val", "test") if name not in self.sources]
        return divide(self._read("train"), list(self.sources["train"].values()), held_out, self.held_out_share)

    def _read(self, split: Split) -> Sequence[UnloadedSample[Any]]:
        parts = [
            load(
                source,
                self.task,
                name=name,
                on_bad_row=self.on_bad_row,
                image_check=self.image_check,
                check_sample=self.check_sample,
                cache=ImageCache(),
            )
            for name, source in self.sources[split].items()
        ]
        return concat(parts)


class _SyntheticSamples(Lazy[LoadedSample[Any]]):
    """The scenes of a source as samples."""

    def __init__(self, task: Task[Any, Any], source: SyntheticScenes) -> None:
        super().__init__(self._sample, len(source))
        self.task, self.source = task, source

    def _sample(self, index: int) -> LoadedSample[Any]:
        scene = self.source[index]
        image, row = scene.image, scene.values
        width, height = image.size
        query, target = self.task.read_row(Row(row, width=width, height=height))
        name = f"{self.source.split}-{index}"
        return Sample(id=name, image=image, width=width, height=height, query=query, target=target, row=row)
