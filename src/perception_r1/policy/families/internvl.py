"""InternVL3: tiles of a picture, a language model of Qwen with plain positions, boxes between tags."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_optimal_tiled_canvas,
)

from perception_r1.codecs import InternVLCodec
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.families.base import Family, VisionLanguageModel
from perception_r1.policy.families.tiles import TileProcessor
from perception_r1.records import ImageSize

_TAGS = ("<img>", "</img>")
"""Around the features of a picture."""
_TEXT_MODELS = ("qwen2", "qwen3")
"""Language models that the engine knows; the family has others, with experts too."""


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
