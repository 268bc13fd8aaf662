"""How the tests read the documentation: fenced blocks, commands, and the files that blocks stand for."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_BLOCK = re.compile(r"^`(?P<path>[^`\n]+)`:\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language in a document of the repository, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [match["text"] for match in _BLOCK.finditer(text) if match["language"] == language]


def commands(document: str) -> list[str]:
    """Every line of every bash block, comments left out."""
    lines = [line.partition("  #")[0].strip() for block in blocks(document, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def file_blocks(document: str) -> dict[str, str]:
    """The blocks that follow a path and a colon: path -> text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return {match["path"]: match["text"] for match in _FILE_BLOCK.finditer(text)}
