"""Parts that several sections of a report are made of."""

from perception_r1.reporting.html import Markup, element

NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
"""What stands where there is no number, and before one below zero."""


def section(identifier: str, title: str, *children: str) -> Markup:
    """A section under a heading."""
    heading = element("h2", title, id=f"{identifier}-title")
    return element("section", heading, *children, id=identifier, aria_labelledby=f"{identifier}-title")


def scrolling(content: Markup) -> Markup:
    """Something wide, which scrolls by itself; also with the keyboard."""
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label="Table")


def note(text: str) -> Markup:
    """A remark in small letters."""
    return element("p", text, class_="note")


def chip(run: int, name: str) -> Markup:
    """The name of a run in its colour."""
    return element("span", name, class_=f"chip r{run}")


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> [duration(seconds) for seconds in (0.5, 75, 7260)]
    ['0.5 s', '1 min 15 s', '2 h 1 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
