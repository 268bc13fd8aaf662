"""Sources in COCO's annotation files: detection, and referring expressions (RefCOCO, RefCOCO+, RefCOCOg).

Of a file only names, sizes and boxes are kept, in arrays; outlines are dropped while the file is read.
"""

import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perception_r1.data.sources.base import DataError, Source, SourceRow


@dataclass(frozen=True, slots=True)
class _Annotations:
    """A file of annotated instances.

    Attributes:
        images: Id of an image -> file name, width, height.
        categories: Number of a category -> name, in ascending order.
        ids: [N] ids of the instances.
        image_ids: [N] their images.
        category_ids: [N] their categories.
        boxes: [N, 4] x1, y1, x2, y2 in pixels, cut at the edges of the image: rounding leaves some a fraction outside.
        areas: [N] areas of their outlines in square pixels.
        is_crowd: [N].
    """

    images: dict[int, tuple[str, int, int]]
    categories: dict[int, str]
    ids: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray


class Coco(Source):
    """All objects of each image of an annotation file in COCO's form, images without objects included.

    Objects whose box has no area are left out; COCO 2017 has two of them.

    Args:
        annotations: `instances_*.json`.
        images: Folder of the images.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(self, annotations: Path, images: Path, *, take: str = "all", seed: int = 0) -> None:
        super().__init__(take=take, seed=seed)
        self.annotations = Path(annotations)
        self.images: Path = Path(images)
        self._file: _Annotations | None = None

    @property
    def file(self) -> _Annotations:
        """The annotations, read once."""
        if self._file is None:
            self._file = _read_annotations(self.annotations)
        return self._file

    def read(self) -> Sequence[SourceRow]:
        """See `Source`; in ascending order of the images' ids."""
        return _Images(self.annotations, self.file, self.images)

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.annotations]

    def __str__(self) -> str:
        return str(self.annotations)

    def labels(self) -> tuple[str, ...]:
        """The categories of the file, used or not."""
        return tuple(self.file.categories.values())


