"""Where the study tests: the world of pretraining, that of training, and two levels beyond both.

pretraining   the worlds as they are by themselves, in which the embedded model was pretrained
training      their harder parts, of configs/tiny, in which it is trained further
crowded       more objects, or more lines, than either of them can have
photographs   nothing that was drawn here: on photographs of scikit-image the same shapes are to be found; for OCR,
handwritten digits of scikit-learn are to be read
"""

import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_digits

from perception_r1.data.module import TaskDataModule
from perception_r1.data.synthetic.objects import CountingWorld, DetectionWorld, GroundingWorld, ShapeWorld
from perception_r1.data.synthetic.render import Canvas, to_image
from perception_r1.data.synthetic.worlds import Scene, Thing, World
from perception_r1.tasks.counting import CountingData
from perception_r1.tasks.detection import DetectionData
from perception_r1.tasks.grounding import GroundingData
from perception_r1.tasks.ocr import OcrData

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "tiny"
DATA: dict[str, type[TaskDataModule]] = {
    "grounding": GroundingData,
    "counting": CountingData,
    "detection": DetectionData,
    "ocr": OcrData,
}
PHOTOGRAPHS = ("astronaut", "brick", "camera", "cat", "coffee", "grass", "gravel", "rocket")
"""Those that come with scikit-image itself."""
CROWDED: dict[str, dict[str, Any]] = {
    "grounding": {"min_distractors": 8, "max_distractors": 12, "skew": 1.0},
    "counting": {"empty_share": 0.0, "min_targets": 13, "max_targets": 18, "min_size": 14, "skew": 1.0},
    "detection": {"empty_share": 0.0, "min_objects": 11, "max_objects": 15, "skew": 1.0},
    "ocr": {"min_lines": 4, "max_lines": 5, "skew": 1.0},
}


def levels(task: str) -> dict[str, World]:
    """The worlds of a task by name."""
    plain = DATA[task]().world
    settings = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text(encoding="utf-8"))
    return {
        "pretraining": plain,
        "training": replace(plain, **settings["data"]["init_args"]["world"]),
        "crowded": replace(plain, **CROWDED[task]),
        "photographs": PHOTOGRAPHED[task],
    }


class OnPhotographs(ShapeWorld):
    """Objects on photographs."""

    def background(self, rng: random.Random) -> Canvas:
        """A part of one of them."""
        return photograph(rng, self.image_size)


class GroundingPhotographs(OnPhotographs, GroundingWorld):
    """The objects of grounding on photographs."""


class CountingPhotographs(OnPhotographs, CountingWorld):
    """The objects of counting on photographs."""


class DetectionPhotographs(OnPhotographs, DetectionWorld):
    """The objects of detection on photographs."""


@dataclass(frozen=True, kw_only=True)
class HandwrittenNumbers(World):
    """One number of two to five handwritten digits, dark on light paper."""

    def draw(self, rng: random.Random) -> Scene:
        """A row with text."""
        images, labels = _digits()
        chosen = [rng.randrange(len(images)) for _ in range(self.pick(rng, 2, 5))]
        canvas: Canvas = np.full((28, 28 * -(-(20 * len(chosen) + 8) // 28), 3), 235, np.float32)
        owner = np.full(canvas.shape[:2], -1, np.int16)
        things = []
        for number, index in enumerate(chosen):
            x, y = 4 + 20 * number, 4
            ink = np.asarray(Image.fromarray(images[index]).resize((20, 20), Image.Resampling.BICUBIC)).clip(0, 16) / 16
            canvas[y : y + 20, x : x + 20] -= 200 * ink[..., None]
            owner[y : y + 20, x : x + 20][ink > 0.5] = number
            things.append(Thing(name=str(labels[index]), colour="", box=(x, y, x + 20, y + 20)))
        text = "".join(thing.name for thing in things)
        return Scene(image=to_image(canvas), values={"text": text}, things=tuple(things), owner=owner)


PHOTOGRAPHED: dict[str, World] = {
    "grounding": GroundingPhotographs(),
    "counting": CountingPhotographs(),
    "detection": DetectionPhotographs(),
    "ocr": HandwrittenNumbers(),
}


def photograph(rng: random.Random, size: int) -> Canvas:
    """Any square part of any photograph, not smaller than the image that is asked for."""
    whole = _photograph(rng.choice(PHOTOGRAPHS))
    side = rng.randint(size, min(whole.size))
    x, y = rng.randint(0, whole.width - side), rng.randint(0, whole.height - side)
    part = whole.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(part, np.float32).copy()


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(photographs, name)()).convert("RGB")


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return found.images.astype(np.float32), found.target
