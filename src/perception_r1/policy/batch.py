"""PromptBatch: prompts with their pictures as tensors, able to slice and move itself.

Everything that lays out a pass (token ids, positions, sizes) is computed once, when a prompt is encoded, and stays on
the host; only pixels and features go to the policy's device. So nobody has to wait for the device to tell a length.

Legend: B prompts, P tokens of a prompt, I images of all prompts, N patches of an image, D values per patch, H hidden
size of the language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perception_r1.records import ImageSize

Grid: TypeAlias = tuple[int, int, int]
"""Patches of an image in time (of those in tiles: tiles), height and width."""
Chat: TypeAlias = list[dict[str, Any]]
"""Messages as the chat templates of transformers take them."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts, each of its own length; images in the order of the prompts, each of its own size.

    Attributes:
        input_ids: Token ids of each prompt, B entries [P] on the CPU.
        position_ids: Rotary positions in time, height and width of each prompt, B entries [3, P] on the CPU.
        next_positions: Position of the first completion token of each prompt, B entries.
        chats: Messages of each prompt, B entries.
        num_images: Images of each prompt, B entries.
        image_sizes: Sizes of the first image of each prompt, B entries.
        image_grids: Patches of each image, I entries.
        pixel_values: Patches of each image, I entries [N, D], or tiles [tiles, channels, height, width]; bytes until
            `Processor.normalize`.
        image_features: Of each image, I entries [1 + L, tokens, H]: what stands in its place, then what (Qwen3-VL) is
            added after each of the first L layers; None until the vision tower has run.
        pictures: What the pixels were made of, I entries, where `Processor.keeps_pictures`; None elsewhere.
    """

    input_ids: tuple[Tensor, ...]
    position_ids: tuple[Tensor, ...]
    next_positions: tuple[int, ...]
    chats: tuple[Chat, ...]
    num_images: tuple[int, ...]
    image_sizes: tuple[ImageSize, ...]
    image_grids: tuple[Grid, ...]
    pixel_values: tuple[Tensor, ...]
    image_features: tuple[Tensor, ...] | None = None
    pictures: tuple[Image.Image, ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in self.input_ids]

    @property
    def num_patches(self) -> list[int]:
        """Patches of the images of each prompt."""
        ends = list(accumulate(self.num_images))
        patches = [prod(grid) for grid in self.image_grids]
        return [sum(patches[end - count : end]) for end, count in zip(ends, self.num_images, strict=True)]

    def select(self, indices: Sequence[int]) -> "PromptBatch":
        """The prompts with these numbers, in this order; nothing is copied."""
        ends = list(accumulate(self.num_images))
        images = [image for index in indices for image in range(ends[index] - self.num_images[index], ends[index])]
        return PromptBatch(
            input_ids=_pick(self.input_ids, indices),
            position_ids=_pick(self.position_ids, indices),
            next_positions=_pick(self.next_positions, indices),
            chats=_pick(self.chats, indices),
            num_images=_pick(self.num_images, indices),
            image_sizes=_pick(self.image_sizes, indices),
            image_grids=_pick(self.image_grids, images),
            pixel_values=_pick(self.pixel_values, images),
            image_features=None if self.image_features is None else _pick(self.image_features, images),
            pictures=None if self.pictures is None else _pick(self.pictures, images),
        )

    @staticmethod
    def concat(parts: "Sequence[PromptBatch]") -> "PromptBatch":
        """Several batches as one, all with image features or all without, as with pictures; nothing is copied."""
        names = [field.name for field in fields(PromptBatch) if getattr(parts[0], field.name) is not None]
        return PromptBatch(**{name: tuple(value for part in parts for value in getattr(part, name)) for name in names})

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same batch with pixels and features on another device."""
        features = self.image_features
        return replace(
            self,
            pixel_values=tuple(to_device(pixels, device) for pixels in self.pixel_values),
            image_features=None if features is None else tuple(to_device(image, device) for image in features),
        )

    def pin_memory(self) -> "PromptBatch":
        """The same batch with pixels in page-locked memory, so that `to` need not wait."""
        return replace(self, pixel_values=tuple(pixels.pin_memory() for pixels in self.pixel_values))

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as arrays, through a pipe.

        Tensors would take shared memory, of which a container has little, and a file descriptor each.
        """
        return _from_arrays, (
            {field.name: _convert(getattr(self, field.name), Tensor.numpy) for field in fields(self)},
        )


def argsort_by_length(lengths: Sequence[int]) -> list[int]:
    """Prompts in order of length: equal ones come together, and the attention then takes them together."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, without waiting for the work that is queued there."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # the copy from ordinary memory would wait
    return tensor.to(device, non_blocking=True)


def move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of integers on a device, in a single copy."""
    if device.type == "cpu":
        return list(tensors)
    flat = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _from_arrays(values: dict[str, Any]) -> PromptBatch:
    return PromptBatch(**{name: _convert(value, torch.from_numpy) for name, value in values.items()})


def _convert(values: Any, convert: Callable[[Any], Any]) -> Any:
    """The values of a field, those that are arrays or tensors converted."""
    if values is None:
        return None
    return tuple(convert(value) if isinstance(value, Tensor | np.ndarray) else value for value in values)


def _pick(values: Sequence[T], indices: Sequence[int]) -> tuple[T, ...]:
    return tuple(values[index] for index in indices)
