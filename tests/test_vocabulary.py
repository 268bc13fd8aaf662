"""The names that the changelog retires do not come back, and the words of this project alone stay out of the prose."""

import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "configs", "tests", "docs")
SUFFIXES = {".py", ".yaml", ".md"}


def renamed() -> str:
    """The tables of the changelog's section on names."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Renamed\n")[2].partition("\n### ")[0]


def retired_names() -> set[str]:
    """Names in the first columns; a dotted one is left out, its last part is a word that has other uses."""
    rows = [line.split("|")[1] for line in renamed().splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    return {name for name in names if name.isidentifier()}


def documents() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]


def names_of(path: Path) -> set[str]:
    """Identifiers of a Python file, and texts that are nothing but one."""
    tokens = list(tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline))
    texts = {token.string.strip("\"'") for token in tokens if token.type == tokenize.STRING}
    return {token.string for token in tokens if token.type == tokenize.NAME} | {
        text for text in texts if text.isidentifier()
    }


def test_no_retired_name_is_in_use():
    retired = retired_names()
    assert len(retired) > 60
    found = {path.relative_to(ROOT): retired & names_of(path) for path in documents() if path.suffix == ".py"}
    keys = re.compile(r"^\s*(\w+):", re.MULTILINE)
    found |= {
        path.relative_to(ROOT): retired & set(keys.findall(path.read_text(encoding="utf-8")))
        for path in documents()
        if path.suffix == ".yaml"
    }
    assert {str(path): names for path, names in found.items() if names} == {}


def test_no_word_of_this_project_alone_is_left():
    (line,) = re.findall(r"^Gone from all prose: (.*)$", renamed(), re.MULTILINE)
    words = re.findall(r"`(\w+)`", line)
    assert len(words) > 10
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    found = {str(path.relative_to(ROOT)): pattern.findall(path.read_text(encoding="utf-8")) for path in documents()}
    assert {path: words for path, words in found.items() if words} == {}
