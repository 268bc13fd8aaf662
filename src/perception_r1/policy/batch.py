"""PromptBatch: prompts with their pictures as tensors, able to slice, repeat and move itself.

Legend: B prompts, P prompt tokens (longest), I images of all prompts, N patches of all images, D values per patch, H
hidden size of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perception_r1.records import ImageSize


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Left-padded prompts; images in the order of the prompts, each of its own size.

    Attributes:
        input_ids: [B, P] token ids, padded on the left.
        attention_mask: [B, P] 1 for tokens, 0 for padding.
        mm_token_type_ids: [B, P] 1 where an image feature stands, 0 elsewhere.
        pixel_values: [N, D] patches of all images, one after another.
        image_grid_thw: [I, 3] patches of each image in time, height and width.
        num_images: Images of each prompt, B entries.
        image_sizes: Sizes of the first image of each prompt, B entries.
        features: Of each image, I entries [1 + L, tokens, H]: what stands in its place, then what (Qwen3-VL) is added
            after each of the first L layers; None until the vision tower has looked at the images.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    num_images: tuple[int, ...]
    image_sizes: tuple[ImageSize, ...]
    image_features: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.num_images)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return self.attention_mask.sum(1).tolist()

    def select(self, indices: Sequence[int]) -> "PromptBatch":
        """The prompts at these places, in this order, without padding that none of them needs."""
        width = int(self.attention_mask[list(indices)].sum(1).max())
        images = self._images_by_prompt()
        patches = self.image_grid_thw.prod(1).tolist()
        starts = [0, *torch.tensor(patches).cumsum(0).tolist()]
        chosen = [image for index in indices for image in images[index]]
        rows = torch.as_tensor(list(indices), device=self.input_ids.device)
        return PromptBatch(
            input_ids=self.input_ids[rows, -width:],
            attention_mask=self.attention_mask[rows, -width:],
            mm_token_type_ids=self.mm_token_type_ids[rows, -width:],
            pixel_values=torch.cat([self.pixel_values[starts[i] : starts[i + 1]] for i in chosen]),
            image_grid_thw=self.image_grid_thw[chosen],
            num_images=tuple(self.num_images[index] for index in indices),
            image_sizes=tuple(self.image_sizes[index] for index in indices),
            image_features=None if self.image_features is None else tuple(self.image_features[i] for i in chosen),
        )

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            mm_token_type_ids=self.mm_token_type_ids.to(device),
            pixel_values=self.pixel_values.to(device),
            image_grid_thw=self.image_grid_thw.to(device),
            image_features=None
            if self.image_features is None
            else tuple(image.to(device) for image in self.image_features),
        )

    def _images_by_prompt(self) -> list[range]:
        ends = torch.tensor(self.num_images).cumsum(0).tolist()
        return [range(end - count, end) for end, count in zip(ends, self.num_images, strict=True)]
