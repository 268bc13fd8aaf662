"""The training data of Rex-Omni: images and annotations in tables of tab-separated values.

`X.images.tsv` has a line for each image, its name and its base64. `X.annotations.tsv` has a line for each annotation:
the byte at which the line of its image begins, and JSON. Source of the form: github.com/IDEA-Research/Rex-Omni
(finetuning/dataset/tsv_dataset.py and tools/convert_json_data_to_tsv.py).
"""

import base64
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perception_r1.data.sources.base import DataError, Lazy, Source, SourceRow
from perception_r1.data.sources.solutions import TOLERANCE
from perception_r1.records import ImageBytes
from perception_r1.rows import RowError

_BOXES, _POINTS = ("boxes", "bbox"), ("points", "point")
"""Keys of the list and of what each entry has."""


class RexOmni(Source):
    """Boxes or points with phrases, in pixels of the stored image.

    Args:
        annotations: The file of annotations; the images are beside it under the same name.
        images_file: The file of images, where it is another one.
        rows: What makes a row: "images" for the labelled boxes of an image (detection), "phrases" for what one phrase
            of an image names (counting, and grounding where that is one box). A phrase without a box names nothing.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(
        self,
        annotations: Path,
        *,
        images_file: Path | None = None,
        rows: Literal["images", "phrases"] = "images",
        take: str = "all",
        seed: int = 0,
    ) -> None:
        super().__init__(take=take, seed=seed)
        self.annotations = Path(annotations)
        name = self.annotations.name.replace(".annotations.tsv", ".images.tsv")
        self.images_file = self.annotations.with_name(name) if images_file is None else Path(images_file)
        self.rows = rows

    def read(self) -> Sequence[SourceRow]:
        """See `Source`; only where each line begins, and how many rows it makes, is in memory."""
        self._starts, self._numbers, self._parts = array("q"), array("q"), array("q")
        start = 0
        try:
            self.images_file.stat()
            with self.annotations.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    size = len(_phrases(line)) if self.rows == "phrases" else 1
                    for part in range(max(1, size) if line.strip() else 0):
                        self._starts.append(start)
                        self._numbers.append(number)
                        self._parts.append(part)
                    start += len(line)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror or error})") from error
        return Lazy(self._row, len(self._starts))

    def contents(self) -> Iterable[Path | str]:
        """See `Source`; images, which may be many gigabytes, count by the size of their file."""
        return [self.annotations, str(self.images_file.stat().st_size), self.rows]

    def __str__(self) -> str:
        return str(self.annotations)

    def _row(self, index: int) -> SourceRow:
        location = f"{self.annotations}:{self._numbers[index]}"
        try:
            line = _line(self.annotations, self._starts[index])
            offset, annotation = _fields(line)
            image = ImageBytes(location, partial(self._image, offset))
            values = self._values(annotation, self._parts[index])
            return SourceRow(location=location, number=index + 1, values=values, image=image)
        except RowError as error:
            return SourceRow(location=location, number=index + 1, values={}, problem=str(error))

    def _values(self, annotation: Mapping[str, Any], part: int) -> dict[str, object]:
        """The keys of a row."""
        entries, kind = _entries(annotation)
        row: dict[str, object] = {"unit": "pixels", "tolerance": TOLERANCE}
        if self.rows == "images":
            present = [entry for entry in entries if entry.get(kind) is not None]
            return row | {"objects": [{"box": entry[kind], "label": _phrase(entry)} for entry in present]}
        phrase = list(dict.fromkeys(map(_phrase, entries)))[part] if entries else None
        found = [entry[kind] for entry in entries if _phrase(entry) == phrase and entry.get(kind) is not None]
        if kind == "point":
            return row | {"label": phrase, "points": found}
        single = {"question": phrase, "box": found[0]} if len(found) == 1 else {}
        return row | {"label": phrase, "boxes": found} | single

    def _image(self, offset: int) -> bytes:
        """The bytes of the image whose line begins at an offset.

        Raises:
            ValueError: There is none.
        """
        _, _, encoded = _line(self.images_file, offset).rstrip(b"\r\n").partition(b"\t")
        is_start = offset == 0 or _line(self.images_file, offset - 1) == b"\n"
        if not is_start or not encoded:
            raise ValueError(f"no line of {self.images_file} with an image begins at byte {offset}")
        if encoded.startswith(b"b'"):  # as Python writes bytes
            encoded = encoded[2:-1]
        return base64.b64decode(encoded, validate=True)


def _line(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, start))
        return file.readline()


def _fields(line: bytes) -> tuple[int, Mapping[str, Any]]:
    """Offset and annotation of a line.

    Raises:
        RowError: It has another form.
    """
    number, tab, text = line.rstrip(b"\r\n").partition(b"\t")
    try:
        annotation = json.loads(text.decode("utf-8")) if tab else None
        offset = int(number)
    except (ValueError, RecursionError) as error:
        raise RowError(f"the line must be a number, a tab and a JSON object ({error})") from error
    if not isinstance(annotation, dict):
        raise RowError("the line must be a number, a tab and a JSON object")
    return offset, annotation


def _entries(annotation: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str]:
    """What is annotated, and the key of its place."""
    for name, kind in (_BOXES, _POINTS):
        found = annotation.get(name)
        if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
            return found, kind
    raise RowError("boxes: is missing, the annotation needs a list of boxes or points here")


def _phrase(entry: Mapping[str, Any]) -> object:
    phrase = entry.get("phrase", entry.get("caption"))
    return phrase if isinstance(phrase, str) else None


def _phrases(line: bytes) -> list[object]:
    """The different phrases of a line; none where it cannot be read, of which its row tells."""
    try:
        return list(dict.fromkeys(map(_phrase, _entries(_fields(line)[1])[0])))
    except RowError:
        return []
