"""`perception-r1 data check|stats|convert|fetch`: look at data before a run, with the configuration of that run.

check    every row and picture; names each bad row, and shows three samples as the model is to answer them
stats    sizes, tokens, objects
convert  any source to JSON lines of the project's own form
fetch    the pictures that a source names by URL
"""

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.table import Table

from perception_r1.codecs import Codec
from perception_r1.commands.reader import load_reader, sample_check
from perception_r1.commands.statistics import (
    DatasetStatistics,
    collect_statistics,
    log10_mean_factorial,
    share_over,
    spread,
)
from perception_r1.commands.training import EMBEDDED, PerceptionCLI
from perception_r1.data.convert import ROWS, convert
from perception_r1.data.fetch import fetch
from perception_r1.data.loading import load_sample_image
from perception_r1.data.module import TaskDataModule
from perception_r1.data.samples import check, load
from perception_r1.data.sources import Source
from perception_r1.drawing import contact_sheet, draw_card
from perception_r1.errors import UserError
from perception_r1.modules.base import PolicyModule
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample, Split

_NUM_SHOWN = 3
"""Samples whose answer is written out and drawn."""


class _DataCLI(PerceptionCLI):
    """The command line of a run, of which only data, task and the model's processor are used."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options besides those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--split", type=Literal["train", "val", "test"], default="train", help="Rows to look at.")
        parser.add_argument("--to", type=Path | None, default=None, help="Folder for what is written.")
        parser.add_argument("--num_threads", type=int, default=16, help="Pictures that are fetched at once.")

    def before_instantiate_classes(self) -> None:
        """There is no checkpoint."""

    def after_instantiate_classes(self) -> None:
        """There is no warm start."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """There is none: the data of a run on eight devices can be looked at on a laptop."""
        return cast(Trainer, None)

    @property
    def data(self) -> TaskDataModule:
        """The data module of the configuration."""
        return self.datamodule

    @property
    def split(self) -> Split:
        """Rows to look at."""
        return self.config.split

    def sources(self) -> dict[str, Source]:
        """Sources of the split by name.

        Raises:
            UserError: The configuration has synthetic scenes.
        """
        if not self.data.sources:
            raise UserError("synthetic scenes need no check and no conversion; give DATA, or --data.train_file")
        found = self.data.sources.get(self.split) or self.data.sources.get("train")
        if found is None:
            known = " or ".join(f"--split {split}" for split in self.data.sources)
            raise UserError(f"the configuration has no {self.split} rows; give {known}")
        return found

    @cached_property
    def reader(self) -> tuple[Codec, Processor]:
        """How the model reads."""
        config = cast(PolicyModule, self.model).policy_config
        embedded = self.config_init.embedded if config.name == EMBEDDED else None
        return load_reader(config, embedded, self.data)


def main(argv: Sequence[str]) -> int:
    """Run one verb; the result is the exit status: 1 where `check` found a bad row or `fetch` failed on a picture."""
    verbs = {"check": _check, "stats": _stats, "convert": _convert, "fetch": _fetch}
    if argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(f"usage: perception-r1 data {{{','.join(verbs)}}} [CONFIGURATION OF A RUN]\n\n{__doc__}")
        return 0
    if not argv or argv[0] not in verbs:
        what = f"no verb {argv[0]!r}" if argv else "to be told what to do"
        sys.stderr.write(f"perception-r1: error: data has {what}: give one of {', '.join(verbs)}\n")
        return 2
    return verbs[argv[0]](_DataCLI.of(list(argv[1:]), run=False))


def _check(cli: _DataCLI) -> int:
    num_rows = num_bad = 0
    shown: list[Sample[Any]] = []
    sources, data, (_, processor) = cli.sources(), cli.data, cli.reader
    check_sample = sample_check(processor, data.task, cast(PolicyModule, cli.model).policy_config.max_prompt_length)
    for source in sources.values():
        for checked in check(source, data.task, image_check=data.image_check, check_sample=check_sample):
            num_rows += 1
            if checked.sample is None:
                num_bad += 1
                sys.stdout.write(f"{checked.problem}\n")
            elif len(shown) < _NUM_SHOWN:
                shown.append(checked.sample)
    sys.stdout.write(f"{num_rows} rows, {num_bad} of them bad\n")
    if shown:
        _show(cli, shown)
    return 1 if num_bad else 0


def _show(cli: _DataCLI, samples: Sequence[Sample[Any]]) -> None:
    """Write out and draw what the model is to answer; the drawn answer was read back from that text."""
    cards, task, (codec, processor) = [], cli.data.task, cli.reader
    for sample in samples:
        image_size = processor.image_size(sample.width, sample.height)
        try:
            answer = task.target_text(sample, codec, image_size)
        except UserError as error:
            sys.stdout.write(f"{sample.id}: has no answer to learn from ({error})\n")
            continue
        sys.stdout.write(f"{sample.id}: {answer}\n")
        prediction = task.parse_completion(answer, codec, image_size)
        cards.append(
            draw_card(
                load_sample_image(sample).image,
                title=sample.id,
                fields={"prompt": task.prompt(sample.query), "answer": answer},
                target_overlays=task.overlays(sample.target),
                predicted_overlays=[] if prediction is None else task.overlays(prediction),
            )
        )
    if cards:
        path = (cli.config.to or Path("logs") / "data") / f"{task.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(cards, num_columns=1).save(path)
        sys.stdout.write(f"drawn in {path}\n")


def _stats(cli: _DataCLI) -> int:
    data, module, (codec, processor) = cli.data, cast(PolicyModule, cli.model), cli.reader
    if data.sources:
        groups: dict[str, Iterator[Sample[Any]]] = {
            name: (found.sample for found in check(source, data.task, image_check="header") if found.sample is not None)
            for name, source in cli.sources().items()
        }
    else:
        data.setup()
        groups = {"synthetic scenes": iter(data.samples(cli.split))}
    for name, samples in groups.items():
        get_console().print(
            _table(
                name or cli.split,
                collect_statistics(samples, data.task, codec, processor),
                max_prompt_length=module.policy_config.max_prompt_length,
                max_new_tokens=module.max_new_tokens,
            )
        )
    return 0


def _table(title: str, found: DatasetStatistics, *, max_prompt_length: int | None, max_new_tokens: int) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)

    def limited(values: Sequence[int], limit: int | None) -> str:
        share = share_over(values, limit)
        return spread(values) + ("" if share is None else f"; {share:.2%} over {limit}")

    rows = {
        "samples": str(len(found.widths)),
        "different images": str(len(found.images)),
        "image width (least, median, most)": spread(found.widths),
        "image height": spread(found.heights),
        "images the model cannot take": str(found.num_refused),
        "prompt tokens": limited(found.prompt_tokens, max_prompt_length),
        "answer tokens": limited(found.answer_tokens, max_new_tokens),
        "samples without an answer to learn from": str(found.num_without_answer),
        "objects": spread(found.num_objects),
        "objects, mean": f"{sum(found.num_objects) / max(1, len(found.num_objects)):.2f}",
        "log10 of the mean n!": f"{log10_mean_factorial(found.num_objects):.2f}" if found.num_objects else "-",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _convert(cli: _DataCLI) -> int:
    if cli.config.to is None:
        raise UserError("convert needs --to FOLDER")
    for name, source in cli.sources().items():
        folder = cli.config.to / name
        samples = load(source, cli.data.task, on_bad_row=cli.data.on_bad_row, image_check=cli.data.image_check)
        num_rows = convert(samples, folder)
        sys.stdout.write(f"{num_rows} rows in {folder / ROWS}\n")
    return 0


def _fetch(cli: _DataCLI) -> int:
    sources = cli.sources().values()
    downloads = [download for source in sources for download in source.downloads()]
    if not downloads:
        raise UserError(f"{', '.join(map(str, sources))} names no images by URL, there is nothing to fetch")
    report = fetch(downloads, num_threads=cli.config.num_threads)
    sys.stdout.write(f"{report}\n")
    return 1 if report.num_failed else 0
