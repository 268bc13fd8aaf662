"""How the tests read the documentation: fenced blocks, commands, tables, and the files that blocks stand for."""

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
"""Every document whose commands are run."""

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_BLOCK = re.compile(r"^`(?P<path>[^`\n]+)`:\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def read(document: str) -> str:
    """The text of a document of the repository."""
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document: str) -> str:
    """The text without its fenced blocks."""
    return _BLOCK.sub("", read(document))


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language in a document, in order."""
    return [match["text"] for match in _BLOCK.finditer(read(document)) if match["language"] == language]


def commands(document: str) -> list[str]:
    """Every line of every bash block, comments left out."""
    lines = [line.partition("  #")[0].strip() for block in blocks(document, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def repeated(lines: Sequence[str]) -> set[str]:
    """Commands that train and make no choice which those before them have not made."""
    seen: set[str] = set()
    found = set()
    for line in lines:
        if re.match(r"make (train|sft)\b|\S*perception-r1 fit\b", line):
            made = choices(line)
            if made <= seen:
                found.add(line)
            seen |= made
    return found


def choices(line: str) -> set[str]:
    """What the command line of a run decides: its verb, names of configurations, kinds of files, options."""
    words = [part for word in shlex.split(line) for part in shlex.split(word.removeprefix("ARGS="))]
    made = {" ".join(words[:2])}
    for word, value in pairwise([*words, ""]):
        name, is_assigned, values = word.partition("=")
        if word in ("--task", "--model", "--data", "--recipe", "--variant", "--protocol"):
            made.add(f"{name[2:].upper()}={Path(value).suffix or value}")
        elif word.startswith("-"):
            made.add(word)
        elif is_assigned:
            made |= {f"{name}={Path(part).suffix or part}" for part in values.split()}
    return made


def file_blocks(document: str) -> dict[str, str]:
    """The blocks that follow a path and a colon: path -> text."""
    return {match["path"]: match["text"] for match in _FILE_BLOCK.finditer(read(document))}


def table(document: str, header: str) -> list[list[str]]:
    """The cells of the first table whose header line begins with these words, header and rule left out."""
    lines = read(document).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(header)) + 2
    end = next(index for index in range(start, len(lines) + 1) if not "".join(lines[index : index + 1]).startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def names(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)
