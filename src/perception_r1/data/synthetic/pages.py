"""A world of pages: lines of words and numbers in several fonts, weights and sizes, a little turned and grainy."""

import random
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from perception_r1.data.synthetic.render import noise, to_image
from perception_r1.data.synthetic.worlds import Owner, Scene, Thing, World, check_ranges

_FONT_FOLDER = files("perception_r1.data.synthetic") / "fonts"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")

CONSONANTS, VOWELS = "bcdfghjkmnprstvwxz", "aeiou"
DIGITS = "0123456789"
CHARACTERS = CONSONANTS + VOWELS + DIGITS + CONSONANTS.upper()
"""All characters of a page, without those that some fonts draw alike (l and I, O and 0 stand in no word)."""

_BLOCK = 28
"""Pages are whole numbers of image tokens wide and high, so that no model has to resize them."""
_NUMBER_SHARE, _CAPITAL_SHARE = 0.25, 0.25


@dataclass(frozen=True, kw_only=True)
class TextWorld(World):
    """Lines of text on paper.

    Attributes:
        min_lines: Fewest lines.
        max_lines: Most lines.
        max_width: Width of the widest page in pixels.
        min_font_size: Smallest font in pixels.
        max_font_size: Largest font in pixels.
        max_word: Most characters of a word or number.
        max_angle: Largest rotation of a page to either side, in degrees.
        max_noise: Largest deviation of a single pixel, in steps of 0 to 255.
    """

    min_lines: int = 1
    max_lines: int = 3
    max_width: int = 140
    min_font_size: int = 14
    max_font_size: int = 22
    max_word: int = 7
    max_angle: float = 3.0
    max_noise: float = 24.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, min_lines=(1, 100), max_lines=(self.min_lines, 100), max_width=(56, 4096))
        check_ranges(self, min_font_size=(8, 200), max_font_size=(self.min_font_size, 200), max_word=(2, 100))
        check_ranges(self, max_angle=(0, 15), max_noise=(0, 80))

    def draw(self, rng: random.Random) -> Scene:
        """A row with text."""
        font = _font(rng.choice(FONTS), self.pick(rng, self.max_font_size, self.min_font_size))
        lines = [self._line(rng, font) for _ in range(self.pick(rng, self.min_lines, self.max_lines))]
        ascent, descent = font.getmetrics()
        leading = ascent + descent + rng.randint(0, 3)
        margin = rng.randint(3, 8)
        width = _whole_blocks(max(font.getlength(line) for line in lines) + 2 * margin)
        height = _whole_blocks(leading * len(lines) + 2 * margin)
        ink = Image.new("L", (width, height), 0)
        names = Image.new("I", (width, height), 0)  # number of the character at a pixel, from 1
        pen, naming = ImageDraw.Draw(ink), ImageDraw.Draw(names)
        top = rng.randint(margin, max(margin, height - margin - leading * len(lines)))
        characters: list[str] = []
        for number, line in enumerate(lines):
            free = width - font.getlength(line)
            left, y = rng.uniform(min(margin, free / 2), max(free / 2, free - margin)), top + number * leading
            pen.text((left, y), line, fill=255, font=font)
            for index, char in enumerate(line):
                if char != " ":
                    characters.append(char)
                    start, end = left + font.getlength(line[:index]), left + font.getlength(line[: index + 1])
                    naming.rectangle((start, y, end - 1, y + ascent + descent), fill=len(characters))
        angle = self.hardness(rng) * self.max_angle * rng.choice((-1, 1))
        cover = np.asarray(ink.rotate(angle, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
        owner: Owner = (np.asarray(names.rotate(angle, Image.Resampling.NEAREST)) - 1).astype(np.int16)
        grain = noise(rng, height, width)[..., None] * self.hardness(rng) * self.max_noise
        return Scene(
            image=to_image(_paper(rng, width) * (1 - cover) + _ink(rng) * cover + grain),
            values={"text": "\n".join(lines)},
            things=tuple(
                Thing(name=char, colour="", box=_extent(owner, index)) for index, char in enumerate(characters)
            ),
            owner=owner,
        )

    def _line(self, rng: random.Random, font: ImageFont.FreeTypeFont) -> str:
        """A word or more, as many as the page is wide."""
        room = self.max_width - 2 * 8
        line = self._word(rng)
        while font.getlength(line) > room:
            line = line[:-1]
        for _ in range(self.pick(rng, 0, 2)):
            longer = f"{line} {self._word(rng)}"
            if font.getlength(longer) <= room:
                line = longer
        return line

    def _word(self, rng: random.Random) -> str:
        """A number, or letters that could be a word."""
        length = self.pick(rng, 2, self.max_word)
        if rng.random() < _NUMBER_SHARE:
            return "".join(rng.choices(DIGITS, k=length))
        is_consonant = rng.random() < 0.75
        word = ""
        while len(word) < length:
            word += rng.choice(CONSONANTS if is_consonant else VOWELS)
            is_consonant = not is_consonant if rng.random() < 0.9 else is_consonant
        is_capital = rng.random() < _CAPITAL_SHARE and word[0] in CONSONANTS
        return word[0].upper() + word[1:] if is_capital else word


def _paper(rng: random.Random, width: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """A light colour, a little darker towards one side; [1, width, 3]."""
    base = np.array([rng.uniform(190, 250)] * 3, np.float32) + [rng.uniform(-12, 5) for _ in range(3)]
    shade = np.linspace(0, rng.uniform(-30, 30), width, dtype=np.float32)
    return (base[None] + shade[:, None])[None].astype(np.float32)


def _ink(rng: random.Random) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """A dark colour; [3]."""
    grey = rng.uniform(5, 80)
    return np.array([grey + rng.uniform(-5, 30) for _ in range(3)], np.float32)


def _extent(owner: Owner, index: int) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(owner == index)
    return (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(ys) else (0, 0, 1, 1)


def _whole_blocks(length: float) -> int:
    return -(-int(length + 0.999) // _BLOCK) * _BLOCK


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(BytesIO((_FONT_FOLDER / f"{name}.ttf").read_bytes()), size)
