"""Sources in JSON: the project's own lines, pages of text as conversations, and the public files of Perception-R1.

A file is a list of objects (`.json`) or has one object a line (any other name). Lines are read when they are asked for;
only where each begins is in memory.
"""

import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perception_r1.data.categories import COCO_NAME_OF
from perception_r1.data.sources.base import DataError, Lazy, Source, SourceRow
from perception_r1.rows import Row, RowError, short_repr

Unit = Literal["pixels", "thousandths", "percent", "fractions"]

_TOLERANCE = 1.0
"""Pixels by which the boxes of the public files may lie outside their image: those of detection are COCO's."""
_AS_JSON = str.maketrans("()'", '[]"')
"""Turns what Python writes, with tuples and single quotes, into JSON."""


class JsonSource(Source):
    """Objects in a JSON file.

    Args:
        file: The file.
        images: Folder to which the paths of images are relative; that of the file unless given.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(self, file: Path, *, images: Path | None = None, take: str = "all", seed: int = 0) -> None:
        super().__init__(take=take, seed=seed)
        self.file = Path(file)
        self.images: Path = self.file.parent if images is None else Path(images)

    @abstractmethod
    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """An entry in the project's own form, "image" included.

        Raises:
            RowError: It cannot be read.
        """

    def read(self) -> Sequence[SourceRow]:
        """See `Source`."""
        try:
            return self._listed() if self.file.suffix == ".json" else self._lines()
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror or error})") from error

    def _listed(self) -> list[SourceRow]:
        """The objects of one JSON list."""
        try:
            values = json.loads(self.file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.file}: must be a JSON list of objects ({error})") from error
        if not isinstance(values, list):
            raise DataError(f"{self.file}: must be a JSON list of objects")
        return [self.row(number, partial(values.__getitem__, number - 1)) for number in range(1, len(values) + 1)]

    def _lines(self) -> Sequence[SourceRow]:
        """The lines of the file that are not blank, read one at a time."""
        self._starts, self._numbers = array("q"), array("q")
        start = 0
        with self.file.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)
        return Lazy(self._line, len(self._starts))

    def _line(self, index: int) -> SourceRow:
        def read() -> object:
            with self.file.open("rb") as file:
                file.seek(self._starts[index])
                return json.loads(file.readline().decode("utf-8-sig"))

        return self.row(self._numbers[index], read)

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.file]

    def __str__(self) -> str:
        return str(self.file)

    def row(self, number: int, read: Any) -> SourceRow:
        """Row number `number` of the file from a function that reads its values."""
        location = f"{self.file}:{number}"
        try:
            values = read()
            if not isinstance(values, dict):
                raise RowError("the line must be a JSON object in braces")
            values = self.convert(values)
            row = Row(values, width=1, height=1)
            image = self.images / row.text("image") if "image" in row else None
            return SourceRow(location=location, number=number, values=values, image=image)
        except RowError as error:
            problem = str(error)
        except UnicodeDecodeError:
            problem = "the line must be UTF-8 text"
        except (ValueError, RecursionError) as error:
            problem = f"the line must be a JSON object ({error})"
        return SourceRow(location=location, number=number, values={}, problem=problem)


class JsonLines(JsonSource):
    """Rows of the project's own form."""

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """They are in it already."""
        return values


class Conversations(JsonSource):
    """Pages with their text as the last turn of a conversation: the form of PageOCR and Fox, as of LLaVA.

    An entry is `{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": TEXT}]}`.
    """

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """Keep the answer of the last turn as the text of the page."""
        turns = values.get("conversations")
        answers = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [turn.get("value") for turn in answers if turn.get("from") in ("gpt", "assistant")]
        if not texts:
            raise RowError('conversations: must have a turn from "gpt" with the text of the page')
        return {"image": values.get("image"), "id": values.get("id"), "text": texts[-1]}


class PerceptionR1(JsonSource):
    """The public files of Perception-R1 and VLM-R1: problem and solution.

    A solution is a box (grounding), points or clicks (counting), a number (counting), a text (ocr), or
    `{"target_id": [COCO's numbers], "target_box": [...]}` (detection). Where there is a `normalized_solution` it is
    preferred: it is in thousandths, whatever the unit of the solution. A text that spells out a list is read as one.

    Args:
        file: The file.
        images: Folder to which the paths of images are relative; that of the file unless given.
        unit: Unit of boxes, points and clicks. Unless given it is that of the public files: thousandths for grounding
            and counting, whose solutions the public code compares with what Qwen2-VL writes, and pixels for detection.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(
        self, file: Path, *, images: Path | None = None, unit: Unit | None = None, take: str = "all", seed: int = 0
    ) -> None:
        super().__init__(file, images=images, take=take, seed=seed)
        self.unit = unit

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.file, str(self.unit)]

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """Tell by the form of the solution what it is."""
        row = {"image": values.get("image"), "id": values.get("id"), "tolerance": _TOLERANCE}
        row["unit"] = self.unit or "thousandths"
        problem = values.get("problem")
        if values.get("clicks") is not None:
            clicks = point_pairs(_spelled(values["clicks"]))
            if not isinstance(clicks, list):
                raise RowError("clicks: must be a list of points")
            return row | {"label": problem, "points": clicks}
        if values.get("normalized_solution") is not None:
            return row | {"question": problem, "box": _spelled(values["normalized_solution"]), "unit": "thousandths"}
        solution = _spelled(values.get("solution"))
        if isinstance(solution, dict):
            return row | {"objects": _objects(solution), "unit": self.unit or "pixels"}
        if isinstance(solution, int | float):
            return row | {"label": problem, "count": solution}
        if isinstance(solution, str):
            return row | {"text": solution}
        if not isinstance(solution, list):
            raise RowError("solution: must be a box, a list of points, a number, a text, or target_id with target_box")
        if len(solution) == 4 and all(isinstance(number, int | float) for number in solution):
            return row | {"question": problem, "box": solution}
        return row | {"label": problem, "points": point_pairs(solution)}


def _spelled(value: object) -> object:
    """The list or object that a text spells out ("[1, 2, 3, 4]"), never evaluated; any other text stays a text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "(", "{")):
        return value
    try:
        return json.loads(value.translate(_AS_JSON))
    except (ValueError, RecursionError):
        return value


def point_pairs(value: Any) -> object:
    """Points as pairs, from pairs, from `{"x": ..., "y": ...}` each, or from all x and all y.

    What is none of these is left for the check of the row.
    """
    if isinstance(value, Mapping):
        xs, ys = value.get("x"), value.get("y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            return None if xs is ys is None else value
        return [list(pair) for pair in zip(xs, ys, strict=True)]
    if isinstance(value, list):
        return [[item.get("x"), item.get("y")] if isinstance(item, Mapping) else item for item in value]
    return value


def _objects(solution: dict[str, Any]) -> list[dict[str, object]]:
    """Objects from the parallel lists of a detection solution."""
    numbers, boxes = solution.get("target_id"), solution.get("target_box")
    if not isinstance(numbers, list) or not isinstance(boxes, list) or len(numbers) != len(boxes):
        raise RowError("solution: target_id and target_box must be lists of the same length")
    unknown = [number for number in numbers if type(number) is not int or number not in COCO_NAME_OF]
    if unknown:
        raise RowError(f"solution: target_id must hold COCO's category numbers, got {short_repr(unknown[0])}")
    return [{"box": box, "label": COCO_NAME_OF[number]} for number, box in zip(numbers, boxes, strict=True)]
