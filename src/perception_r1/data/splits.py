"""Which rows train, validate and test: sources of each split, and what is held out where a split has none."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perception_r1.data.samples import subset
from perception_r1.data.sources import DataError, Source, open_source
from perception_r1.errors import UserError
from perception_r1.records import ImageBytes, Sample, Split, UnloadedSample

Samples = Sequence[Sample[Any]]
"""Those of a split, images loaded or not."""


def sources_by_split(
    files: Mapping[Split, Path | None], sources: Mapping[Split, Mapping[str, Source] | None]
) -> dict[Split, dict[str, Source]]:
    """The sources of each split that has any; a file is one without a name.

    Raises:
        UserError: A split has both, or no source in its list of sources.
    """
    found: dict[Split, dict[str, Source]] = {}
    for split, file in files.items():
        named = sources[split]
        if file is not None and named is not None:
            raise UserError(f"{split}_file and {split} both say where the {split} samples come from: give one of them")
        if named is not None and not named:
            raise UserError(f"{split} names no source: give at least one, or leave it out")
        if file is not None:
            found[split] = {"": open_source(Path(file))}
        elif named is not None:
            found[split] = dict(named)
    return found


def divide(
    samples: Sequence[UnloadedSample[Any]], sources: Sequence[Source], held_out: Sequence[Split], share: float
) -> dict[Split, Samples]:
    """Samples by split: images in the order of a hash of their names, the first to the held-out splits.

    Raises:
        DataError: There are fewer images than splits.
    """
    if not held_out:
        return {"train": samples}
    keys = [_image_key(sample, sources) for sample in samples]
    images = sorted(set(keys), key=lambda name: _digest(name.encode()))
    if len(images) <= len(held_out):
        raise DataError(
            f"{sources[0]}: has rows of {len(images)} different images, but holding out {' and '.join(held_out)} needs"
            f" at least {len(held_out) + 1}: add images or give {' and '.join(f'{split}_file' for split in held_out)}"
        )
    num_held_out = max(1, int(share * len(images)))
    split_of: dict[str, Split] = dict.fromkeys(images, "train")
    for position, split in enumerate(held_out):
        split_of |= dict.fromkeys(images[position * num_held_out : (position + 1) * num_held_out], split)
    indices: dict[Split, list[int]] = {split: [] for split in ("train", *held_out)}
    for index, key in enumerate(keys):
        indices[split_of[key]].append(index)
    return {split: subset(samples, chosen) for split, chosen in indices.items()}


def _image_key(sample: UnloadedSample[Any], sources: Sequence[Source]) -> str:
    """The image's path from the folder of the first source's images: the same on every machine.

    A table may hold an image several times, under different names; there its content counts.
    """
    if isinstance(sample.image, ImageBytes):
        return _digest(sample.image.read()).hex()
    folder = next((source.images for source in sources if source.images is not None), None)
    return str(sample.image) if folder is None else os.path.relpath(sample.image, folder)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
