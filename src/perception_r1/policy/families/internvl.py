"""InternVL3: tiles of a picture, a language model of Qwen with plain positions, boxes between tags."""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_optimal_tiled_canvas,
)

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
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.families.base import Family, VisionLanguageModel
from perception_r1.policy.families.tiles import TileProcessor
from perception_r1.records import ImageSize, LabelledBox

_TAGS = ("<img>", "</img>")
"""Around the features of a picture."""
_TEXT_MODELS = ("qwen2", "qwen3")
"""Language models that the engine knows; the family has others, with experts too."""
_TAG = re.compile(r"</?(?:ref|box)>")
_BOX = re.compile(r"\[" + r"\s*+,".join([rf"\s*+({NUMBER})"] * 4) + r"\s*+\]")
_ANY_BOX = _BOX.pattern.replace(f"({NUMBER})", NUMBER)
_LABEL = r"<ref>(?P<label>[^<]*+(?:<(?!/?(?:ref|box)>)[^<]*+)*+)</ref>"
_TOKEN = re.compile(rf"{_LABEL}|<box>\[(?P<boxes>\s*+{_ANY_BOX}(?:\s*+,\s*+{_ANY_BOX})*+\s*+)\]</box>")
_START = re.compile(rf"{_LABEL}|<box>\[")
_FIRST = re.compile(rf"\s*+{_BOX.pattern}")
_NEXT = re.compile(rf"\s*+,\s*+{_BOX.pattern}")


class InternVLCodec(Codec):
    """Tags around a label and the list of its boxes, integers 0..1000 of the image's width and height.

    It is the form of InternVL's documentation (https://internvl.readthedocs.io, chat data format, grounding): a label
    once, and all its boxes in one list behind it. An empty list of objects is the empty text. Reading finds complete
    lists anywhere, each with the label before it; the text is exact when it is nothing but labels with one list each,
    and no label is repeated where its list could have gone on.

    >>> image_size = ImageSize(width=640, height=480, resized_width=896, resized_height=448)
    >>> cats = [LabelledBox(label="cat", box=(0.1, 0.2, 0.5, 1.0)), LabelledBox(label="cat", box=(0.0, 0.0, 1.0, 1.0))]
    >>> text = InternVLCodec().format_boxes(cats, image_size)
    >>> text
    '<ref>cat</ref><box>[[100, 200, 500, 1000], [0, 0, 1000, 1000]]</box>'
    >>> [item.box for item in InternVLCodec().parse_boxes(text, image_size).items]
    [(0.1, 0.2, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)]
    >>> InternVLCodec().parse_boxes("Here: <box>[[9, 9, 1, 1]]</box>", image_size)  # inverted, after prose
    ParsedBoxes(items=(ParsedBox(label=None, box=None),), is_exact=False)
    >>> InternVLCodec().parse_boxes("<ref>cat</ref><box>[[9, 9]]</box>", image_size)  # no box
    ParsedBoxes(items=(), is_exact=False)
    """

    name = "internvl"
    description = "between box tags, in thousandths of the image"

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects, in their order.

        Raises:
            UserError: A label is empty or holds what could be read as a tag.
        """
        parts = []
        for label, group in groupby(objects, key=lambda item: item.label):
            if not label or _TAG.search(label):
                raise UserError(f"a label in the InternVL form needs text without its tags, not {label!r}")
            boxes = [list(to_units(item.box, PER_MILLE, PER_MILLE)) for item in group]
            parts.append(f"<ref>{label}</ref><box>{json.dumps(boxes)}</box>")
        return "".join(parts)

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises."""
        text = text.strip()
        items: list[ParsedBox] = []
        label: str | None = None
        end, is_exact, awaits_boxes = 0, True, False
        for token in _TOKEN.finditer(text):
            is_label = token["label"] is not None
            is_exact = is_exact and token.start() == end and is_label != awaits_boxes
            end = token.end()
            if is_label:
                is_exact = is_exact and token["label"] != label
                label = token["label"]
            else:
                items += [self._item(label, box) for box in _BOX.finditer(token["boxes"])]
            awaits_boxes = is_label
            if len(items) > MAX_OBJECTS:
                return NOTHING
        return ParsedBoxes(items=tuple(items), is_exact=is_exact and end == len(text) and not awaits_boxes)

    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """See `Codec`."""
        found: list[tuple[int, ParsedBox]] = []
        label: str | None = None
        for token in _START.finditer(text):
            if token["label"] is not None:
                label = token["label"]
                continue
            box = _FIRST.match(text, token.end())
            while box is not None and len(found) < MAX_OBJECTS:
                found.append((box.end(), self._item(label, box)))
                box = _NEXT.match(text, box.end())
        return found

    def _item(self, label: str | None, box: re.Match[str]) -> ParsedBox:
        """A box behind a label."""
        numbers = [float(number) for number in box.groups()]
        return ParsedBox(label=label, box=from_units(numbers, PER_MILLE, PER_MILLE))


