"""HTML from elements. Whatever is not made here is text, and is escaped: what a model wrote cannot become markup."""

import html
import json
from collections.abc import Iterable
from itertools import count

_VOID = frozenset({"br", "input", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """An element with its children; text among them is escaped.

    Args:
        name: Of the element.
        *children: Text or `Markup`.
        **attributes: By name, "_" for "-" and one at the end left out (`class_`); True is an attribute without a value,
            and one that is None or False is left out.

    >>> element("p", "a < b", element("b", "!"), class_="note", data_run=1, hidden=None)
    '<p class="note" data-run="1">a &lt; b<b>!</b></p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    written = "".join(
        f" {key}" if value is True else f' {key}="{_escaped(str(value))}"'
        for key, value in given.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Children one after the other, text among them escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def data_element(identifier: str, data: object) -> Markup:
    r"""Data for the script, as JSON in which nothing can end the element.

    >>> data_element("data", {"completion": "</script><!--"})
    '<script type="application/json" id="data">{"completion":"\\u003c/script\\u003e\\u003c!--"}</script>'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # in ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{_escaped(identifier)}">{text}</script>')


def table(head: Iterable[str], rows: Iterable[Iterable[str]], **attributes: str | None) -> Markup:
    """A table; the first cell of each row is its heading."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [element("tr", *map(_cell, count(), row)) for row in rows]
    return element("table", element("thead", top), element("tbody", *body), **attributes)


def _cell(index: int, content: str) -> Markup:
    return element("td", content) if index else element("th", content, scope="row")


def _escaped(text: str) -> str:
    """Text as HTML has it; half a surrogate pair, which no file can hold, becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode())