class RefCoco(Source):
    """Referring expressions in their original files: one row for each sentence of a split.

    The references are a pickle. It is read by an unpickler that knows numbers, texts, lists and dictionaries and no
    other kind of object, so that nothing in the file can run.

    Args:
        references: `refs(unc).p`, `refs(umd).p` or the same as JSON.
        annotations: `instances.json` beside it.
        images: Folder of COCO's `train2014` images.
        split: "train", "val", "test", "testA" or "testB".
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(
        self, references: Path, annotations: Path, images: Path, *, split: str, take: str = "all", seed: int = 0
    ) -> None:
        super().__init__(take=take, seed=seed)
        self.references = Path(references)
        self.annotations = Path(annotations)
        self.images: Path = Path(images)
        self.split = split

    def read(self) -> Sequence[SourceRow]:
        """See `Source`."""
        file = _read_annotations(self.annotations)
        place_of = {int(number): place for place, number in enumerate(file.ids)}
        references = _read_references(self.references)
        rows: list[SourceRow] = []
        try:
            for reference in references:
                if reference["split"] != self.split:
                    continue
                place = place_of[reference["ann_id"]]
                name, width, height = file.images[int(file.image_ids[place])]
                for sentence in reference["sentences"]:
                    values = {
                        "id": sentence["sent_id"],
                        "question": sentence["sent"],
                        "box": file.boxes[place].tolist(),
                        "width": width,
                        "height": height,
                    }
                    rows.append(_row(self.references, len(rows) + 1, values, self.images / name))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.references}: must hold references with split, ann_id and sentences that belong to "
                f"{self.annotations} ({type(error).__name__}: {error})"
            ) from error
        if not rows:
            splits = sorted({str(reference["split"]) for reference in references})
            raise DataError(f"{self.references}: has no split {self.split!r}, only {', '.join(splits)}")
        return rows

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.references, self.annotations, self.split]

    def __str__(self) -> str:
        return f"{self.references} ({self.split})"


class _Images(Sequence[SourceRow]):
    """The images of an annotation file, each with its objects."""

    def __init__(self, path: Path, file: _Annotations, folder: Path) -> None:
        self._path, self._file, self._folder = path, file, folder
        self._ids = sorted(file.images)
        self._order = np.argsort(file.image_ids, kind="stable")
        self._sorted_ids = file.image_ids[self._order]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        number = self._ids[index]
        name, width, height = self._file.images[number]
        first, last = (int(np.searchsorted(self._sorted_ids, number, side)) for side in ("left", "right"))
        objects = [self._object(int(place)) for place in self._order[first:last]]
        values = {"id": number, "objects": objects, "width": width, "height": height}
        return _row(self._path, index + 1, values, self._folder / name)

    def _object(self, place: int) -> dict[str, object]:
        category = self._file.categories[int(self._file.category_ids[place])]
        known = {"box": self._file.boxes[place].tolist(), "label": category, "area": float(self._file.areas[place])}
        return known | ({"crowd": True} if self._file.is_crowd[place] else {})


def _row(path: Path, number: int, values: Mapping[str, object], image: Path) -> SourceRow:
    return SourceRow(place=f"{path}:{number}", number=number, values=values, image=image)


def _read_annotations(path: Path) -> _Annotations:
    """The instances of a file.

    Raises:
        DataError: It cannot be read or is none of COCO's.
    """

    def without_outline(values: dict[str, Any]) -> dict[str, Any]:
        values.pop("segmentation", None)
        return values

    try:
        with path.open(encoding="utf-8") as lines:
            file = json.load(lines, object_hook=without_outline)
        return _arrays(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except KeyError as error:
        raise DataError(f"{path}: must be an annotation file in COCO's form, but something lacks {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: must be an annotation file in COCO's form ({error})") from error


def _arrays(file: dict[str, Any]) -> _Annotations:
    """The instances of a file's JSON.

    Raises:
        ValueError, KeyError, TypeError: It is none of COCO's.
    """
    images = {int(i["id"]): (str(i["file_name"]), int(i["width"]), int(i["height"])) for i in file["images"]}
    categories = dict(sorted((int(item["id"]), str(item["name"])) for item in file["categories"]))
    items = [item for item in file["annotations"] if "bbox" in item]
    for item in items:
        if item["image_id"] not in images or item["category_id"] not in categories:
            raise ValueError(f"annotation {item['id']} belongs to an image or a category that the file does not list")
    boxes = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
    areas = np.array([item.get("area", item["bbox"][2] * item["bbox"][3]) for item in items], dtype=np.float64)
    edges = np.array([images[item["image_id"]][1:] for item in items], dtype=np.float64).reshape(-1, 2)
    corners = np.concatenate([boxes[:, :2].clip(0), np.minimum(boxes[:, :2] + boxes[:, 2:], edges)], 1)
    kept = (corners[:, :2] < corners[:, 2:]).all(1)

    def numbers(key: str) -> np.ndarray:
        return np.array([int(item[key]) for item in items], dtype=np.int64)[kept]

    return _Annotations(
        images=images,
        categories=categories,
        ids=numbers("id"),
        image_ids=numbers("image_id"),
        category_ids=numbers("category_id"),
        boxes=corners[kept],
        areas=areas[kept],
        is_crowd=np.array([bool(item.get("iscrowd", 0)) for item in items], dtype=bool)[kept],
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads nothing but numbers, texts, lists and dictionaries: a pickle with any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of plain references never does")


def _read_references(path: Path) -> list[dict[str, Any]]:
    """The references of a file.

    Raises:
        DataError: It cannot be read or is no list of references.
    """
    try:
        data = path.read_bytes()
        # written by Python 2, whose texts are bytes
        references = (
            json.loads(data) if path.suffix == ".json" else _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise DataError(f"{path}: cannot be read as references ({error})") from error
    if not isinstance(references, list) or not all(isinstance(item, dict) and "split" in item for item in references):
        raise DataError(f"{path}: must hold a list of references, each with its split")
    return references
