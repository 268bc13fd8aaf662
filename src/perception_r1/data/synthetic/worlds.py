"""What a world of synthetic images is: scenes drawn with exact annotations, as rows of the project's own data format.

A world is a frozen dataclass; its fields say how broad and how hard it is. One of them is the same everywhere: `skew`
bends every choice of a number or a size towards the easy end (above 1) or the hard end (below 1), and both ends stay
possible. So a hard world is a harder part of an easy one.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from PIL import Image

from perception_r1.errors import UserError

Owner = np.ndarray[tuple[int, int], np.dtype[np.int16]]
"""[height, width] of an image: the number of the thing that is seen at a pixel, -1 for the background."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """Something that was drawn: an object or a character.

    Attributes:
        name: Its shape, or the character itself.
        colour: Name of its colour; empty where colours mean nothing.
        box: x1, y1, x2, y2 in pixels: its full extent, whatever hides parts of it.
    """

    name: str
    colour: str
    box: tuple[int, int, int, int]

    def is_called(self, label: str) -> bool:
        """Whether a label is its shape, or its colour and shape."""
        return label in (self.name, f"{self.colour} {self.name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One synthetic image, what is in it, and what is asked about it.

    Attributes:
        image: The image in RGB.
        values: The row in the task's own data format, without the image: boxes and points in pixels.
        things: All that was drawn.
        owner: Which of them is seen where.
    """

    image: Image.Image
    values: dict[str, object]
    things: tuple[Thing, ...]
    owner: Owner


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """What can be in an image.

    Attributes:
        skew: Exponent of the uniform number behind every count and size: above 1 favours what is easy (few, large),
            below 1 what is hard (many, small); 1 favours nothing.
    """

    skew: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.skew <= 100:
            raise UserError(f"skew must be more than 0 and at most 100, got {self.skew}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Every name an object can have; none where objects have no names."""
        return ()

    @abstractmethod
    def draw(self, rng: random.Random) -> Scene:
        """One scene; all randomness comes from the generator."""

    def hardness(self, rng: random.Random) -> float:
        """A number from 0 (easy) to 1 (hard), skewed."""
        return float(rng.random() ** self.skew)

    def pick(self, rng: random.Random, easy: int, hard: int) -> int:
        """A whole number between an easy and a hard end, both possible, skewed."""
        step = 1 if hard >= easy else -1
        return easy + step * min(int(self.hardness(rng) * (abs(hard - easy) + 1)), abs(hard - easy))


def check_ranges(world: World, **ranges: tuple[float, float]) -> None:
    """Make sure that options lie in their ranges, both ends included.

    Raises:
        UserError: One does not.
    """
    for name, (low, high) in ranges.items():
        value = getattr(world, name)
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, got {value}")
