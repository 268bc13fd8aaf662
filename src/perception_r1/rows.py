r"""One row of annotated data: checked access to its keys, coordinates turned into fractions.

The project's own format is JSON lines. Boxes are `[x1, y1, x2, y2]` and points `[x, y]` in pixels of the original
image, upright (after its EXIF orientation), origin top left.

    grounding   {"image": "a.jpg", "question": "red cup", "box": [10, 20, 50, 80]}
    counting    {"image": "a.jpg", "label": "cup", "points": [[30, 50], [90, 50]]} and/or "count": 2, optionally "boxes"
    detection   {"image": "a.jpg", "objects": [{"box": [10, 20, 50, 80], "label": "cup"}]}, maybe an empty list
    ocr         {"image": "a.jpg", "text": "first line\nsecond line"}

Objects of detection may also have "area" (of the outline, in pixels squared) and "crowd" (true for a region of many).
Every row may also have "width", "height" and "id", a "unit" of its coordinates: "pixels" unless it says "fractions",
"percent" or "thousandths" of the image's width and height, and a "tolerance": pixels, at most one, by which coordinates
may lie outside the image because somebody rounded them; they are cut at its edge.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TypeGuard

from perception_r1.records import Annotation, Box, LabelledBox, Point

_TOLERANCE = 1e-6
"""Pixels by which a coordinate may lie outside the image anyway: rounding of fractions that were turned into pixels."""
_MAX_INTEGER = 2**31 - 1
_UNITS = {"fractions": 1, "percent": 100, "thousandths": 1000}
"""Units that divide width and height alike, by their number in the whole image."""


class RowError(ValueError):
    """A row that cannot be used; the message names the key and says what would be right."""


class Row:
    """A JSON object of the project's own data format with the size of its image in pixels.

    Every method raises `RowError` when its key is missing (or null), of the wrong type or out of range.
    """

    def __init__(self, values: Mapping[str, object], *, width: int, height: int) -> None:
        self.values = values
        self.width = width
        self.height = height
        unit = values.get("unit")
        self._unit = "pixels" if unit is None else unit if isinstance(unit, str) else short_repr(unit)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """A text that is not blank, unless it may be."""
        return _text(self._get(key, "a text"), key, may_be_empty)

    def integer(self, key: str, minimum: int = 0) -> int:
        """A whole number."""
        value = self._get(key, "a whole number")
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= _MAX_INTEGER:
            raise _wrong(key, f"must be a whole number of at least {minimum}", value)
        return value

    def box(self, key: str) -> Box:
        """A box in fractions of the image."""
        return self._box(self._get(key, f"a box [x1, y1, x2, y2] in {self._unit}"), key)

    def boxes(self, key: str) -> tuple[Box, ...]:
        """Boxes in fractions of the image, maybe none."""
        items = self._items(key, "boxes", f"[x1, y1, x2, y2] in {self._unit}")
        return tuple(self._box(item, name) for name, item in items)

    def points(self, key: str) -> tuple[Point, ...]:
        """Points in fractions of the image, maybe none."""
        return tuple(self._point(item, name) for name, item in self._items(key, "points", f"[x, y] in {self._unit}"))

    def objects(self, key: str) -> tuple[Annotation, ...]:
        """Labelled boxes in fractions of the image, maybe none, each with what is told about its area and crowds."""
        items = self._items(key, "objects", '{"box": ..., "label": ...}')
        return tuple(self._object(item, name) for name, item in items)

    def _get(self, key: str, wanted: str) -> object:
        if key not in self:
            raise RowError(f"{key}: is missing, the row needs {wanted} here")
        return self.values[key]

    def _items(self, key: str, plural: str, form: str) -> list[tuple[str, object]]:
        """Names and values of the items of a list."""
        value = self._get(key, f"a list of {plural} {form}")
        if not isinstance(value, list | tuple):
            raise _wrong(key, f"must be a list of {plural}", value)
        return [(f"{key}[{index}]", item) for index, item in enumerate(value)]

    def _object(self, value: object, name: str) -> Annotation:
        if not isinstance(value, Mapping):
            raise _wrong(name, 'must be an object {"box": ..., "label": ...}', value)
        for key in ("box", "label"):
            if value.get(key) is None:
                raise RowError(f'{name}.{key}: is missing, an object needs both "box" and "label"')
        label = _text(value["label"], f"{name}.label", may_be_empty=False)
        return Annotation(
            item=LabelledBox(label=label, box=self._box(value["box"], f"{name}.box")),
            area=_area(value.get("area"), f"{name}.area"),
            is_crowd=_claim(value.get("crowd"), f"{name}.crowd"),
        )

    def _box(self, value: object, name: str) -> Box:
        axes = ("x1", "y1", "x2", "y2")
        x1, y1, x2, y2 = self._fractions(value, name, axes)
        if x1 >= x2 or y1 >= y2:
            wrong = _wrong(name, "must have x1 < x2 and y1 < y2", value)
            if 0 < x2 <= 1 - x1 and 0 < y2 <= 1 - y1:  # as a size they would fit
                raise RowError(f"{wrong}; of x, y, width and height make x, y, x + width and y + height")
            raise wrong
        numbers = _numbers(value, name, axes, self._unit)
        if self._unit == "pixels" and max(numbers) <= 1 and any(number % 1 for number in numbers):
            raise _wrong(name, 'lies within one pixel; fractions of the image need "unit": "fractions"', value)
        return x1, y1, x2, y2

    def _point(self, value: object, name: str) -> Point:
        x, y = self._fractions(value, name, ("x", "y"))
        return x, y

    def _fractions(self, value: object, name: str, axes: tuple[str, ...]) -> tuple[float, ...]:
        """Numbers that are x and y in turn, cut at the edges of the image."""
        numbers = _numbers(value, name, axes, self._unit)
        width, height = extent = self._extent()
        tolerance = self._tolerance()
        margins = tolerance * width / self.width, tolerance * height / self.height
        if not all(-margins[k % 2] <= number <= extent[k % 2] + margins[k % 2] for k, number in enumerate(numbers)):
            raise _wrong(name, f"must lie inside the image of {width} x {height} {self._unit}", value)
        return tuple(min(1.0, max(0.0, number / extent[k % 2])) for k, number in enumerate(numbers))

    def _tolerance(self) -> float:
        """Pixels by which a coordinate may lie outside the image."""
        value = self.values.get("tolerance")
        if value is None:
            return _TOLERANCE
        if not is_number(value) or not 0 <= value <= 1:
            raise _wrong("tolerance", "must be a number of pixels from 0 to 1", value)
        return max(value, _TOLERANCE)

    def _extent(self) -> tuple[int, int]:
        """Width and height of the image in the row's unit."""
        if self._unit == "pixels":
            return self.width, self.height
        if self._unit not in _UNITS:
            raise _wrong("unit", f"must be one of pixels, {', '.join(_UNITS)}", self.values["unit"])
        return _UNITS[self._unit], _UNITS[self._unit]


