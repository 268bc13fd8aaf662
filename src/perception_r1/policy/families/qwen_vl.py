"""What the Qwen-VL families share: pictures of any size in patches, and positions in time, height and width.

Legend: P tokens of a prompt, N patches.
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import isqrt, prod
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from perception_r1.errors import UserError
from perception_r1.policy.batch import Grid, PromptBatch
from perception_r1.policy.families.base import Family, VisionLanguageModel
from perception_r1.policy.families.qwen_vision import encode_images, simplify_tower
from perception_r1.policy.processor import Processor
from perception_r1.records import ImageSize

MAX_ASPECT = 200
"""Longest side of a picture over its shortest: what smart-resize of these families takes."""

_MAX_PIXELS = 12_845_056
"""Largest picture by the files of the larger models of these families."""


class QwenVLProcessor(Processor):
    """Pictures keep about their shape; `merge_size` patches in height and in width make a token."""

    image_token = feature_token = "<|image_pad|>"
    other_placeholders = ("<|video_pad|>",)
    image_processor_class = Qwen2VLImageProcessorPil

    @classmethod
    def image_options(cls, config: Any) -> dict[str, Any]:
        """See `Processor`."""
        vision = config.vision_config
        sides = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        return {**sides, "temporal_patch_size": vision.temporal_patch_size}

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: Any) -> Self:
        """See `Processor`."""
        processor = super().from_config(tokenizer, config)
        processor.set_bounds(processor._factor**2, _MAX_PIXELS)
        return processor

    def set_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """See `Processor`."""
        low, high = self.pixel_bounds
        low, high = low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels
        if low > high:
            raise UserError(f"min_pixels ({low}) must not exceed max_pixels ({high}).")
        self.image_processor.size = {"shortest_edge": low, "longest_edge": high}

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """See `Processor`."""
        size = self.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    @property
    def hub_options(self) -> dict[str, Any]:
        """See `Processor`."""
        low, high = self.pixel_bounds
        return {"size": {"shortest_edge": low, "longest_edge": high}}

    def image_size(self, width: int, height: int) -> ImageSize:
        """See `Processor`."""
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise UserError(
                f"A picture has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other."
            )
        low, high = self.pixel_bounds
        rows, columns = smart_resize(height, width, factor=self._factor, min_pixels=low, max_pixels=high)
        return ImageSize(width=width, height=height, resized_width=columns, resized_height=rows)

    @property
    def largest_image_size(self) -> ImageSize:
        """See `Processor`: of about as many pixels as may be."""
        most = self.pixel_bounds[1] // self._factor**2
        height = isqrt(most) * self._factor
        width = most // isqrt(most) * self._factor
        return ImageSize(width=width, height=height, resized_width=width, resized_height=height)

    def grid(self, image_size: ImageSize) -> Grid:
        """See `Processor`."""
        side = self.image_processor.patch_size
        return 1, image_size.resized_height // side, image_size.resized_width // side

    def pixel_shape(self, grid: Grid) -> tuple[int, ...]:
        """See `Processor`."""
        times, side = self.image_processor.temporal_patch_size, self.image_processor.patch_size
        return prod(grid), len(self.image_processor.image_mean) * times * side**2

    def num_image_tokens(self, image_size: ImageSize) -> int:
        """See `Processor`."""
        return image_size.resized_width * image_size.resized_height // self._factor**2

    def encode_pictures(self, pictures: Sequence[Image.Image], grids: Sequence[Grid]) -> Sequence[Tensor]:
        """See `Processor`: of each picture [N, channels * patch height * patch width]."""
        as_bytes: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}
        found = self.image_processor(images=list(pictures), return_tensors="pt", **as_bytes)
        pixels: Tensor = found["pixel_values"]
        patches: Sequence[Tensor] = pixels.to(torch.uint8).split([prod(grid) for grid in grids])
        return patches

    def spread(self, values: Tensor, pixels: Tensor) -> Tensor:
        """See `Processor`: [N, channels * times * height * width], for a picture stands still."""
        times = self.image_processor.temporal_patch_size
        return values[:, :, None].expand(-1, -1, times, -1).flatten(1)

    def picture(self, pixels: Tensor, grid: Grid) -> Image.Image:
        """See `Processor`."""
        size, side = self.image_processor.merge_size, self.image_processor.patch_size
        channels, (_, rows, columns) = len(self.image_processor.image_mean), grid
        patches = self.to_bytes(pixels.view(len(pixels), channels, -1, side * side)[:, :, 0])
        blocks = patches.view(rows // size, columns // size, size, size, channels, side, side)
        image = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, channels)
        return Image.fromarray(image.numpy())

    def positions(self, input_ids: list[int], grids: Sequence[Grid]) -> Tensor:
        """See `Processor`."""
        size = self.image_processor.merge_size
        merged = [(times, rows // size, columns // size) for times, rows, columns in grids]
        return rotary_positions(input_ids, merged, self.image_token_id)

    @property
    def _factor(self) -> int:
        """Pixels of a token's side."""
        return int(self.image_processor.patch_size * self.image_processor.merge_size)


class QwenVL(Family):
    """A family of Qwen-VL.

    Attributes:
        patch_size: Side of a patch of its own image processor, in pixels.
    """

    processor = QwenVLProcessor
    patch_size: ClassVar[int] = 14

    def prepare(self, model: VisionLanguageModel) -> None:
        """See `Family`."""
        super().prepare(model)
        simplify_tower(model)

    def encode_images(self, model: VisionLanguageModel, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """See `Family`."""
        return encode_images(model, prompts)

    def vision_modules(self, model: VisionLanguageModel) -> list[nn.Module]:
        """See `Family`."""
        return [model.model.visual]

    def vision_blocks(self, model: VisionLanguageModel) -> list[nn.Module]:
        """See `Family`."""
        return list(model.model.visual.blocks)

    def position_ids(self, positions: Tensor) -> Tensor:
        """See `Family`."""
        return positions

    @abstractmethod
    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Any:
        """A configuration of any size, to pretrain or to test with; see `embedded/model.py`.

        Args:
            text: Settings of the language model that all families share; what this one has besides is added.
            vision: Those of the vision tower, with `hidden_size` and `out_hidden_size`.
            **common: Those of the whole model.
        """


def rotary_positions(input_ids: list[int], grids: Sequence[Grid], image_token_id: int) -> Tensor:
    """Positions in time, height and width of a prompt's tokens, as these families count them.

    A text token goes on by one in all three. The tokens of an image are counted in each direction from where the image
    begins, and the text behind it goes on behind its longer side.

    Args:
        input_ids: P token ids.
        grids: Tokens of each image in time, height and width.
        image_token_id: Which ids stand for image features.

    Returns:
        [3, P].

    >>> rotary_positions([7, 9, 9, 7], [(1, 1, 2)], image_token_id=9).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    blocks, position, index = [], 0, 0
    for grid in grids:
        start = input_ids.index(image_token_id, index)
        blocks.append(torch.arange(start - index).expand(3, -1) + position)
        position += start - index
        blocks.append(torch.cartesian_prod(*map(torch.arange, grid)).T + position)
        position += max(grid[1:])
        index = start + prod(grid)
    blocks.append(torch.arange(len(input_ids) - index).expand(3, -1) + position)
    return torch.cat(blocks, 1)
