"""What images are drawn with: colours, shapes, textured backgrounds, grain. All randomness is the caller's."""

import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

Colour = tuple[int, int, int]
Canvas = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
"""An image that is being drawn: [height, width, 3] in steps of 0 to 255."""
Mask = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
"""Coverage of each pixel, [height, width] from 0 to 1."""

COLOURS: dict[str, Colour] = {
    "red": (222, 40, 44),
    "orange": (248, 142, 28),
    "yellow": (246, 226, 50),
    "green": (44, 168, 70),
    "blue": (44, 84, 220),
    "purple": (148, 56, 190),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}

_SCALE = 4
"""Shapes are drawn this many times larger, so that their edges come out smooth."""
_EDGE_SHADE = 0.6
"""Brightness of the outline, as a share of the inside: it tells objects of one colour apart where they touch."""


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    radii = [1.0 if corner % 2 == 0 else inner for corner in range(2 * points)]
    angles = [math.pi * corner / points - math.pi / 2 for corner in range(2 * points)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _heart(steps: int = 60) -> list[tuple[float, float]]:
    turns = [2 * math.pi * step / steps for step in range(steps)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "rectangle": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [(3, 0), (6, 0), (6, 3), (9, 3), (9, 6), (6, 6), (6, 9), (3, 9), (3, 6), (0, 6), (0, 3), (3, 3)],
    "star": _star(),
    "heart": _heart(),
    "arrow": [(0, 3), (5, 3), (5, 0), (10, 5), (5, 10), (5, 7), (0, 7)],
}
"""Corners of the shapes that are polygons, in any unit: they are stretched until they fill their box."""

SHAPES = ("ellipse", "ring", "moon", *_POLYGONS)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, width: int, height: int) -> Mask:
    """Coverage of a shape that touches all four sides of its box."""
    wide, high = width * _SCALE, height * _SCALE
    large = Image.new("L", (wide, high), 0)
    pen = ImageDraw.Draw(large)
    whole = (0, 0, wide - 1, high - 1)
    if shape in _POLYGONS:
        xs, ys = zip(*_POLYGONS[shape], strict=True)
        pen.polygon(
            [
                ((x - min(xs)) / (max(xs) - min(xs)) * (wide - 1), (y - min(ys)) / (max(ys) - min(ys)) * (high - 1))
                for x, y in _POLYGONS[shape]
            ],
            fill=255,
        )
    else:
        pen.ellipse(whole, fill=255)
        if shape == "ring":
            pen.ellipse((wide * 0.27, high * 0.27, wide * 0.73, high * 0.73), fill=0)
        elif shape == "moon":  # a crescent, whose horns reach the right side
            pen.ellipse((wide * 0.36, high * 0.08, wide * 1.36, high * 0.92), fill=0)
            box = large.getbbox() or whole
            large = large.crop(box).resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(large.resize((width, height), Image.Resampling.BOX), np.float32) / np.float32(255)


@lru_cache(maxsize=4096)
def _edge_shade(shape: str, width: int, height: int) -> Mask:
    """Factor of brightness: one inside, less on the outline."""
    solid = shape_mask(shape, width, height) >= 0.5
    return np.where(binary_erosion(solid), 1.0, _EDGE_SHADE).astype(np.float32)


def paint(rng: random.Random, canvas: Canvas, shape: str, colour: str, corner: tuple[int, int], mask: Mask) -> None:
    """Draw a shape at a corner, its colour a little off and brighter towards one side, with a darker outline."""
    (x, y), (height, width) = corner, mask.shape
    base = np.array([value + rng.uniform(-16, 16) for value in COLOURS[colour]], np.float32)
    light = np.linspace(1 - rng.uniform(0, 0.12), 1 + rng.uniform(0, 0.12), height, dtype=np.float32)[
        :: rng.choice((1, -1))
    ]
    inside = base * (light[:, None] * _edge_shade(shape, width, height))[..., None]
    area, cover = canvas[y : y + height, x : x + width], mask[..., None]
    area += cover * (inside - area)


def noise(rng: random.Random, height: int, width: int) -> Mask:
    """Uniform values from -1 to 1, from the generator's own bytes: the same on every platform."""
    values = np.frombuffer(rng.randbytes(height * width), np.uint8).reshape(height, width)
    return values.astype(np.float32) / 127.5 - 1


def background(rng: random.Random, width: int, height: int, contrast: float) -> Canvas:
    """A muted colour with a slope of light and one of several textures.

    Args:
        rng: Source of all randomness.
        width: In pixels.
        height: In pixels.
        contrast: Largest deviation of the texture, in steps of 0 to 255.
    """
    grey = rng.uniform(92, 168)
    base = np.array([grey + rng.uniform(-20, 20) for _ in range(3)], np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * x + math.sin(angle) * y  # in pixels
    slope = along / max(width, height) * rng.uniform(0, contrast)
    amplitude, period = rng.uniform(0.2, 1) * contrast, rng.uniform(6, 40)
    kind = rng.choice(("plain", "stripes", "checks", "blobs", "grain"))
    texture: Mask = np.zeros((height, width), np.float32)
    if kind == "stripes":
        texture = np.sin(2 * math.pi / period * along + rng.uniform(0, 6))
    elif kind == "checks":
        texture = (((x // period) + (y // period)) % 2) * 2 - 1
    elif kind == "blobs":
        cells = Image.fromarray(noise(rng, max(2, height // 16), max(2, width // 16)))
        texture = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    elif kind == "grain":
        texture = noise(rng, height, width)
    drawn: Canvas = base + (slope + amplitude * texture)[..., None]
    return drawn


def to_image(canvas: Canvas) -> Image.Image:
    """What was drawn, as an image."""
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
