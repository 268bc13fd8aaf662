"""`perception-r1 data check|stats|convert|fetch`: inspect data before a run, with the configuration of that run."""

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console
from rich.table import Table

from perception_r1.codecs import Codec
from perception_r1.commands import statistics
from perception_r1.commands.compose import compose
from perception_r1.commands.configuration import PARSER, ConfiguredCLI
from perception_r1.commands.options import new_parser, parse, run_command
from perception_r1.commands.reader import load_reader, sample_check
from perception_r1.data.convert import ROWS, convert
from perception_r1.data.fetch import fetch
from perception_r1.data.loading import load_sample_image
from perception_r1.data.mixed import parts_of
from perception_r1.data.module import TaskDataModule
from perception_r1.data.samples import check, load
from perception_r1.data.sources import Source
from perception_r1.drawing import contact_sheet, draw_card
from perception_r1.errors import UserError
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample
from perception_r1.task import Task

_DESCRIPTION = "Inspect data before a run, with the configuration of that run."
_VERBS = (
    "check: read every row and picture, name each bad row, show three samples as the model is to answer them; "
    "stats: sizes, tokens, objects; convert: any source to JSON lines of the project's own form; "
    "fetch: the pictures that a source names by URL"
)
_NUM_SHOWN = 3
"""Samples whose answers are written out and drawn, at least one of each source."""


class NamedSource(NamedTuple):
    """A source, and the data module of the task that reads it."""

    name: str
    part: TaskDataModule
    source: Source


