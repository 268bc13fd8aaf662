"""Tables in pages of the documentation, written by the programs that measured what they show."""

import re
from collections.abc import Iterable, Mapping, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def fill(page: str, program: str, tables: Mapping[str, str]) -> str:
    """A page with the tables of a program written anew, each from `<!-- PROGRAM: NAME -->` to `<!-- end -->`."""
    return re.sub(
        rf"(<!-- {program}: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )
