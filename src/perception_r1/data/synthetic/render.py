"""What synthetic scenes are drawn with: backgrounds, shapes, characters, grain. All randomness is the caller's."""

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {"red": (238, 58, 52), "green": (52, 205, 92), "blue": (66, 112, 252), "yellow": (250, 214, 56)}
SHAPES = ("circle", "square")

_RAMP = (26, 118)
"""Darkest and lightest value of the two channels that carry the position: wide, yet clear of every object's colour."""


def background(rng: random.Random, size: int, tint: int) -> Image.Image:
    """Red grows to the right and green downwards by a fixed ramp; blue is a random slope."""
    ramp = np.linspace(*_RAMP, size)
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[..., 0] = ramp[None, :] + rng.uniform(-tint, tint)
    pixels[..., 1] = ramp[:, None] + rng.uniform(-tint, tint)
    unit = np.linspace(-1.0, 1.0, size)
    across, down = rng.uniform(-2, 2) * tint, rng.uniform(-2, 2) * tint
    pixels[..., 2] = np.clip(96 + rng.uniform(-3, 3) * tint + across * unit[None, :] + down * unit[:, None], 0, 255)
    return Image.fromarray(pixels)


def tinted(rng: random.Random, grey: int, tint: int) -> tuple[int, int, int]:
    """A grey with each channel shifted a little."""
    red, green, blue = (min(255, max(0, grey + rng.randint(-tint, tint))) for _ in range(3))
    return red, green, blue


def grain(rng: random.Random, image: Image.Image, noise: int) -> Image.Image:
    """Uniform noise on the brightness of every pixel; from the generator's bytes, the same on every platform."""
    if noise == 0:
        return image
    values = np.frombuffer(rng.randbytes(image.width * image.height), np.uint8).reshape(image.height, image.width, 1)
    shift = values.astype(np.int16) * (2 * noise + 1) // 256 - noise
    return Image.fromarray(np.clip(np.asarray(image) + shift, 0, 255).astype(np.uint8))


@lru_cache(maxsize=64)
def mask(shape: str, size: int) -> Image.Image:
    """Coverage of a shape that touches all four sides of its box; round edges are smooth."""
    if shape == "square":
        return Image.new("L", (size, size), 255)
    scale = 8
    large = Image.new("L", (size * scale, size * scale), 0)
    ImageDraw.Draw(large).ellipse((0, 0, size * scale - 1, size * scale - 1), fill=255)
    return large.resize((size, size), Image.Resampling.BOX)


@lru_cache(maxsize=512)
def glyph(char: str, font_size: int, width: int, height: int) -> Image.Image:
    """Coverage of a character in the middle of its cell; one that is too wide for it is narrowed."""
    font = ImageFont.load_default(font_size)
    full = Image.new("L", (4 * font_size, height), 0)
    ImageDraw.Draw(full).text((2 * font_size, height / 2), char, fill=255, font=font, anchor="mm")
    left, _, right, _ = full.getbbox() or (0, 0, 1, 1)
    ink = full.crop((left, 0, right, height))
    if ink.width > width:
        ink = ink.resize((width, height), Image.Resampling.BOX)
    cell = Image.new("L", (width, height), 0)
    cell.paste(ink, ((width - ink.width) // 2, 0))
    return cell
