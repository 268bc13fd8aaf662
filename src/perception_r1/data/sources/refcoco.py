"""A source in the original files of RefCOCO, RefCOCO+ and RefCOCOg: referring expressions.

The references are a pickle. It is read by an unpickler that knows numbers, texts, lists and dictionaries and no other
kind of object, so that nothing in the file can run.
"""

import io
import json
import pickle
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perception_r1.data.sources.base import DataError, Source, SourceRow
from perception_r1.data.sources.coco import TOLERANCE, Annotations, read_annotations


class RefCoco(Source):
    """Referring expressions: one row for each sentence of a split.

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
        """See `Source`; in the order of the file."""
        file = read_annotations(self.annotations)
        index_of = {int(number): index for index, number in enumerate(file.ids)}
        rows = _Sentences(self.references, file, self.images)
        references = _read_references(self.references)
        try:
            for reference in references:
                if reference["split"] == self.split:
                    rows.add(index_of[reference["ann_id"]], reference["sentences"])
        except (KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{self.references}: must hold references with split, ann_id and sentences that belong to "
                f"{self.annotations} ({type(error).__name__}: {error})"
            ) from error
        if not rows:
            splits = sorted({str(reference["split"]) for reference in references})
            raise DataError(f"{self.references}: has no split {self.split!r}, only {', '.join(splits) or 'nothing'}")
        return rows

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.references, self.annotations, self.split]

    def __str__(self) -> str:
        return f"{self.references} ({self.split})"


class _Sentences(Sequence[SourceRow]):
    """The sentences of references, each with the index of its object among the annotations."""

    def __init__(self, path: Path, file: Annotations, folder: Path) -> None:
        self._path, self._file, self._folder = path, file, folder
        self._objects, self._ids = array("q"), array("q")
        self._questions: list[str] = []

    def add(self, index: int, sentences: Sequence[Mapping[str, Any]]) -> None:
        """Sentences about the object of this index.

        Raises:
            KeyError, TypeError, OverflowError: They are none.
        """
        for sentence in sentences:
            self._questions.append(sentence["sent"])
            self._ids.append(sentence["sent_id"])
            self._objects.append(index)

    def __len__(self) -> int:
        return len(self._objects)

    def __getitem__(self, index: Any) -> Any:
        number = self._objects[index]
        name, width, height = self._file.images[int(self._file.image_ids[number])]
        values = {
            "id": self._ids[index],
            "question": self._questions[index],
            "box": self._file.boxes[number].tolist(),
            "width": width,
            "height": height,
            "tolerance": TOLERANCE,
        }
        location, image = f"{self._path}:{index + 1}", self._folder / name
        return SourceRow(location=location, number=index + 1, values=values, image=image)


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
