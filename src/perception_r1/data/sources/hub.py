"""Sources read through the `datasets` library: any data set of the hub or parquet file, told which column is what.

Tables stay on disk, memory-mapped; an image in a table is read when it is asked for.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from perception_r1.data.sources.base import DataError, Lazy, Source, SourceRow
from perception_r1.data.sources.solutions import TOLERANCE, Unit, point_pairs, problem_text, solution_keys
from perception_r1.errors import UserError
from perception_r1.records import ImageBytes, ImageSource
from perception_r1.rows import RowError, is_number

_TEXTS = ("question", "label", "text")
"""Keys whose column may hold a list: one row for each text."""
_KEYS = ("image", "id", "question", "label", "text", "count", "box", "boxes", "points", "objects.box", "objects.label")
_OTHERS = ("problem", "solution")
"""Keys of other trainers."""
_TABLES = frozenset((".parquet", ".arrow", ".json", ".jsonl", ".csv"))
"""Files of a folder that hold rows; all others are images or notes."""


class Hub(Source):
    """A data set with one image per entry.

    Args:
        path: Hub id, a parquet or JSON file, or a folder (of such files, or one that `datasets` has saved).
        columns: Key of the project's own form -> column that holds it: image, id, question, label, text, count, box,
            boxes, points, objects.box, objects.label. A dot leads into a nested column. Numbers of categories become
            their names where the data set knows them; a column of several questions, labels or texts makes a row of
            each. Data sets of other trainers have problem and solution instead, see `data/sources/solutions.py`.
        split: Split of the data set; a single file has none.
        name: Its configuration, where it has several.
        revision: Commit or tag on the hub; the newest unless given.
        images: Folder of the images, where the image column holds paths.
        corners: Boxes are given by two corners; otherwise by a corner, width and height.
        unit: Unit of coordinates.
        take: See `Source`.
        seed: See `Source`.

    Raises:
        UserError: A key is unknown, or no column holds the image, or objects have no boxes or no labels.
    """

    def __init__(
        self,
        path: str,
        columns: dict[str, str],
        *,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        images: Path | None = None,
        corners: bool = True,
        unit: Unit = "pixels",
        take: str = "all",
        seed: int = 0,
    ) -> None:
        super().__init__(take=take, seed=seed)
        unknown = [key for key in columns if key not in (*_KEYS, *_OTHERS)]
        if unknown or "image" not in columns:
            problem = f"has the unknown key {unknown[0]!r}" if unknown else "does not say which column holds the image"
            raise UserError(f"columns: {problem}; its keys are {', '.join((*_KEYS, *_OTHERS))}")
        if ("objects.box" in columns) != ("objects.label" in columns):
            raise UserError("columns: objects.box and objects.label belong together, but only one of them is there")
        self.path, self.split, self.name, self.revision = str(path), split, name, revision
        self.columns = dict(columns)
        self.images = None if images is None else Path(images)
        self.corners = corners
        self.unit: Unit = unit

    def read(self) -> Sequence[SourceRow]:
        """See `Source`."""
        image = self.columns["image"]
        missing = [column for column in self.columns.values() if self._feature(column) is None]
        if missing or image not in self.table.column_names:
            known = ", ".join(self.table.column_names)
            raise DataError(f"{self.path}: has no column {(missing or [image])[0]!r}, only {known}")
        # the column holds paths or images, as bytes or in the library's own form: an object with bytes or a path; or
        # lists of such
        feature = self._feature(image)
        feature = getattr(feature, "feature", feature)
        is_own = isinstance(feature, _datasets().Image) or (isinstance(feature, Mapping) and "bytes" in feature)
        dtype = getattr(feature, "dtype", None)
        self._has_images = is_own or dtype in ("binary", "large_binary")
        if not self._has_images and dtype not in ("string", "large_string"):
            raise DataError(f"{self.path}: must hold images or paths in column {image!r}, not {feature}")
        # keys whose column holds lists of texts
        self._several = [key for key in _TEXTS if hasattr(self._feature(self.columns.get(key, "")), "feature")]
        self._images = self._select([image])
        self._values = self._select([column for key, column in self.columns.items() if key != "image"] or [image])
        self._entries, self._parts = array("q", range(len(self._values))), array("q", [0] * len(self._values))
        if self._several:
            self._entries, self._parts = array("q"), array("q")
            for number, entry in enumerate(self._select([self.columns[key] for key in self._several])):
                size = max(1, *(len(found) for found in self._texts(entry).values()))
                self._entries.extend([number] * size)
                self._parts.extend(range(size))
        return Lazy(self._row, len(self._entries))

    def _select(self, columns: Iterable[str]) -> Any:
        """The table with nothing but these columns, the whole of those that are nested."""
        return self.table.select_columns(list(dict.fromkeys(column.split(".")[0] for column in columns)))

    def contents(self) -> Iterable[Path | str]:
        """See `Source`; a data set of the hub counts by its name, revision and number of entries."""
        settings = [self.split, str(self.name), str(self.revision), str(self.corners), self.unit]
        columns = [f"{key}={column}" for key, column in self.columns.items()]
        path = Path(self.path)
        if path.is_file():
            return [path, *settings, *columns]
        if not path.is_dir():
            return [self.path, str(len(self.table)), *settings, *columns]
        named: list[Path | str] = []
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            named.append(f"{file.relative_to(path).as_posix()} {file.stat().st_size}")
            if file.suffix in _TABLES:
                named.append(file)
        return [*named, *settings, *columns]

    def labels(self) -> tuple[str, ...]:
        """The categories that the data set knows by number, else those in use."""
        names = self._names_of(self.columns.get("objects.label", ""))
        return super().labels() if names is None else tuple(names)

    @property
    def hub_id(self) -> str | None:
        """See `Source`."""
        path = Path(self.path)
        return None if path.suffix in _TABLES or path.exists() else self.path

    def __str__(self) -> str:
        return f"{self.path} ({self.split})"

    @cached_property
    def table(self) -> Any:
        """The data set, its images not decoded.

        Raises:
            DataError: It cannot be read.
        """
        datasets = _datasets()
        path = Path(self.path)
        if path.suffix in _TABLES and not path.exists():
            raise DataError(f"{self.path}: no such file")
        try:
            if path.is_file():
                kind = "parquet" if path.suffix == ".parquet" else "json"
                table = datasets.load_dataset(kind, data_files=str(path), split="train")
            elif (path / "state.json").is_file():
                table = datasets.load_from_disk(str(path))
            elif (path / "dataset_dict.json").is_file():
                table = datasets.load_from_disk(str(path))[self.split]
            else:
                table = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises errors of many kinds, its own and those of the network
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{self.path}: cannot be read as a data set ({reason[0]})") from error
        for column, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return table

    def values(self, entry: Mapping[str, Any]) -> dict[str, object]:
        """An entry without its image in the project's own form.

        Raises:
            RowError: Its objects have not as many boxes as labels.
        """
        found = {
            key: self._named(column, _follow(entry, column)) for key, column in self.columns.items() if key != "image"
        }
        row: dict[str, object] = {key: value for key, value in found.items() if not key.startswith("objects.")}
        if "solution" in row:
            row |= solution_keys(problem_text(row.pop("problem", None)), row.pop("solution"))
        if "box" in row:
            row["box"] = self._box(row["box"])
        if isinstance(boxes := row.get("boxes"), list):
            row["boxes"] = [self._box(box) for box in boxes]
        if "points" in row:
            row["points"] = point_pairs(row["points"])
        if "objects.box" in found:
            boxes, labels = found["objects.box"], found["objects.label"]
            if not isinstance(boxes, list) or not isinstance(labels, list) or len(boxes) != len(labels):
                raise RowError("objects: must be lists of as many boxes as labels")
            pairs = zip(boxes, labels, strict=True)
            row["objects"] = [{"box": self._box(box), "label": label} for box, label in pairs]
        return row | {"unit": self.unit, "tolerance": TOLERANCE}

    def _image(self, number: int) -> ImageSource:
        """Where the image of an entry is.

        Raises:
            RowError: The entry names none.
        """
        if self._has_images:
            return ImageBytes(f"{self.path}:{number + 1}", partial(self._bytes, number))
        name = _only(self._images[number][self.columns["image"]])
        if not isinstance(name, str):
            raise RowError("image: is missing, the row needs a path here")
        return (self.images or Path()) / name

    def _texts(self, entry: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The questions, labels and texts of an entry, of those columns that may hold several."""
        cells = {key: _follow(entry, self.columns[key]) for key in self._several}
        return {key: cell if isinstance(cell, list) else [] for key, cell in cells.items()}

    def _bytes(self, number: int) -> bytes:
        cell: Any = _only(self._images[number][self.columns["image"]])
        if isinstance(cell, Mapping):
            path, cell = cell.get("path"), cell["bytes"]
            if cell is None and path is not None:
                cell = ((self.images or Path()) / path).read_bytes()
        if not isinstance(cell, bytes):
            raise ValueError("its cell is empty")
        return cell

    def _box(self, box: object) -> object:
        if self.corners or not (isinstance(box, list) and len(box) == 4 and all(is_number(n) for n in box)):
            return box
        x, y, width, height = box
        return [x, y, x + width, y + height]

    def _named(self, column: str, value: Any) -> Any:
        """Numbers of categories replaced by their names; a number without a name stays, for the check to refuse."""
        names = self._names_of(column)
        if names is None:
            return value
        if isinstance(value, list):
            return [self._named(column, item) for item in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    def _names_of(self, column: str) -> list[str] | None:
        feature = self._feature(column)
        return getattr(getattr(feature, "feature", feature), "names", None)

    def _feature(self, column: str) -> Any:
        """What the data set says about a column, maybe a nested one; None where there is none."""
        feature: Any = self.table.features
        for part in column.split("."):
            feature = getattr(feature, "feature", feature)  # of a list
            feature = feature.get(part) if isinstance(feature, Mapping) else None
        return feature

    def _row(self, index: int) -> SourceRow:
        """A row; an entry with several texts makes as many of them."""
        number = self._entries[index]
        location = f"{self.path}:{number + 1}"
        try:
            entry = self._values[number]
            values = self.values(entry) | self._part(entry, self._parts[index])
            image = self._image(number)
        except RowError as error:
            return SourceRow(location=location, number=index + 1, values={}, problem=str(error))
        return SourceRow(location=location, number=index + 1, values=values, image=image)

    def _part(self, entry: Mapping[str, Any], part: int) -> dict[str, object]:
        """The texts of one row of an entry, with an id of its own where there are several.

        Raises:
            RowError: Columns do not have the same number of them.
        """
        texts = self._texts(entry)
        sizes = {len(found) for found in texts.values()}
        if len(sizes) > 1:
            raise RowError(f"{next(iter(texts))}: must be as many as those of {', '.join(list(texts)[1:])}")
        chosen: dict[str, object] = {key: found[part] if found else None for key, found in texts.items()}
        name = _follow(entry, self.columns["id"]) if "id" in self.columns else None
        return chosen | ({"id": f"{name}-{part + 1}"} if name is not None and sizes and max(sizes) > 1 else {})


def _follow(entry: Any, column: str) -> Any:
    """The value of a nested column, with lists taken item by item; None where it ends early."""
    for part in column.split("."):
        if isinstance(entry, list):
            entry = [item.get(part) if isinstance(item, Mapping) else None for item in entry]
        else:
            entry = entry.get(part) if isinstance(entry, Mapping) else None
    return entry


def _only(cell: Any) -> Any:
    """The image of a cell that may hold a list of one.

    Raises:
        RowError: It holds another number of images.
    """
    if isinstance(cell, list):
        if len(cell) != 1:
            raise RowError(f"image: must be one, got {len(cell)}")
        return cell[0]
    return cell


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("this source needs the datasets library: pip install 'perception-r1[data]'") from error
    return datasets
