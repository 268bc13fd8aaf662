"""The page as a whole: one file with its style, its script, its data and its pictures, which loads nothing."""

import base64
import hashlib
import string
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perception_r1 import __version__
from perception_r1.reporting.cards import Cards, make_cards
from perception_r1.reporting.curves import Curve, grouped, read_curves
from perception_r1.reporting.folder import Record
from perception_r1.reporting.html import Markup, data_element, element
from perception_r1.reporting.overview import runs_section
from perception_r1.reporting.parts import note, section
from perception_r1.reporting.phases import time_section
from perception_r1.reporting.reproduction import reproduction_section
from perception_r1.reporting.results import results_section
from perception_r1.reporting.settings import settings_section

MARK = '<meta name="generator" content="perception-r1 report">'
"""By which a file is known as a report."""
_PAGE, _STYLES = Path(__file__).parent / "page", Path(__file__).parents[1] / "styles"
_SCRIPTS = ("elements.js", "curves.js", "cards.js", "report.js")
_LINKS = {"results": "Results", "curves": "Curves", "samples": "Samples", "time": "Time", "settings": "Settings"}
_LINKS |= {"again": "Again"}


def make_document(records: Sequence[Record], *, num_cards: int) -> str:
    """The HTML of a report.

    Args:
        records: At least one run or evaluation.
        num_cards: Samples that are shown at most.
    """
    names = names_of([record.folder for record in records])
    letters = list(string.ascii_uppercase[: len(names)]) if len(names) > 1 else names
    both = [f"{letter} {name}" for letter, name in zip(letters, names, strict=True)] if len(names) > 1 else names
    curves = [{} if record.is_evaluation else read_curves(record.folder) for record in records]
    cards = make_cards(records, num_cards)
    style = _text(_STYLES / "base.css") + _text(_PAGE / "report.css")
    script = "\n".join(_text(_PAGE / name) for name in _SCRIPTS)
    data = {"runs": letters, "names": both, "curves": _curve_data(curves)}
    data |= {"columns": _columns(cards), "cards": cards.cards}
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(MARK),
        element("title", f"{', '.join(names)} · perception-r1"),
        Markup(f"<style>{style}</style>"),
    )
    body = element(
        "body",
        _header(len(records)),
        element(
            "main",
            runs_section(records, both),
            results_section(records, letters),
            _curves_section(any(curves)),
            _cards_section(cards, records)
            if num_cards
            else section("samples", "Samples", note("None were asked for.")),
            time_section(records, letters, curves),
            settings_section(records, letters),
            reproduction_section(records, both),
        ),
        data_element("data", data),
        data_element("images", cards.images),
        Markup(f"<script>{script}</script>"),
    )
    return f'<!doctype html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell the folders apart, two parts at least.

    >>> names_of([Path("/a/logs/counting/version_0"), Path("/b/logs/counting/version_0"), Path("/c/logs/ocr/eval-1")])
    ['a/logs/counting/version_0', 'b/logs/counting/version_0', 'c/logs/ocr/eval-1']
    >>> names_of([Path("/a/logs/counting/version_0")])
    ['counting/version_0']
    """
    parts = [folder.resolve().parts[1:] for folder in folders]
    longest = max(len(each) for each in parts)
    for length in range(2, longest):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(each) for each in parts]


def _policy(style: str, script: str) -> str:
    """What the page may do: show its own pictures, and use this style and this script, known by their digests."""
    digests = {"style-src": style, "script-src": script}
    own = "; ".join(f"{kind} 'sha256-{_digest(text)}'" for kind, text in digests.items())
    return f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _header(num_runs: int) -> Markup:
    links = [element("a", label, href=f"#{identifier}") for identifier, label in _LINKS.items()]
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    what = "Report" if num_runs == 1 else f"Report of {num_runs} runs"
    told = element("p", f"{what}, written {written} with version {__version__}")
    return element("header", element("h1", "perception-r1"), told, element("nav", *links, aria_label="Sections"))


def _curve_data(curves: Sequence[Mapping[str, Curve]]) -> list[dict[str, Any]]:
    """Groups of charts; a chart has a series for each run that logged its tag."""
    tags = list(dict.fromkeys(tag for each in curves for tag in each))
    return [{"name": name, "charts": [_chart(tag, curves) for tag in found]} for name, found in grouped(tags)]


def _chart(tag: str, curves: Sequence[Mapping[str, Curve]]) -> dict[str, Any]:
    series = []
    for run, each in enumerate(curves):
        if tag in each:
            curve = each[tag]
            one = {"run": run, "steps": curve.steps, "values": curve.values, "numSteps": curve.num_steps}
            if any(margin is not None for margin in curve.margins):
                one["margins"] = curve.margins
            series.append(one)
    return {"tag": tag, "series": series}


def _curves_section(has_any: bool) -> Markup:
    if not has_any:
        return section("curves", "Curves", note("No curves: nothing was logged here."))
    slider = element("input", type="range", id="smoothing", min=0, max=99, value=60)
    smoothing = element("label", "Smoothing ", slider, element("output", "0.60", for_="smoothing"))
    controls = element("div", smoothing, element("div", id="legend", class_="legend"), class_="controls")
    scriptless = element("noscript", note("The curves and the samples need a script."))
    return section("curves", "Curves", controls, scriptless, element("div", id="charts"))


def _columns(cards: Cards) -> list[dict[str, Any]]:
    return [{"run": column.run, "when": column.when} for column in cards.columns]


def _cards_section(cards: Cards, records: Sequence[Record]) -> Markup:
    if not cards.cards:
        told = "No answers were kept: --before_after.enabled and --log_samples.num_samples decide about them."
        return section("samples", "Samples", note(told))
    splits = " and ".join(dict.fromkeys(record.split for record in records))
    told = f"{len(cards.cards)} of {cards.num_samples:,} answered samples of the {splits} split"
    if len(cards.cards) < cards.num_samples:
        told += (
            ": those that gained or lost most, the worst, and others at even distances, so that the page stays small"
        )
    label = "Samples, one at a time: the arrow keys turn over"
    box = element("div", id="cards", tabindex="0", role="group", aria_label=label)
    return section("samples", "Samples", note(f"{told}."), box)
