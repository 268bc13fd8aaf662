"""Pictures in square tiles of a fixed size, each of which makes a fixed number of tokens."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perception_r1.policy.batch import Grid
from perception_r1.policy.processor import Processor
from perception_r1.records import ImageSize


class TileProcessor(Processor):
    """Pictures lose their shape: they are stretched over a canvas of tiles; here one.

    Attributes:
        call_options: With which the image processor is called, whatever its files say.

    Args:
        tokenizer: Of the model.
        image_processor: Of transformers.
        num_patches: In a tile's height, and in its width.
        tokens_per_tile: Features of a tile.
    """

    call_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_processor: Any, *, num_patches: int, tokens_per_tile: int
    ) -> None:
        super().__init__(tokenizer, image_processor)
        self.tile_size: int = image_processor.size["height"]
        self._num_patches, self._tokens_per_tile = num_patches, tokens_per_tile

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of the tiles over which a picture of this size is stretched."""
        return 1, 1

    def image_size(self, width: int, height: int) -> ImageSize:
        """See `Processor`."""
        columns, rows = (count * self.tile_size for count in self.canvas(width, height))
        return ImageSize(width=width, height=height, resized_width=columns, resized_height=rows)

    @property
    def largest_image_size(self) -> ImageSize:
        """See `Processor`."""
        return self.image_size(self.tile_size, self.tile_size)

    def num_tiles(self, image_size: ImageSize) -> int:
        """Tiles of a picture of these sizes."""
        return image_size.resized_width * image_size.resized_height // self.tile_size**2

    def grid(self, image_size: ImageSize) -> Grid:
        """See `Processor`: tiles, and the patches of each in height and width."""
        return self.num_tiles(image_size), self._num_patches, self._num_patches

    def pixel_shape(self, grid: Grid) -> tuple[int, ...]:
        """See `Processor`."""
        return grid[0], len(self.image_processor.image_mean), self.tile_size, self.tile_size

    def num_image_tokens(self, image_size: ImageSize) -> int:
        """See `Processor`."""
        return self.num_tiles(image_size) * self._tokens_per_tile

    def encode_pictures(self, pictures: Sequence[Image.Image], grids: Sequence[Grid]) -> Sequence[Tensor]:
        """See `Processor`: of each picture [tiles, channels, height, width]."""
        as_bytes = {"do_rescale": False, "do_normalize": False, **self.call_options}
        found = self.image_processor(images=list(pictures), return_tensors="pt", **as_bytes)
        tiles: Tensor = found["pixel_values"]
        return list(tiles.to(torch.uint8).split([grid[0] for grid in grids]))

    def picture(self, pixels: Tensor, grid: Grid) -> Image.Image:
        """See `Processor`: the only tile."""
        (tile,) = self.to_bytes(pixels)
        return Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
