"""A source in the original files of RefCOCO, RefCOCO+ and RefCOCOg: referring expressions.

The references are a pickle. It is read by an unpickler that knows numbers, texts, lists and dictionaries and no other
kind of object, so that nothing in the file can run.
"""

import io
import json
import pickle
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perception_r1.data.sources.base import DataError, Lazy, Source, SourceRow, once_per_file
from perception_r1.data.sources.coco import TOLERANCE, read_annotations


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
        self._file = read_annotations(self.annotations)
        index_of = {int(number): index for index, number in enumerate(self._file.ids)}
        self._references = _read_references(self.references)  # kept for sources of other splits
        references = self._references.items
        try:
            chosen = [
                (index_of[item["ann_id"]], item["sentences"]) for item in references if item["split"] == self.split
            ]
            self._sentences = [(index, sentence["sent"]) for index, sentences in chosen for sentence in sentences]
            self._ids = array("q", [sentence["sent_id"] for _, sentences in chosen for sentence in sentences])
        except (KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{self.references}: must hold references with split, ann_id and sentences that belong to "
                f"{self.annotations} ({type(error).__name__}: {error})"
            ) from error
        if not self._sentences:
            splits = sorted({str(reference["split"]) for reference in references})
            raise DataError(f"{self.references}: has no split {self.split!r}, only {', '.join(splits) or 'nothing'}")
        return Lazy(self._row, len(self._sentences))

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.references, self.annotations, self.split]

    def __str__(self) -> str:
        return f"{self.references} ({self.split})"

    def _row(self, index: int) -> SourceRow:
        """A sentence with the box of its object."""
        number, question = self._sentences[index]
        name, width, height = self._file.images[int(self._file.image_ids[number])]
        values = {"id": self._ids[index], "question": question, "box": self._file.boxes[number].tolist()}
        values |= {"width": width, "height": height, "tolerance": TOLERANCE}
        location, image = f"{self.references}:{index + 1}", self.images / name
        return SourceRow(location=location, number=index + 1, values=values, image=image)


class _PlainUnpickler(pickle.Unpickler):
    """Reads nothing but numbers, texts, lists and dictionaries: a pickle with any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of plain references never does")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class References:
    """A file of references.

    Attributes:
        items: Each with its "split", and as a rule with "ann_id" and "sentences"; nothing else.
    """

    items: list[dict[str, Any]]


@once_per_file
def _read_references(path: Path) -> References:
    """The references of a file, parsed once for the sources of all splits.

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
    return References([_bare(item) for item in references])


def _bare(reference: dict[str, Any]) -> dict[str, Any]:
    """A reference without what nobody reads; the tokens of its sentences are the most of it."""
    kept: dict[str, Any] = _chosen(reference, "split", "ann_id", "sentences")
    if isinstance(kept.get("sentences"), list):
        kept["sentences"] = [_chosen(sentence, "sent", "sent_id") for sentence in kept["sentences"]]
    return kept


def _chosen(item: Any, *keys: str) -> Any:
    """A dictionary with no more than these keys; anything else as it is."""
    return {key: item[key] for key in keys if key in item} if isinstance(item, dict) else item
