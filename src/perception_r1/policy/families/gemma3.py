"""Gemma 3: pictures of one size, whose tokens see each other in both directions, and windows in most layers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from perception_r1.codecs import JsonCodec
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.families.base import Family, VisionLanguageModel
from perception_r1.policy.families.tiles import TileProcessor


class Gemma3Codec(JsonCodec):
    """JSON as Gemini writes it: rows before columns, numbers 0..1000 of the image's height and width.

    Gemma's own documentation names no form. Its authors point to that of Gemini, which Gemma is made after
    (https://huggingface.co/google/gemma-3-4b-it/discussions/38, and Gemini's page on bounding boxes); a model that has
    to learn a form anyway learns this one from the nearest start.

    >>> from perception_r1.records import ImageSize, LabelledBox
    >>> image_size = ImageSize(width=1280, height=960, resized_width=896, resized_height=896)
    >>> text = Gemma3Codec().format_boxes([LabelledBox(label="cat", box=(0.25, 0.5, 0.75, 1.0))], image_size)
    >>> text
    '[{"box_2d": [500, 250, 1000, 750], "label": "cat"}]'
    >>> Gemma3Codec().parse_boxes(text, image_size)
    ParsedBoxes(items=(ParsedBox(label='cat', box=(0.25, 0.5, 0.75, 1.0)),), is_exact=True)
    >>> Gemma3Codec().parse_boxes('[{"bbox_2d": [500, 250, 1000, 750]}]', image_size)  # another family's key
    ParsedBoxes(items=(ParsedBox(label=None, box=None),), is_exact=True)
    """

    name = "gemma3"
    description = "as JSON, rows before columns, in thousandths of the image"
    key = "box_2d"
    order = (1, 0, 3, 2)


class Gemma3Processor(TileProcessor):
    """A picture is a single square; the crops of pan and scan are not made."""

    image_token, feature_token = "<start_of_image>", "<image_soft_token>"
    end_of_turn = "<end_of_turn>"  # the tokenizer's own is <eos>
    image_processor_class = Gemma3ImageProcessorPil
    call_options: ClassVar[dict[str, Any]] = {"do_pan_and_scan": False}

    @classmethod
    def image_options(cls, config: Any) -> dict[str, Any]:
        """See `Processor`."""
        side = config.vision_config.image_size
        return {"size": {"height": side, "width": side}}

    @classmethod
    def read_layout(cls, config: Any) -> dict[str, Any]:
        """See `Processor`."""
        num_patches = config.vision_config.image_size // config.vision_config.patch_size
        return {"num_patches": num_patches, "tokens_per_tile": config.mm_tokens_per_image}

    def set_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """See `Processor`."""
        if min_pixels is not None or max_pixels is not None:
            side = self.tile_size
            raise UserError(f"Gemma 3 sees pictures at {side} x {side} pixels; leave out min_pixels and max_pixels.")

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """See `Processor`."""
        return self.tile_size**2, self.tile_size**2

    def placeholder(self, num_tokens: int) -> str:
        """See `Processor`."""
        return f"\n\n{self.image_token}{self.feature_token * num_tokens}<end_of_image>\n\n"


class Gemma3(Family):
    """See `Family`."""

    name = "gemma3"
    codec = Gemma3Codec()
    processor = Gemma3Processor
    shares_prompts = False

    def encode_images(self, model: VisionLanguageModel, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """See `Family`."""
        pixels = torch.cat(prompts.pixel_values)
        features = model.model.get_image_features(pixels, return_dict=True).pooler_output
        return tuple(features.split(1))

    def vision_modules(self, model: VisionLanguageModel) -> list[nn.Module]:
        """See `Family`."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def vision_blocks(self, model: VisionLanguageModel) -> list[nn.Module]:
        """See `Family`."""
        return list(model.model.vision_tower.encoder.layers)

    def mask_inputs(self, is_image: Tensor) -> dict[str, Tensor]:
        """See `Family`."""
        return {"token_type_ids": is_image.long()}
