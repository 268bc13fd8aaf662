"""The data that commands of the documentation name: example rows with their images, public data sets in small."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from tests.public_data import make_coco, make_fox, make_pageocr, make_perception_r1, make_refcoco
from tests.readme import DOCUMENTS, blocks, file_blocks

KEYS = {"grounding": "question", "counting": "label", "detection": "objects", "ocr": "text"}
"""A key by which an example row can be told from those of other tasks."""
PUBLIC: dict[str, Callable[[Path], None]] = {
    "coco": make_coco,
    "refcoco": make_refcoco,
    "fox": make_fox,
    "pageocr": make_pageocr,
    "pixmo_count": lambda root: None,
    "perception_r1_all": lambda root: [make(root) for make in (make_perception_r1, make_pageocr)],
}
"""What makes the public data sets of commands."""
EXAMPLE_FILES = file_blocks("docs/configuration.md")
"""Configurations that commands of the documentation name."""


def example_rows() -> list[dict[str, Any]]:
    """The rows of all JSON blocks, each once."""
    lines = [line for document in DOCUMENTS for block in blocks(document, "json") for line in block.splitlines()]
    return [json.loads(line) for line in dict.fromkeys(lines)]


def task_of(row: dict[str, Any]) -> str:
    (task,) = (task for task, key in KEYS.items() if key in row)
    return task


def write_data(arguments: Sequence[str], place: Path) -> None:
    """Every file that a command names: examples as they stand, rows of its task, and public data sets in small."""
    for path, text in EXAMPLE_FILES.items():
        if path in arguments:
            (place / path).write_text(text, encoding="utf-8")
            arguments = [*arguments, *re.findall(r"[\w.]+\.jsonl", text)]
    if option(arguments, "--data") in PUBLIC:
        PUBLIC[str(option(arguments, "--data"))](place / "data")
    is_score = arguments[0] == "score"
    task = option(arguments, "--task")
    rows = [row for row in example_rows() if task_of(row) == task and ("completion" in row) == is_score]
    for path in [place / argument for argument in arguments if argument.endswith(".jsonl")]:
        copies = 1 if is_score else max(2, 6 // len(rows))
        write_rows(path, [numbered(row, path.stem, copy) for copy in range(copies) for row in rows])


def numbered(row: dict[str, Any], stem: str, copy: int) -> dict[str, Any]:
    """The row with an image of its own, so that images can be held out."""
    return {**row, "image": f"{stem}-{copy}-{row['image']}"} if "image" in row else row


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A data file and its pictures."""
    for index, row in enumerate(rows):
        if "image" in row:
            image = path.parent / row["image"]
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (420, 252), (index % 256, 90, 160)).save(image)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option."""
    values = [value for key, value in pairwise(arguments) if key == name]
    return values[-1] if values else None
