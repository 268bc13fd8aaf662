"""The settings of the runs: those that differ, and all of them."""

from collections.abc import Collection, Mapping, Sequence

from perception_r1.reporting.comparison import MISSING, differing, settings_of
from perception_r1.reporting.folder import Record
from perception_r1.reporting.html import Markup, element, table
from perception_r1.reporting.parts import scrolling, section


def settings_section(records: Sequence[Record], names: Sequence[str]) -> Markup:
    """The settings that differ between the runs, and all of them."""
    settings = [settings_of(record) for record in records]
    different = differing(settings)
    every = dict.fromkeys(name for each in settings for name in each)
    parts: list[str] = []
    if len(records) > 1:
        told = f"{len(different)} of {len(every)} settings differ." if different else "All settings are the same."
        parts.append(element("p", told))
        if different:
            parts.append(_table(names, different, settings))
    everything = _table(names, list(every), settings, set(different))
    parts.append(element("details", element("summary", f"All {len(every)} settings"), everything))
    return section("settings", "Settings", *parts)


def _table(
    runs: Sequence[str],
    names: Sequence[str],
    settings: Sequence[Mapping[str, str]],
    marked: Collection[str] = (),
) -> Markup:
    rows = [
        [
            element("mark", name) if name in marked else name,
            *(element("code", each.get(name, MISSING)) for each in settings),
        ]
        for name in names
    ]
    return scrolling(table(["setting", *runs], rows, class_="settings"))
