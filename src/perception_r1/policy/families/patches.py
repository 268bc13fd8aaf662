"""Pictures of any shape in patches, whose tokens have positions in time, height and width.

Legend: P tokens of a prompt, N patches.
"""

from collections.abc import Callable, Sequence
from math import isqrt, prod
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from perception_r1.errors import UserError
from perception_r1.policy.batch import Grid, PromptBatch
from perception_r1.policy.families.base import Family, VisionLanguageModel
from perception_r1.policy.families.patch_tower import encode_images, simplify_tower
from perception_r1.policy.processor import Processor
from perception_r1.records import ImageSize


class PatchProcessor(Processor):
    """Pictures keep about their shape; `merge_size` patches in height and in width make a token.

    Attributes:
        smart_resize: Height and width of a picture as the model sees it, from its own by `height`, `width`, `factor`,
            `min_pixels` and `max_pixels`.
        counts_frames: Whether the image processor's bounds are of all the frames that a picture stands for.
        max_aspect: Longest side of a picture over its shortest.
        max_pixels: Largest picture by the files of the larger models.
    """

    smart_resize: ClassVar[Callable[..., tuple[int, int]]]
    counts_frames: ClassVar[bool] = False
    max_aspect: ClassVar[int] = 200
    max_pixels: ClassVar[int] = 12_845_056

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
        processor.set_bounds(processor._factor**2, cls.max_pixels)
        return processor

    def set_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """See `Processor`."""
        low, high = self.pixel_bounds
        low, high = low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels
        if low > high:
            raise UserError(f"min_pixels ({low}) must not exceed max_pixels ({high}).")
        self.image_processor.size = {"shortest_edge": low * self._frames, "longest_edge": high * self._frames}

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """See `Processor`."""
        size = self.image_processor.size
        low, high = size["shortest_edge"], size["longest_edge"]
        return (low // self._frames, high // self._frames) if self.counts_frames else (low, high)

    @property
    def size(self) -> dict[str, int]:
        """Bounds of a picture as image processors name them."""
        return dict(zip(("shortest_edge", "longest_edge"), self.pixel_bounds, strict=True))

    def image_size(self, width: int, height: int) -> ImageSize:
        """See `Processor`."""
        if max(width, height) > self.max_aspect * min(width, height):
            raise UserError(
                f"A picture has {width} x {height} pixels; one side may be at most {self.max_aspect} times the other."
            )
        low, high = self.pixel_bounds
        bounds = {"min_pixels": low, "max_pixels": high}
        rows, columns = self.smart_resize(height=height, width=width, factor=self._factor, **bounds)
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
        as_bytes["size"] = self.size
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
    def _frames(self) -> int:
        """Frames whose pixels the image processor's bounds count."""
        return int(self.image_processor.temporal_patch_size) if self.counts_frames else 1

    @property
    def _factor(self) -> int:
        """Pixels of a token's side."""
        return int(self.image_processor.patch_size * self.image_processor.merge_size)


class PatchFamily(Family):
    """A family whose tower is `model.visual`, and whose language model turns heads by three positions."""

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
