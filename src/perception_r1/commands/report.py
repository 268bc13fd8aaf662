"""`perception-r1 report`: what runs left behind, in one HTML page."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from perception_r1.commands.options import new_parser, parse, run_command
from perception_r1.errors import UserError
from perception_r1.reporting.document import MARK, make_document
from perception_r1.reporting.folder import read_record

MAX_RUNS = 8
"""On a page: more colours could not be told apart."""
_HEAD = 4096
"""Bytes of a file in which a report shows itself as one."""


def main(argv: Sequence[str]) -> int:
    """Write a report; the result is the exit status."""
    return run_command("report", _report, argv)


def _report(argv: Sequence[str]) -> int:
    parser = new_parser(
        "report",
        "Write one HTML page about runs and evaluations: results, curves, samples, time, settings.",
        "The page needs no other file and no network. Runs may be of any tasks, going on, or broken off.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of runs or evaluations: logs/TASK/version_N.")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="File to write; a report is replaced.")
    parser.add_argument("--num_cards", type=int, default=96, help="Samples to page through, at most.")
    options = parse(parser, argv)
    if options.num_cards < 0:
        raise UserError(f"--num_cards is {options.num_cards}; it must be 0 or more")
    if len(options.runs) > MAX_RUNS:
        raise UserError(f"{len(options.runs)} runs are too many for one page: give at most {MAX_RUNS}")
    check_output(options.output)
    records = [read_record(folder) for folder in options.runs]
    text = make_document(records, num_cards=options.num_cards)
    _write(options.output, text)
    sys.stderr.write(f"Wrote {options.output} ({len(text) / 2**20:.1f} MB): open it in a browser.\n")
    return 0


def check_output(path: Path) -> None:
    """Refuse to write over anything but another report.

    Raises:
        UserError: Something else lies there.
    """
    if not path.exists():
        return
    is_report = False
    if path.is_file():
        with path.open("rb") as file:
            is_report = MARK.encode() in file.read(_HEAD)
    if not is_report:
        raise UserError(f"--output {path} exists and is no report: give another name, nothing else is overwritten")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}-{os.getpid()}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