def object_labels(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Labels of all "objects" of rows, each once, in their order; a bad one makes a bad row, of which the check tells.

    >>> object_labels([{"objects": [{"label": "cup"}, {"label": 7}]}, {}, {"objects": [{"label": "cup"}]}])
    ['cup']
    """
    found: dict[str, None] = {}
    for row in rows:
        objects = row.get("objects")
        for item in objects if isinstance(objects, list | tuple) else ():
            if isinstance(item, Mapping):
                with suppress(RowError):
                    found[Row(item, width=1, height=1).text("label")] = None
    return list(found)


def _text(value: object, name: str, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "must be a text", value)
    if not may_be_empty and not value.strip():
        raise _wrong(name, "must not be blank", value)
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise RowError(f"{name}: must be valid Unicode, got half of a surrogate pair in {short_repr(value)}")
    return value


def _numbers(value: object, name: str, axes: tuple[str, ...], unit: str) -> tuple[float, ...]:
    """As many finite numbers as there are axes."""
    wanted = f"[{', '.join(axes)}] in {unit}"
    if not isinstance(value, list | tuple) or len(value) != len(axes):
        raise _wrong(name, f"must be {wanted}", value)
    for axis, number in zip(axes, value, strict=True):
        if not is_number(number):
            raise RowError(f"{name}: must be {wanted}, but {axis} is {short_repr(number)}, not a number")
        if not _is_finite(number):
            raise RowError(f"{name}: must be {wanted}, but {axis} is not a finite number")
    return tuple(float(number) for number in value)


def _area(value: object, name: str) -> float | None:
    """A number of pixels squared from 0 on, or None when it is not told."""
    if value is None:
        return None
    if not is_number(value) or not _is_finite(value) or value < 0:
        raise _wrong(name, "must be a number of pixels squared from 0 on", value)
    return float(value)


def _claim(value: object, name: str) -> bool:
    """True or false; false when it is not told."""
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "must be true or false", value)
    return bool(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _wrong(name: str, problem: str, value: object) -> RowError:
    return RowError(f"{name}: {problem}, got {short_repr(value)}")


def short_repr(value: object) -> str:
    """A value in a message; Python refuses to print a number of many thousand digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a value that is too long to print"
