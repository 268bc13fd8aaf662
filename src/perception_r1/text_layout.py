"""Letters on images: any text whatever, a model's rubbish included, becomes lines that fit a width."""

import bisect
import re
import unicodedata
from functools import cache, lru_cache

from PIL import ImageFont

MAX_CHARACTERS = 2_000
"""Longest text that is read; a card shows about half of it."""

_FALLBACKS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf")
"""Fonts of other scripts, used where installed: the built-in one knows little more than ASCII."""
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories with no glyph, or with an effect on the letters around them (reading direction, line breaks)."""
_MARK_STACK = re.compile("([\u0300-\u036f]{2})[\u0300-\u036f]+")
_WORD = re.compile(r" *(?:<\|\w+\|>|[^ <]+|<)| +")
_NO_GLYPH = "\U0010fffe"
"""A character that no font may have: it shows how a font draws what it lacks."""
_ELLIPSIS = "..."


def visible(text: str) -> str:
    r"""A text in which everything can be seen: what has no glyph is written as an escape, long texts are cut.

    >>> visible("a\u200bb\x1b[0m")
    'a\\u200bb\\x1b[0m'
    """
    head = _MARK_STACK.sub(r"\1", unicodedata.normalize("NFC", text[:MAX_CHARACTERS].replace("\t", "    ")))
    escaped = "".join(_escape(character) for character in head)
    is_cut = len(text) > MAX_CHARACTERS or len(escaped) > MAX_CHARACTERS
    return escaped[:MAX_CHARACTERS] + _ELLIPSIS if is_cut else escaped


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The built-in font when it has all letters of a text, else the installed one that lacks the fewest."""
    letters = set(visible(text))
    return min(_fonts(size), key=lambda font: sum(_lacks(font, letter) for letter in letters))


def shorten(text: str, *, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, cut with "..." where it is wider than `width` pixels; empty when nothing fits."""
    line = visible(text).replace("\n", " ")
    if font.getlength(line) <= width:
        return line
    room = width - font.getlength(_ELLIPSIS)
    return line[: _num_fitting(line, font, room)].rstrip() + _ELLIPSIS if room > 0 else ""


def wrap(text: str, *, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """The text in lines of at most `width` pixels; the last of `max_lines` ends in "..." when there is more."""
    lines: list[str] = []
    for paragraph in visible(text).split("\n"):
        lines += _fill(paragraph, font, width)
        if len(lines) > max_lines:
            last = lines[max_lines - 1]
            room = width - font.getlength(_ELLIPSIS)
            return [*lines[: max_lines - 1], last[: _num_fitting(last, font, room)].rstrip() + _ELLIPSIS]
    return lines


def _fill(paragraph: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break one paragraph between words and special tokens, and within a word that is wider than a line."""
    lines: list[str] = []
    line = ""
    for word in _WORD.findall(paragraph):
        if font.getlength(line + word) <= width:
            line += word
            continue
        if line:
            lines.append(line)
        line = word.lstrip(" ")
        while font.getlength(line) > width:
            count = max(1, _num_fitting(line, font, width))
            lines.append(line[:count])
            line = line[count:]
    return [*lines, line]


def _num_fitting(line: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many characters from the start of a line fit a width."""
    return max(0, bisect.bisect_right(range(len(line) + 1), width, key=lambda count: font.getlength(line[:count])) - 1)


def _escape(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _INVISIBLE:
        return character
    return character.encode("unicode_escape").decode("ascii")


@cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """The built-in font and the fallbacks found, all laid out letter by letter from left to right."""
    default = ImageFont.load_default(size=size)
    if not isinstance(default, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so no text can be drawn; install an official wheel.")
    fonts = [default.font_variant(layout_engine=ImageFont.Layout.BASIC)]
    for name in _FALLBACKS:
        try:
            fonts.append(ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC))
        except OSError:
            continue
    return tuple(fonts)


@lru_cache(maxsize=8_192)
def _lacks(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return letter != "\n" and _glyph(font, letter) == _glyph(font, _NO_GLYPH)


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
