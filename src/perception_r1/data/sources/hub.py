"""Sources read through the `datasets` library: any data set of the hub or parquet file, told which column is what.

Tables stay on disk, memory-mapped; a picture in a table is read when it is asked for.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from perception_r1.data.sources.base import DataError, Source, SourceRow
from perception_r1.data.sources.json_files import Unit
from perception_r1.errors import UserError
from perception_r1.records import Blob, Picture

_TEXTS = ("question", "label", "text")
"""Keys whose column may hold a list: one row for each text."""
_KEYS = ("image", "id", "question", "label", "text", "count", "box", "boxes", "points", "objects.box", "objects.label")


class Hub(Source):
    """A data set with one picture per entry.

    Args:
        path: Hub id, a parquet or JSON file, or a folder (of such files, or one that `datasets` has saved).
        columns: Key of the project's own form -> column that holds it: image, id, question, label, text, count, box,
            boxes, points, objects.box, objects.label. A dot leads into a nested column. Numbers of categories become
            their names where the data set knows them; a column of several questions, labels or texts makes a row of
            each.
        split: Split of the data set.
        name: Its configuration, where it has several.
        revision: Commit or tag on the hub; the newest unless given.
        images: Folder of the pictures, where the image column holds paths.
        corners: Boxes are given by two corners; otherwise by a corner, width and height.
        unit: Unit of coordinates.
        take: See `Source`.
        seed: See `Source`.

    Raises:
        UserError: A key is unknown, or no column holds the image.
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
        unknown = [key for key in columns if key not in _KEYS]
        if unknown or "image" not in columns:
            problem = f"has the unknown key {unknown[0]!r}" if unknown else "does not say which column holds the image"
            raise UserError(f"columns: {problem}; its keys are {', '.join(_KEYS)}")
        self.path = str(path)
        self.columns = dict(columns)
        self.split = split
        self.name = name
        self.revision = revision
        self.images = None if images is None else Path(images)
        self.corners = corners
        self.unit: Unit = unit

    def read(self) -> Sequence[SourceRow]:
        """See `Source`."""
        missing = [path for path in self.columns.values() if path.split(".")[0] not in self.table.column_names]
        if missing:
            known = ", ".join(self.table.column_names)
            raise DataError(f"{self.path}: has no column {missing[0].split('.')[0]!r}, only {known}")
        return _Entries(self)

    def contents(self) -> Iterable[Path | str]:
        """See `Source`; a data set of the hub counts by its name, revision and number of entries."""
        settings = [self.path, self.split, str(self.name), str(self.revision), str(self.corners), self.unit]
        file = [Path(self.path)] if Path(self.path).is_file() else []
        return [*file, *settings, *(f"{key}={column}" for key, column in self.columns.items()), str(len(self.table))]

    def labels(self) -> tuple[str, ...]:
        """The categories that the data set knows by number, else those in use."""
        names = self._names_of(self.columns.get("objects.label", ""))
        return super().labels() if names is None else tuple(names)

    def __str__(self) -> str:
        return f"{self.path} ({self.split})"

    @cached_property
    def table(self) -> Any:
        """The data set, its pictures not decoded."""
        datasets = _datasets()
        path = Path(self.path)
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
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{self.path}: cannot be read as a data set ({reason[0]})") from error
        for column, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        return table

    def values(self, entry: Mapping[str, Any]) -> dict[str, object]:
        """An entry without its picture in the project's own form."""
        found = {
            key: self._named(column, _follow(entry, column)) for key, column in self.columns.items() if key != "image"
        }
        row: dict[str, object] = {key: value for key, value in found.items() if not key.startswith("objects.")}
        if "box" in row:
            row["box"] = self._box(row["box"])
        if "boxes" in row and isinstance(row["boxes"], list):
            row["boxes"] = [self._box(box) for box in row["boxes"]]
        if "points" in row:
            row["points"] = _points(row["points"])
        if "objects.box" in found:
            boxes, labels = found["objects.box"] or [], found.get("objects.label") or []
            if not isinstance(boxes, list) or not isinstance(labels, list) or len(boxes) != len(labels):
                row["objects"] = None
            else:
                pairs = zip(boxes, labels, strict=True)
                row["objects"] = [{"box": self._box(box), "label": label} for box, label in pairs]
        return row if self.unit == "pixels" else row | {"unit": self.unit}

    def picture(self, number: int) -> Picture | None:
        """Where the picture of an entry is; None where it has none."""
        column = self.columns["image"]
        if self.table.features[column].dtype != "string":
            return Blob(f"{self.path}:{number + 1}", partial(self._bytes, number))
        name = self.table.select_columns([column])[number][column]
        return None if name is None else (self.images or Path()) / name

    def _bytes(self, number: int) -> bytes:
        cell = self.table.select_columns([self.columns["image"]])[number][self.columns["image"]]
        if isinstance(cell, Mapping):  # of the library's image type
            cell = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return cell

    def _box(self, box: object) -> object:
        if self.corners or not (isinstance(box, list) and len(box) == 4 and all(_is_number(n) for n in box)):
            return box
        x, y, width, height = box
        return [x, y, x + width, y + height]

    def _named(self, column: str, value: Any) -> Any:
        """Numbers of categories replaced by their names."""
        names = self._names_of(column)
        if names is None or value is None:
            return value
        return [names[number] for number in value] if isinstance(value, list) else names[value]

    def _names_of(self, column: str) -> list[str] | None:
        feature: Any = self.table.features
        for part in column.split("."):
            feature = getattr(feature, "feature", feature)  # of a list
            feature = feature.get(part) if isinstance(feature, Mapping) else None
        return getattr(getattr(feature, "feature", feature), "names", None)


