"""Drawings for people: targets and predictions on an image, and a card with the words beside it.

Pure functions on PIL images. Targets are solid and green; predictions are dashed, thin and magenta, so that both can be
seen where they coincide.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from perception_r1.records import Overlay
from perception_r1.text_layout import font_for, shorten, wrap

Colour = tuple[int, int, int]
Pen = ImageDraw.ImageDraw
Rectangle = tuple[float, float, float, float]

TARGET: Final[Colour] = (22, 163, 74)
PREDICTION: Final[Colour] = (240, 32, 158)
_WHITE: Final[Colour] = (255, 255, 255)
_PAPER: Final[Colour] = (250, 250, 248)
_INK: Final[Colour] = (31, 35, 40)
_PALE_INK: Final[Colour] = (107, 114, 122)
_RULE: Final[Colour] = (222, 222, 216)

_MARGIN = 20
_GAP = 24
_LEGEND_HEIGHT = 30
_TITLE_SIZE = 17
_TEXT_SIZE = 15
_HEADING_SIZE = 12
_LEADING = 1.35
"""Distance between lines of text, in font sizes."""
_MAX_LINES = 8
"""Lines of one field of a card: a page of text must not push the reward out of sight."""
_HEADING_COLOURS: Final = {"target": TARGET, "prediction": PREDICTION, "completion": PREDICTION}
_CAPTION_SHARE = 0.7
"""Widest caption, as a share of the image."""
_HIDING_SHARE = 1 / 3
"""Share of a caption that may lie on targets before another place is better."""
_MAX_CAPTIONS = 24
"""Captions of one kind on an image; more would hide it, and then none is written."""
_MAX_EQUAL_CAPTIONS = 3
"""When more overlays than this all have the same caption, it is written once."""


def annotate(
    image: Image.Image, target_overlays: Sequence[Overlay], predicted_overlays: Sequence[Overlay]
) -> Image.Image:
    """A copy of an image with both kinds of overlays on it; lines grow with the image.

    Captions stay inside the image and hide as little as they can of the targets; one that finds no room is left out.
    """
    canvas = image.convert("RGB") if image.mode != "RGB" else image.copy()
    pen = ImageDraw.Draw(canvas)
    unit = max(1, round(max(canvas.size) / 450))
    for overlays, draw in ((target_overlays, _draw_target), (predicted_overlays, _draw_prediction)):
        for overlay in overlays:
            draw(pen, _corners(overlay, canvas.size), unit)
    boxes = [_corners(overlay, canvas.size) for overlay in target_overlays or predicted_overlays]
    occupied: list[Rectangle] = []
    for overlays, colour in ((target_overlays, TARGET), (predicted_overlays, PREDICTION)):
        for overlay in _captioned(overlays):
            _draw_caption(pen, overlay, colour, size=canvas.size, unit=unit, boxes=boxes, occupied=occupied)
    return canvas


def fit(image: Image.Image, side: int) -> Image.Image:
    """An image scaled smoothly so that its longer side has `side` pixels."""
    width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def draw_card(
    image: Image.Image,
    *,
    title: str,
    fields: Mapping[str, str],
    target_overlays: Sequence[Overlay] = (),
    predicted_overlays: Sequence[Overlay] = (),
    panel_width: int = 448,
) -> Image.Image:
    """A card: the annotated image with its legend on the left, a title and named texts on the right.

    The title is one line, cut where it is too long; each text of `fields` is wrapped under its heading and cut after a
    few lines. Any text is safe. Image and words get `panel_width` pixels each.
    """
    canvas = annotate(fit(image, panel_width), target_overlays, predicted_overlays)
    has_legend = bool(target_overlays or predicted_overlays)
    words = _layout_words(title, fields, panel_width)
    words_height = sum(height for *_, height in words)
    content_height = max(canvas.height + (_LEGEND_HEIGHT if has_legend else 0), math.ceil(words_height))
    card = Image.new("RGB", (2 * (_MARGIN + panel_width) + _GAP, content_height + 2 * _MARGIN), _PAPER)
    pen = ImageDraw.Draw(card)

    left = _MARGIN + (panel_width - canvas.width) // 2
    card.paste(canvas, (left, _MARGIN))
    pen.rectangle((left - 1, _MARGIN - 1, left + canvas.width, _MARGIN + canvas.height), outline=_RULE)
    if has_legend:
        _draw_legend(pen, left, _MARGIN + canvas.height + _LEGEND_HEIGHT * 0.6)
    column, top = _MARGIN + panel_width + _GAP, float(_MARGIN)
    for text, font, colour, height in words:
        pen.text((column, top), text, fill=colour, font=font)
        top += height
    pen.rectangle((0, 0, card.width - 1, card.height - 1), outline=_RULE)
    return card


def contact_sheet(cards: Sequence[Image.Image], *, num_columns: int = 2) -> Image.Image:
    """Cards on one image, row by row; every row is as high as its highest card.

    Raises:
        ValueError: There are no cards.
    """
    if not cards:
        raise ValueError("A contact sheet needs at least one card.")
    rows = [cards[start : start + num_columns] for start in range(0, len(cards), num_columns)]
    width = max(sum(card.width + _MARGIN for card in row) for row in rows) + _MARGIN
    heights = [max(card.height for card in row) + _MARGIN for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), _WHITE)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for card in row:
            sheet.paste(card, (left, top))
            left += card.width + _MARGIN
        top += height
    return sheet


def _layout_words(
    title: str, fields: Mapping[str, str], width: int
) -> list[tuple[str, ImageFont.FreeTypeFont, Colour, float]]:
    """Lines of the right half with font, colour and height."""
    font = font_for(title, _TITLE_SIZE)
    words = [(shorten(title, font=font, width=width), font, _INK, _TITLE_SIZE * 1.9)]
    for heading, text in fields.items():
        font = font_for(heading, _HEADING_SIZE)
        name = shorten(heading.upper(), font=font, width=width)
        words.append((name, font, _HEADING_COLOURS.get(heading, _PALE_INK), _HEADING_SIZE * 1.5))
        font = font_for(text, _TEXT_SIZE)
        lines = wrap(text, font=font, width=width, max_lines=_MAX_LINES)
        words += [(line, font, _INK, _TEXT_SIZE * _LEADING) for line in lines]
        words.append(("", font, _INK, _TEXT_SIZE * 0.6))
    return words


def _corners(overlay: Overlay, size: tuple[int, int]) -> Rectangle:
    """An overlay in pixels of an image; a point is a box without extent."""
    xs = sorted(min(max(x, 0.0), 1.0) * (size[0] - 1) for x in overlay.shape[0::2])
    ys = sorted(min(max(y, 0.0), 1.0) * (size[1] - 1) for y in overlay.shape[1::2])
    return round(xs[0]), round(ys[0]), round(xs[-1]), round(ys[-1])


def _draw_target(pen: Pen, corners: Rectangle, unit: int) -> None:
    left, top, right, bottom = corners
    if left == right and top == bottom:
        for radius, colour in ((8 * unit, _WHITE), (7 * unit, TARGET)):
            pen.ellipse((left - radius, top - radius, left + radius, top + radius), fill=colour)
    else:
        pen.rectangle((left - unit, top - unit, right + unit, bottom + unit), outline=_WHITE, width=unit)
        pen.rectangle(corners, outline=TARGET, width=4 * unit)


def _draw_prediction(pen: Pen, corners: Rectangle, unit: int) -> None:
    left, top, right, bottom = corners
    if left == right and top == bottom:
        arm = 4 * unit
        for width, colour in ((4 * unit, _WHITE), (2 * unit, PREDICTION)):
            pen.line((left - arm, top - arm, left + arm, top + arm), fill=colour, width=width)
            pen.line((left - arm, top + arm, left + arm, top - arm), fill=colour, width=width)
        return
    inset = min(unit, (right - left) // 2, (bottom - top) // 2)
    left, top, right, bottom = left + inset, top + inset, right - inset, bottom - inset
    thickness = 2 * unit - 1
    for start, end in _dashes(left, right, 7 * unit):
        pen.rectangle((start, top, end, min(top + thickness, bottom)), fill=PREDICTION)
        pen.rectangle((start, max(bottom - thickness, top), end, bottom), fill=PREDICTION)
    for start, end in _dashes(top, bottom, 7 * unit):
        pen.rectangle((left, start, min(left + thickness, right), end), fill=PREDICTION)
        pen.rectangle((max(right - thickness, left), start, right, end), fill=PREDICTION)


def _dashes(start: float, end: float, length: int) -> Iterator[tuple[float, float]]:
    """Dashes along a line, as long as the gaps between them; both ends of the line are inked."""
    count = max(1, round((end - start) / (2 * length)))
    step = (end - start) / (2 * count + 1)
    for index in range(count + 1):
        yield round(start + 2 * index * step), round(start + (2 * index + 1) * step)


def _captioned(overlays: Sequence[Overlay]) -> Sequence[Overlay]:
    """The overlays whose captions are worth their room."""
    named = [overlay for overlay in overlays if overlay.caption.strip()]
    if len(named) > _MAX_EQUAL_CAPTIONS and len({overlay.caption for overlay in named}) == 1:
        return named[:1]
    return named if len(named) <= _MAX_CAPTIONS else []


def _draw_caption(
    pen: Pen,
    overlay: Overlay,
    colour: Colour,
    *,
    size: tuple[int, int],
    unit: int,
    boxes: Sequence[Rectangle],
    occupied: list[Rectangle],
) -> None:
    """Write a caption on a tag of its colour where it hides least of `boxes`; add it to `occupied`."""
    font_size, padding = 12 + 2 * unit, 3 * unit
    font = font_for(overlay.caption, font_size)
    text = shorten(overlay.caption, font=font, width=size[0] * _CAPTION_SHARE - 2 * padding)
    width, height = math.ceil(font.getlength(text)) + 2 * padding, round(font_size * _LEADING) + unit
    free = []
    for left, top in _caption_corners(_corners(overlay, size), width, height, is_target=colour == TARGET):
        left = min(max(left, 0), size[0] - width)
        tag = (left, top, left + width - 1, top + height - 1)
        if text and left >= 0 and top >= 0 and tag[3] < size[1] and not any(_shared_area(tag, o) for o in occupied):
            free.append(tag)
    if free:
        step = width * height * _HIDING_SHARE
        tag = min(free, key=lambda tag: sum(_shared_area(tag, box) for box in boxes) // step)  # the first of equals
        pen.rectangle(tag, fill=colour)
        pen.text((tag[0] + padding, tag[1] + height / 2), text, fill=_WHITE, font=font, anchor="lm")
        occupied.append(tag)


def _caption_corners(corners: Rectangle, width: int, height: int, *, is_target: bool) -> list[tuple[float, float]]:
    """Top left corners to try: a target's caption stands above its box, a prediction's below, else inside or beside it.

    The caption of a point stands next to it.
    """
    left, top, right, bottom = corners
    if (left, top) == (right, bottom):
        reach, middle = height / 2, top - height / 2
        around = [(left - width / 2, top - height - reach), (left - width / 2, top + reach)]
        return [*(around if is_target else around[::-1]), (left + reach, middle), (left - reach - width, middle)]
    above, below = top - height, bottom + 1
    outer, inner = ((above, below), (top, bottom - height)) if is_target else ((below, above), (bottom - height, top))
    over_and_under = [(x, y) for y in (outer[0], inner[0], inner[1], outer[1]) for x in (left, right - width)]
    return over_and_under + [(x, y) for x in (right + 1, left - width) for y in inner]


def _shared_area(first: Rectangle, second: Rectangle) -> float:
    """Pixels that two rectangles share; their right and bottom edges belong to them."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    return max(width, 0) * max(height, 0)


def _draw_legend(pen: Pen, left: float, middle: float) -> None:
    font = font_for("", _TEXT_SIZE)
    _draw_target(pen, (left, middle - 7, left + 22, middle + 7), 1)
    pen.text((left + 30, middle), "target", fill=_INK, font=font, anchor="lm")
    left += 30 + font.getlength("target") + _GAP
    _draw_prediction(pen, (round(left), middle - 7, round(left) + 22, middle + 7), 1)
    pen.text((left + 30, middle), "prediction", fill=_INK, font=font, anchor="lm")
