"""Where a run's files go and how they are written: what the callbacks share."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a report reads the same files, and starts at once without it
    from lightning.pytorch import Trainer
    from PIL.Image import Image

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""Data that JSON can hold."""

RUN_CARD = "run.json"
"""The file that makes a folder a run."""
EVALUATION_CARD = "evaluation.json"
"""What an evaluation has in its place."""
CONFIG = "config.yaml"
"""Every setting."""
PREDICTIONS = "predictions"
"""Folder of a run with its answers to held-out samples; `predictions.jsonl` of an evaluation."""
IMAGES = "images"
"""Folder with small pictures of samples, beside their answers."""


def image_name(source: str, sample_id: str) -> str:
    """Name of the small picture of a sample: ids may hold any characters, and files may not.

    >>> image_name("refcoco", "7")
    '5123aaf9bb4d11d6.jpg'
    """
    return hashlib.sha256(json.dumps([source, sample_id]).encode()).hexdigest()[:16] + ".jpg"


def run_folder(trainer: "Trainer") -> Path | None:
    """The folder of this run, with events, checkpoints and samples; None when the run keeps nothing.

    To be called on all ranks at once: they agree on the folder of rank zero.
    """
    folder = trainer.log_dir if trainer.loggers else None  # without a logger it would be the working directory
    return Path(folder) if folder else None


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a run; empty where there is none, or none that can be read."""
    try:
        card = json.loads((folder / RUN_CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def write_json(path: Path, data: Json) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(finite(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def save_image(image: "Image", path: Path, **options: Any) -> None:
    """Write a picture in the same way, a `.jpg` or a `.png`; the options are those of the format."""
    draft = path.with_name(path.name + ".tmp")
    image.save(draft, format="JPEG" if path.suffix == ".jpg" else "PNG", **options)
    os.replace(draft, path)


def finite(data: Json) -> Json:
    """The same data with null for what JSON has no word for.

    >>> finite({"reward": float("nan"), "components": (1.0, float("inf"))})
    {'reward': None, 'components': [1.0, None]}
    """
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [finite(value) for value in data]
    return data