class PixMoCount(Hub):
    """PixMo-Count: objects of one kind, with points in pixels or only their number; pictures are fetched by URL.

    `perception-r1 data fetch` puts the pictures into a folder, each under the SHA-256 of its file; the rows of pictures
    that are not there cannot be used.

    Args:
        images: Folder of the fetched pictures.
        path: Hub id, or parquet file.
        split: "train", "validation" or "test".
        revision: Commit or tag on the hub; the newest unless given.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(
        self,
        images: Path,
        *,
        path: str = "allenai/pixmo-count",
        split: str = "train",
        revision: str | None = None,
        take: str = "all",
        seed: int = 0,
    ) -> None:
        columns = {"image": "image_sha256", "label": "label", "count": "count", "points": "points"}
        super().__init__(path, columns, split=split, revision=revision, images=images, take=take, seed=seed)

    def downloads(self) -> "Iterable[Download]":
        """The pictures of the rows that are taken, each once."""
        urls = self.table.select_columns(["image_url", "image_sha256"])
        seen: set[str] = set()
        for number in self.numbers:
            url, sha256 = urls[number]["image_url"], urls[number]["image_sha256"]
            if sha256 not in seen:
                seen.add(sha256)
                yield Download(url=url, sha256=sha256, path=(self.images or Path()) / sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A file to fetch.

    Attributes:
        url: Where it is.
        sha256: Hex digest of its content.
        path: Where it goes.
    """

    url: str
    sha256: str
    path: Path


class _Entries(Sequence[SourceRow]):
    """The entries of a table; one with several texts makes as many rows."""

    def __init__(self, source: Hub) -> None:
        self._source = source
        image = source.columns["image"]
        others = [column for column in source.table.column_names if column != image]
        self._values = source.table.select_columns(others) if others else source.table
        self._entries, self._parts = array("q"), array("q")
        several = [column for key, column in source.columns.items() if key in _TEXTS]
        if several:
            texts = source.table.select_columns([several[0].split(".")[0]])
            for number, entry in enumerate(texts):
                value = _follow(entry, several[0])
                size = len(value) if isinstance(value, list) else 1
                self._entries.extend([number] * size)
                self._parts.extend(range(size))
        else:
            self._entries.extend(range(len(self._values)))
            self._parts.extend([0] * len(self._values))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        number, part = self._entries[index], self._parts[index]
        place = f"{self._source.path}:{number + 1}"
        values = self._source.values(self._values[number])
        for key in _TEXTS:
            value = values.get(key)
            if isinstance(value, list):
                values[key] = value[part]
                if len(value) > 1 and values.get("id") is not None:
                    values["id"] = f"{values['id']}-{part + 1}"
        picture = self._source.picture(number)
        problem = None if picture is not None else "image: is missing"
        return SourceRow(place=place, number=index + 1, values=values, image=picture, problem=problem)


def _follow(entry: Any, column: str) -> Any:
    """The value of a nested column, with lists taken item by item; None where it ends early."""
    for part in column.split("."):
        if isinstance(entry, list):
            entry = [item.get(part) if isinstance(item, Mapping) else None for item in entry]
        else:
            entry = entry.get(part) if isinstance(entry, Mapping) else None
    return entry


def _points(value: Any) -> object:
    """Points as pairs, from pairs, from `{"x": ..., "y": ...}` each, or from all x and all y."""
    if isinstance(value, Mapping):
        xs, ys = value.get("x"), value.get("y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            return value
        return [list(pair) for pair in zip(xs, ys, strict=True)]
    if isinstance(value, list):
        return [[item.get("x"), item.get("y")] if isinstance(item, Mapping) else item for item in value]
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("this source needs the datasets library: pip install 'perception-r1[data]'") from error
    return datasets
