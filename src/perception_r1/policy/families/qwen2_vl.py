"""Qwen2-VL: boxes between special tokens."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import Qwen2VLConfig

from perception_r1.codecs import (
    MAX_OBJECTS,
    NOTHING,
    NUMBER,
    PER_MILLE,
    Codec,
    ParsedBox,
    ParsedBoxes,
    from_units,
    to_units,
)
from perception_r1.errors import UserError
from perception_r1.policy.families.qwen_vl import QwenVL
from perception_r1.records import ImageSize, LabelledBox

_TOKEN = re.compile(
    # possessive (`*+`), so that a label without an end is given up at once
    r"<\|object_ref_start\|>(?P<label>(?!<\|)[^<]*+(?:<(?!\|)[^<]*+)*+)<\|object_ref_end\|>"
    r"|<\|box_start\|>"
    rf"\(\s*+(?P<x1>{NUMBER})\s*+,\s*+(?P<y1>{NUMBER})\s*+\)\s*+,"
    rf"\s*+\(\s*+(?P<x2>{NUMBER})\s*+,\s*+(?P<y2>{NUMBER})\s*+\)"
    r"<\|box_end\|>"
)


class Qwen2VLCodec(Codec):
    """Special tokens around label and box, integers 0..1000 of the image's width and height.

    Boxes of one label that stand next to each other share it. An empty list is the empty text, since the form has no
    brackets. Reading finds complete boxes anywhere, each with the label before it; the text is exact when it is nothing
    but labels, each followed by its boxes, and no label is repeated where its boxes could have gone on.

    >>> image_size = ImageSize(width=640, height=480, resized_width=644, resized_height=476)
    >>> text = Qwen2VLCodec().format_boxes([LabelledBox(label="cat", box=(0.1, 0.2, 0.5, 1.0))], image_size)
    >>> text
    '<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|>'
    >>> Qwen2VLCodec().parse_boxes(text, image_size)
    ParsedBoxes(items=(ParsedBox(label='cat', box=(0.1, 0.2, 0.5, 1.0)),), is_exact=True)
    >>> Qwen2VLCodec().parse_boxes("Here: <|box_start|>(9,9),(1,1)<|box_end|>", image_size)  # inverted, after prose
    ParsedBoxes(items=(ParsedBox(label=None, box=None),), is_exact=False)
    >>> Qwen2VLCodec().parse_boxes("", image_size)
    ParsedBoxes(items=(), is_exact=True)
    """

    name = "qwen2_vl"
    description = "between box tokens, in thousandths of the image"

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects, in their order.

        Raises:
            UserError: A label is empty or holds what could be read as a special token.
        """
        parts = []
        for label, group in groupby(objects, key=lambda item: item.label):
            if not label or "<|" in label:
                raise UserError(f"a label in the Qwen2-VL form needs text without '<|', not {label!r}")
            parts.append(f"<|object_ref_start|>{label}<|object_ref_end|>")
            for item in group:
                x1, y1, x2, y2 = to_units(item.box, PER_MILLE, PER_MILLE)
                parts.append(f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
        return "".join(parts)

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises."""
        text = text.strip()
        items: list[ParsedBox] = []
        label: str | None = None
        end, is_exact, awaits_box = 0, True, False
        for token in _TOKEN.finditer(text):
            is_exact = is_exact and token.start() == end
            end = token.end()
            if token["label"] is not None:
                is_exact = is_exact and not awaits_box and token["label"] != label
                label, awaits_box = token["label"], True
                continue
            if len(items) == MAX_OBJECTS:
                return NOTHING
            is_exact = is_exact and label is not None
            items.append(self._item(label, token))
            awaits_box = False
        return ParsedBoxes(items=tuple(items), is_exact=is_exact and end == len(text) and not awaits_box)

    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """See `Codec`."""
        found: list[tuple[int, ParsedBox]] = []
        label: str | None = None
        for token in _TOKEN.finditer(text):
            if token["label"] is not None:
                label = token["label"]
            elif len(found) < MAX_OBJECTS:
                found.append((token.end(), self._item(label, token)))
        return found

    def _item(self, label: str | None, token: re.Match[str]) -> ParsedBox:
        """A box behind a label."""
        numbers = [float(token[side]) for side in ("x1", "y1", "x2", "y2")]
        return ParsedBox(label=label, box=from_units(numbers, PER_MILLE, PER_MILLE))


class Qwen2VL(QwenVL):
    """See `Family`."""

    name = "qwen2_vl"
    codec = Qwen2VLCodec()

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Qwen2VLConfig:
        """See `QwenVL`."""
        sizes = {"embed_dim": vision["hidden_size"], "hidden_size": vision["out_hidden_size"], "mlp_ratio": 4}
        kept = {name: value for name, value in vision.items() if name != "out_hidden_size"}
        return Qwen2VLConfig(text_config=text, vision_config=kept | sizes | {"patch_size": 14}, **common)