class DataCLI(ConfiguredCLI):
    """The configuration of a run, of which only data, task and the model's processor are used.

    There is no trainer: the data of a run on eight devices can be inspected on a laptop.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options besides those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--split", type=Literal["train", "val", "test"], default="train", help="Rows to read.")
        parser.add_argument("--to", type=Path | None, default=None, help="Folder for what is written.")
        parser.add_argument("--num_threads", type=int, default=16, help="Pictures that are fetched at once.")

    def sources(self) -> list[NamedSource]:
        """Sources of the split.

        Raises:
            UserError: The configuration has synthetic scenes, or no rows of the split.
        """
        parts = {name: part for name, part in parts_of(self.datamodule).items() if part.sources}
        if not parts:
            raise UserError(
                "synthetic scenes need no check and no conversion; give --data, a name or a file of JSON lines"
            )
        found = []
        for part_name, part in parts.items():
            sources = part.sources.get(self.config.split) or part.sources.get("train")
            if sources is None:
                known = " or ".join(f"--split {split}" for split in part.sources)
                raise UserError(f"the configuration has no {self.config.split} rows; give {known}")
            for name, source in sources.items():
                found.append(NamedSource("/".join(filter(None, (part_name, name))), part, source))
        return found

    @cached_property
    def reader(self) -> tuple[Codec, Processor]:
        """How the model reads."""
        return load_reader(self.model.policy_config)


def main(argv: Sequence[str]) -> int:
    """Run one verb; the result is the exit status: 1 where `check` found a bad row or `fetch` failed on a picture."""
    return run_command("data", _run, argv)


def _run(argv: Sequence[str]) -> int:
    verbs = {"check": _check, "stats": _stats, "convert": _convert, "fetch": _fetch}
    parser = new_parser("data", _DESCRIPTION, "`perception-r1 data check --help` shows the options.")
    parser.add_argument("verb", choices=verbs, help=_VERBS)
    verb: str = parse(parser, argv[:1]).verb
    parser_kwargs = PARSER | {"prog": f"perception-r1 data {verb}", "description": _DESCRIPTION}
    return verbs[verb](DataCLI(compose(argv[1:]), run=False, save_config_callback=None, parser_kwargs=parser_kwargs))


def _check(cli: DataCLI) -> int:
    to = cli.config.to
    try:
        if to is not None:
            to.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--to {to} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    num_rows = num_bad = 0
    shown: list[tuple[Task[Any, Any], Sample[Any]]] = []
    sources, (_, processor) = cli.sources(), cli.reader
    for _, part, source in sources:
        check_sample = sample_check(processor, part.task, cli.model.policy_config.max_prompt_length)
        num_shown = 0
        for checked in check(source, part.task, image_check=part.image_check, check_sample=check_sample):
            num_rows += 1
            if checked.sample is None:
                num_bad += 1
                sys.stdout.write(f"{checked.problem}\n")
            elif num_shown < max(1, _NUM_SHOWN // len(sources)):
                shown.append((part.task, checked.sample))
                num_shown += 1
    sys.stdout.write(f"{num_rows} rows, {num_bad} of them bad\n")
    if shown:
        _show(cli, shown, to or Path("logs") / "data")
    return int(num_bad > 0)


def _show(cli: DataCLI, shown: Sequence[tuple[Task[Any, Any], Sample[Any]]], to: Path) -> None:
    """Write out and draw what the model is to answer; the drawn answer was read back from that text."""
    cards, (codec, processor) = [], cli.reader
    for task, sample in shown:
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
                fields={
                    "prompt": task.prompt(sample.query),
                    "target": task.describe(sample.target),
                    "answer": answer,
                },
                target_overlays=task.overlays(sample.target),
                predicted_overlays=[] if prediction is None else task.overlays(prediction),
            )
        )
    if cards:
        to.mkdir(parents=True, exist_ok=True)
        path = to / f"{cli.datamodule.task.name}.png"
        contact_sheet(cards, num_columns=1).save(path)
        sys.stdout.write(f"drawn in {path}\n")


def _stats(cli: DataCLI) -> int:
    parts, (codec, processor) = parts_of(cli.datamodule), cli.reader
    for part_name, part in parts.items():
        if not part.sources:
            part.setup()
            scenes = part.samples(cli.config.split)
            found = statistics.collect_statistics(scenes, part.task, codec, processor)
            get_console().print(_table(cli, f"{part_name} synthetic scenes".strip(), found))
    for name, part, source in cli.sources() if any(part.sources for part in parts.values()) else ():
        checked = check(source, part.task, image_check="header")
        samples = (row.sample for row in checked if row.sample is not None)
        found = statistics.collect_statistics(samples, part.task, codec, processor)
        get_console().print(_table(cli, name or cli.config.split, found))
    for part in parts.values():
        for sentence in statistics.shared_images(part.sources):
            sys.stdout.write(f"{sentence}\n")
    return 0


def _table(cli: DataCLI, title: str, found: statistics.DatasetStatistics) -> Table:
    def limited(values: Sequence[int], limit: int | None) -> str:
        share = statistics.share_over(values, limit)
        return spread(values) + ("" if share is None else f"; {share:.2%} over {limit}")

    spread, num_objects = statistics.spread, found.num_objects
    rows = {
        "samples": str(len(found.widths)),
        "different images": str(len(found.images)),
        "image width (least, median, most)": spread(found.widths),
        "image height": spread(found.heights),
        "images the model cannot take": str(found.num_refused),
        "prompt tokens": limited(found.prompt_tokens, cli.model.policy_config.max_prompt_length),
        "answer tokens": limited(found.answer_tokens, cli.model.max_new_tokens),
        "samples without an answer to learn from": str(found.num_without_answer),
        "objects": spread(num_objects),
        "objects, mean": f"{sum(num_objects) / max(1, len(num_objects)):.2f}",
        "log10 of the mean n!": f"{statistics.log10_mean_factorial(num_objects):.2f}" if num_objects else "-",
    }
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _convert(cli: DataCLI) -> int:
    if cli.config.to is None:
        raise UserError("convert needs --to FOLDER")
    for name, part, source in cli.sources():
        folder = cli.config.to / name
        samples = load(source, part.task, on_bad_row=part.on_bad_row, image_check=part.image_check)
        sys.stdout.write(f"{convert(samples, folder)} rows in {folder / ROWS}\n")
    return 0


def _fetch(cli: DataCLI) -> int:
    sources = [named.source for named in cli.sources()]
    downloads = [download for source in sources for download in source.downloads()]
    if not downloads:
        raise UserError(f"{', '.join(map(str, sources))} names no images by URL, there is nothing to fetch")
    report = fetch(downloads, num_threads=cli.config.num_threads)
    sys.stdout.write(f"{report}\n")
    return int(report.num_failed > 0)
