"""The longest prompts that a run may meet, without data: their number of tokens and their largest picture.

Legend: B prompts, P tokens of a prompt, N patches of its picture, D values per patch.
"""

from dataclasses import dataclass
from math import isqrt, prod

import torch
from transformers import PretrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from perception_r1.data.base import BaseDataModule
from perception_r1.data.categories import COCO_NAMES
from perception_r1.data.mixed import parts_of
from perception_r1.planning.policy import ShapePolicy
from perception_r1.policy.batch import Grid, PromptBatch
from perception_r1.policy.processor import rotary_positions
from perception_r1.records import ImageSize

_CHARACTERS = 3
"""Characters of a text per token; English takes four to five with the tokenizers of these models."""
_CHAT_TOKENS = 32
"""Tokens of a chat around picture and text: system prompt, roles, ends."""
_QUERY = "the second cup from the left on the table in front of the window"
"""As long as the phrases of a data set are that is not at hand."""
_MAX_PIXELS = 12_845_056
"""Largest picture where `max_pixels` is not set: the bound of these families."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongestPrompt:
    """A prompt with one picture.

    Attributes:
        num_text_tokens: All but those of the picture.
        grid: Patches of the picture in time, height and width.
        merge_size: Patches per token in height and in width.
    """

    num_text_tokens: int
    grid: Grid
    merge_size: int

    @property
    def num_tokens(self) -> int:
        """P."""
        return self.num_text_tokens + self.num_image_tokens

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the picture."""
        return prod(self.grid) // self.merge_size**2

    def batch(self, policy: ShapePolicy, count: int) -> PromptBatch:
        """The prompt `count` times, its pixels on the policy's device."""
        config = policy.model.config
        vision, image = config.vision_config, config.image_token_id
        times, rows, columns = self.grid
        merged: Grid = times, rows // self.merge_size, columns // self.merge_size
        ids = [0] * (self.num_text_tokens // 2) + [image] * prod(merged)
        ids += [0] * (self.num_tokens - len(ids))
        positions = rotary_positions(ids, [merged], image)
        width, height = columns * vision.patch_size, rows * vision.patch_size
        image_size = ImageSize(width=width, height=height, resized_width=width, resized_height=height)
        shape = prod(self.grid), vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return PromptBatch(
            input_ids=(torch.tensor(ids),) * count,
            position_ids=(positions,) * count,
            next_positions=(int(positions.max()) + 1,) * count,
            chats=([],) * count,
            num_images=(1,) * count,
            image_sizes=(image_size,) * count,
            image_grids=(self.grid,) * count,
            pixel_values=tuple(torch.empty(shape, device=policy.device) for _ in range(count)),
        )


def longest_prompt(
    config: PretrainedConfig, data: BaseDataModule, *, max_pixels: int | None, is_synthetic: bool
) -> LongestPrompt:
    """The longest prompt of a run.

    Args:
        config: That of the model.
        data: What has the tasks, and where scenes are synthetic these.
        max_pixels: Bound of the policy's pictures; None: that of the model's family.
        is_synthetic: The data are scenes, which have a size of their own.
    """
    vision = config.vision_config
    factor = vision.patch_size * vision.spatial_merge_size
    max_pixels = max_pixels or _MAX_PIXELS
    if is_synthetic:
        width, height = _scene_size(data)
        sides = smart_resize(height, width, factor=factor, min_pixels=factor**2, max_pixels=max_pixels)
        rows, columns = (side // factor for side in sides)
    else:  # the largest of about that many pixels
        rows = isqrt(max_pixels // factor**2)
        columns = max_pixels // factor**2 // rows
    tasks = [part.task if is_synthetic else part.task_without_labels for part in parts_of(data).values()]
    texts = [task.with_labels(COCO_NAMES).prompt(_QUERY) for task in tasks]
    return LongestPrompt(
        num_text_tokens=_CHAT_TOKENS + -(-max(map(len, texts)) // _CHARACTERS),
        grid=(1, rows * vision.spatial_merge_size, columns * vision.spatial_merge_size),
        merge_size=vision.spatial_merge_size,
    )


def _scene_size(data: BaseDataModule) -> tuple[int, int]:
    """Width and height of the largest of the first scenes of all tasks."""
    data.setup("fit")
    samples = [part.samples("train")[0] for part in parts_of(data).values()]
    return max(((sample.width, sample.height) for sample in samples), key=prod)
