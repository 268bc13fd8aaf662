"""Sources in COCO's annotation files: all objects of each image.

Of a file only names, sizes and boxes are kept, in arrays; outlines are dropped while the file is read.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_r1.data.sources.base import DataError, Lazy, Source, SourceRow, once_per_file

TOLERANCE = 1.0
"""Pixels by which COCO's boxes may lie outside their image: corner and size are rounded each on its own."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Annotations:
    """A file of annotated instances.

    Attributes:
        images: Id of an image -> file name, width, height.
        categories: Number of a category -> name, in ascending order.
        ids: [N] ids of the instances.
        image_ids: [N] their images.
        category_ids: [N] their categories.
        boxes: [N, 4] x1, y1, x2, y2 in pixels.
        areas: [N] areas of their outlines in square pixels.
        is_crowd: [N].
    """

    images: dict[int, tuple[str, int, int]]
    categories: dict[int, str]
    ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]


class Coco(Source):
    """All objects of each image of an annotation file in COCO's form, images without objects included.

    Objects whose box has no width or no height are left out; COCO 2017 has two of them. Each object has "box", "label",
    "area" (of its outline, in square pixels) and, where it stands for many, "crowd".

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

    @cached_property
    def file(self) -> Annotations:
        """The annotations, read once.

        Raises:
            DataError: They cannot be read or are none of COCO's.
        """
        return read_annotations(self.annotations)

    def read(self) -> Sequence[SourceRow]:
        """See `Source`; in ascending order of the images' ids."""
        self._ids = sorted(self.file.images)
        self._order = np.argsort(self.file.image_ids, kind="stable")
        return Lazy(self._row, len(self._ids))

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.annotations]

    def __str__(self) -> str:
        return str(self.annotations)

    def labels(self) -> tuple[str, ...]:
        """The categories of the file, used or not."""
        return tuple(self.file.categories.values())

    def _row(self, index: int) -> SourceRow:
        """An image with its objects."""
        number = self._ids[index]
        name, width, height = self.file.images[number]
        first = np.searchsorted(self.file.image_ids, number, "left", sorter=self._order)
        last = np.searchsorted(self.file.image_ids, number, "right", sorter=self._order)
        objects = [self._object(int(item)) for item in self._order[first:last]]
        values = {"id": number, "objects": objects, "width": width, "height": height, "tolerance": TOLERANCE}
        location, image = f"{self.annotations}:{index + 1}", self.images / name
        return SourceRow(location=location, number=index + 1, values=values, image=image)

    def _object(self, index: int) -> dict[str, object]:
        """The instance with this index in the file."""
        file = self.file
        category = file.categories[int(file.category_ids[index])]
        known = {"box": file.boxes[index].tolist(), "label": category, "area": float(file.areas[index])}
        return known | ({"crowd": True} if file.is_crowd[index] else {})


@once_per_file
def read_annotations(path: Path) -> Annotations:
    """The instances of a file, parsed once for all sources that hold them.

    Raises:
        DataError: It cannot be read or is none of COCO's.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            file = json.load(lines, object_hook=lambda item: {key: item[key] for key in item if key != "segmentation"})
        return _arrays(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except KeyError as error:
        raise DataError(f"{path}: must be an annotation file in COCO's form, but something lacks {error}") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: must be an annotation file in COCO's form ({error})") from error


def _arrays(file: dict[str, Any]) -> Annotations:
    """The instances of a file's JSON.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: It is none of COCO's.
    """
    images = {int(i["id"]): (str(i["file_name"]), int(i["width"]), int(i["height"])) for i in file["images"]}
    categories = {int(item["id"]): str(item["name"]) for item in file["categories"]}
    for kind, found in (("images", images), ("categories", categories)):
        if len(found) < len(file[kind]):
            raise ValueError(f"two of its {kind} have the same id")
    items = [item for item in file["annotations"] if "bbox" in item]
    for item in items:
        if item["image_id"] not in images or item["category_id"] not in categories:
            raise ValueError(f"annotation {item['id']!r} belongs to an image or a category that the file does not list")
        if len(item["bbox"]) != 4:
            raise ValueError(f"the bbox of annotation {item['id']!r} must be [x, y, width, height]")
    boxes = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
    known = [item.get("area") for item in items]
    areas = np.array([np.nan if area is None else float(area) for area in known], dtype=np.float64)
    kept = (boxes[:, 2:] != 0).all(1)

    def numbers(key: str) -> NDArray[np.int64]:
        return np.array([int(item[key]) for item, is_kept in zip(items, kept, strict=True) if is_kept], dtype=np.int64)

    return Annotations(
        images=images,
        categories=dict(sorted(categories.items())),
        ids=numbers("id"),
        image_ids=numbers("image_id"),
        category_ids=numbers("category_id"),
        boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)[kept],
        areas=np.where(np.isfinite(areas), areas, boxes[:, 2] * boxes[:, 3])[kept],
        is_crowd=np.array([bool(item.get("iscrowd", 0)) for item in items], dtype=bool)[kept],
    )
