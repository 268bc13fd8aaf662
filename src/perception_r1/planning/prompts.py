"""The longest prompts that a run may meet, without data: their number of tokens and their largest picture.

Legend: P tokens of a prompt.
"""

from dataclasses import dataclass
from math import isqrt, prod

import torch

from perception_r1.data.base import BaseDataModule
from perception_r1.data.categories import COCO_NAMES
from perception_r1.data.mixed import parts_of
from perception_r1.planning.policy import ShapePolicy
from perception_r1.policy.batch import Grid, PromptBatch
from perception_r1.policy.processor import Processor

_CHARACTERS = 3
"""Characters of a text per token; English takes four to five with the tokenizers of these models."""
_CHAT_TOKENS = 32
"""Tokens of a chat around picture and text: system prompt, roles, ends."""
_QUERY = "the second cup from the left on the table in front of the window"
"""As long as the phrases of a data set are that is not at hand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongestPrompt:
    """A prompt with one picture.

    Attributes:
        num_text_tokens: All but those of the picture.
        grid: Patches of the picture in time (or tiles), height and width.
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
        image = policy.model.config.image_token_id
        ids = [0] * (self.num_text_tokens // 2) + [image] * self.num_image_tokens
        ids += [0] * (self.num_tokens - len(ids))
        positions = policy.processor.positions(ids, [self.grid])
        image_size = policy.processor.largest_image_size  # of no account
        shape = policy.processor.pixel_shape(self.grid)
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


def longest_prompt(processor: Processor, data: BaseDataModule, *, is_synthetic: bool) -> LongestPrompt:
    """The longest prompt of a run.

    Args:
        processor: That of the model, with the bounds of the policy's pictures.
        data: What has the tasks, and where scenes are synthetic these.
        is_synthetic: The data are scenes, which have a size of their own.
    """
    image_size = processor.image_size(*_scene_size(data)) if is_synthetic else processor.largest_image_size
    grid = processor.grid(image_size)
    tasks = [part.task if is_synthetic else part.task_without_labels for part in parts_of(data).values()]
    texts = [task.with_labels(COCO_NAMES).prompt(_QUERY) for task in tasks]
    return LongestPrompt(
        num_text_tokens=_CHAT_TOKENS + -(-max(map(len, texts)) // _CHARACTERS),
        grid=grid,
        merge_size=isqrt(prod(grid) // processor.num_image_tokens(image_size)),
    )


def _scene_size(data: BaseDataModule) -> tuple[int, int]:
    """Width and height of the largest of the first scenes of all tasks."""
    data.setup("fit")
    samples = [part.samples("train")[0] for part in parts_of(data).values()]
    return max(((sample.width, sample.height) for sample in samples), key=prod)
