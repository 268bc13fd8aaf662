"""Any source as JSON lines of the project's own form."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from perception_r1.errors import UserError
from perception_r1.locks import locked
from perception_r1.records import ImageBytes, UnloadedSample

ROWS = "data.jsonl"
_IMAGES = "images"


def convert(samples: Iterable[UnloadedSample[Any]], folder: Path) -> int:
    """Write samples to `data.jsonl` in a folder; images that lie in tables become files beside it.

    Images in files stay where they are: the rows name them by their path from the folder.

    Returns:
        Number of rows written.

    Raises:
        UserError: There is such a file already, or another process writes to the folder.
    """
    with locked(folder, "a conversion", name=".lock"):
        path = folder / ROWS
        if path.exists():
            raise UserError(f"{path} exists; move it away, or choose another folder.")
        draft = folder / (ROWS + ".tmp")
        num_rows = _write(samples, draft)
        draft.replace(path)
    return num_rows


def _write(samples: Iterable[UnloadedSample[Any]], path: Path) -> int:
    """Write the rows, and images from tables beside them; returns the number of rows."""
    written: dict[str, str] = {}
    num_rows, folder = 0, path.parent
    with path.open("w", encoding="utf-8") as lines:
        for sample in samples:
            if isinstance(sample.image, ImageBytes):
                if sample.image.name not in written:
                    written[sample.image.name] = _save(sample.image, folder, len(written))
                image = written[sample.image.name]
            else:
                image = os.path.relpath(sample.image, folder)
            known = {"id": sample.id, "image": image, "width": sample.width, "height": sample.height}
            row = {key: value for key, value in sample.row.items() if value is not None}
            lines.write(json.dumps(row | known) + "\n")
            num_rows += 1
    return num_rows


def _save(source: ImageBytes, folder: Path, number: int) -> str:
    """Write the bytes of an image as they are; its path from the folder."""
    data = source.read()
    with Image.open(io.BytesIO(data)) as image:
        suffix = (image.format or "img").lower()
    path = Path(_IMAGES) / f"{number:06d}.{suffix}"
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(data)
    return str(path)