class InternVLProcessor(TileProcessor):
    """As many tiles as fit the picture's shape, and behind several of them the whole picture as one more.

    A bound in pixels is one of tiles: `max_pixels` is rounded down to whole tiles, `min_pixels` up.
    """

    image_token = feature_token = "<IMG_CONTEXT>"
    image_processor_class = GotOcr2ImageProcessorPil
    call_options: ClassVar[dict[str, Any]] = {"crop_to_patches": True}  # as the family's own processor does
    restores_pictures = False  # the last tile is made of the picture itself

    @classmethod
    def image_options(cls, config: Any) -> dict[str, Any]:
        """See `Processor`."""
        height, width = config.vision_config.image_size
        return {"size": {"height": height, "width": width}}

    @classmethod
    def read_layout(cls, config: Any) -> dict[str, Any]:
        """See `Processor`."""
        num_patches = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        return {"num_patches": num_patches, "tokens_per_tile": config.image_seq_length}

    def set_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """See `Processor`."""
        tile, images = self.tile_size**2, self.image_processor
        if max_pixels is not None and max_pixels < tile:
            raise UserError(f"max_pixels is {max_pixels}; a picture is at least a tile of {tile} pixels here.")
        low = images.min_patches if min_pixels is None else -(-min_pixels // tile)
        high = images.max_patches if max_pixels is None else max_pixels // tile
        if low > high:
            raise UserError(f"min_pixels ({low} tiles of {tile} pixels) must not exceed max_pixels ({high} tiles).")
        images.min_patches, images.max_patches = low, high

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """See `Processor`."""
        tile, images = self.tile_size**2, self.image_processor
        return images.min_patches * tile, images.max_patches * tile

    @property
    def hub_options(self) -> dict[str, Any]:
        """See `Processor`; torchvision would resize pictures a little otherwise."""
        images = self.image_processor
        bounds = {"min_patches": images.min_patches, "max_patches": images.max_patches}
        return {"use_fast": False, **self.call_options, **bounds}

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """See `TileProcessor`."""
        low, high = self.image_processor.min_patches, self.image_processor.max_patches
        return get_optimal_tiled_canvas((height, width), (self.tile_size, self.tile_size), low, high)

    @property
    def largest_image_size(self) -> ImageSize:
        """See `Processor`."""
        low, high = self.image_processor.min_patches, self.image_processor.max_patches
        columns, rows = get_all_supported_aspect_ratios(low, high)[-1]
        return self.image_size(columns * self.tile_size, rows * self.tile_size)

    def num_tiles(self, image_size: ImageSize) -> int:
        """See `TileProcessor`."""
        count = super().num_tiles(image_size)
        return count + 1 if count > 1 else 1

    def placeholder(self, num_tokens: int) -> str:
        """See `Processor`."""
        start, end = _TAGS
        return f"{start}{self.feature_token * num_tokens}{end}"

    def without_repeats(self, input_ids: Tensor) -> list[int]:
        """See `Processor`; the tags belong to what stands for the placeholder."""
        tags = [self.tokenizer.convert_tokens_to_ids(tag) for tag in _TAGS]
        return [token for token in super().without_repeats(input_ids) if token not in tags]


class InternVL(Family):
    """See `Family`."""

    name = "internvl"
    codec = InternVLCodec()
    processor = InternVLProcessor
    vision_tokens = _TAGS
    no_mask: ClassVar[Any] = {"full_attention": None}

    def check(self, name: str, config: Any) -> None:
        """See `Family`."""
        super().check(name, config)
        kind = config.get_text_config().model_type
        if kind not in _TEXT_MODELS:
            raise UserError(f"{name} has a language model of the family {kind}; known are {', '.join(_TEXT_MODELS)}.")

    def prepare(self, model: VisionLanguageModel) -> None:
        """See `Family`. Frequencies that change beyond the longest sequence only are left alone.

        To ask for the longest position, as transformers does in every pass, would mean to wait for the device.
        """
        super().prepare(model)
        rotary = model.model.language_model.rotary_emb
        rotary.rope_type = "default" if rotary.rope_type == "dynamic" else rotary.rope_type

    def encode_images(self, model: VisionLanguageModel, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """See `Family`."""
        counts = [len(tiles) for tiles in prompts.pixel_values]
        tiles = model.model.get_image_features(torch.cat(prompts.pixel_values), return_dict=True).pooler_output
        return tuple(image.flatten(0, 1)[None] for image in tiles.split(counts))

    def vision_modules(self, model: VisionLanguageModel) -> list[nn.Module]:
        """See `Family`."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def vision_blocks(self, model: VisionLanguageModel) -> list[nn.Module]:
        """See `Family`."""
        return list(model.model.vision_tower.encoder.layer)
