"""Chat messages and pictures to PromptBatch, token ids to text: tokenizer and image processor of a model folder.

The hub's own processor classes want a video processor, which wants torchvision; pictures need neither.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from perception_r1.errors import UserError
from perception_r1.policy.batch import Grid, PromptBatch, to_device
from perception_r1.records import ImageSize

IMAGE_TOKEN = "<|image_pad|>"
_PLACEHOLDERS = (IMAGE_TOKEN, "<|video_pad|>")
"""Tokens in whose place features are put."""
MAX_ASPECT = 200
"""Longest side of a picture over its shortest: what smart-resize of these families takes."""


class Processor:
    """Text and pictures in, tensors out, and back to text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil) -> None:
        if tokenizer.chat_template is None:
            raise UserError("The tokenizer has no chat template; use the folder of an instruction-tuned model.")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            raise UserError(f"The tokenizer does not know {IMAGE_TOKEN}; use the tokenizer files of a Qwen-VL model.")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._levels = _levels(image_processor)
        self._texts: dict[int, str] = {}
        self.image_token_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @classmethod
    def load(cls, name: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "Processor":
        """Read tokenizer and image processor from a hub id or a folder; a bound of None is the model's own.

        Raises:
            UserError: Files are missing, a bound is not positive, or `min_pixels` exceeds `max_pixels`.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"Tokenizer and image processor of {name} cannot be loaded: {error}") from error
        low = image_processor.size["shortest_edge"] if min_pixels is None else min_pixels
        high = image_processor.size["longest_edge"] if max_pixels is None else max_pixels
        if low < 1:
            raise UserError(f"min_pixels is {low}; it must be 1 or more.")
        if low > high:
            raise UserError(f"min_pixels ({low}) must not exceed max_pixels ({high}).")
        image_processor.size = {"shortest_edge": low, "longest_edge": high}
        return cls(tokenizer, image_processor)

    def save(self, folder: Path) -> None:
        """Write the files of tokenizer and image processor in the hub's layout."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def encode(
        self, chats: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Image.Image]], *, max_tokens: int | None
    ) -> PromptBatch:
        """Prompts ready for an answer; a prompt is never cut.

        It is `encode_bytes` and `normalize` in one; for the arguments see there.
        """
        return self.normalize(self.encode_bytes(chats, images, max_tokens=max_tokens))

    def encode_bytes(
        self, chats: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Image.Image]], *, max_tokens: int | None
    ) -> PromptBatch:
        """Prompts with their pixels as they are in a picture, an eighth of the memory of what the model takes.

        Args:
            chats: Messages of each prompt.
            images: RGB pictures of each prompt, at least one, in the order in which its messages name them.
            max_tokens: Longest prompt that is accepted.

        Raises:
            UserError: A prompt is too long, names another number of pictures, or has one that is too narrow.

        Returns:
            A batch whose `pixel_values` are bytes: I entries [N, channels * patch height * patch width].
        """
        pictures = [image for group in images for image in group]
        for image in pictures:
            check_aspect(*image.size)
        as_bytes: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}
        pixels = self.image_processor(images=pictures, return_tensors="pt", **as_bytes)
        grids: list[Grid] = [tuple(grid) for grid in pixels["image_grid_thw"].tolist()]
        size = self.image_processor.merge_size
        merged = iter([(times, rows // size, columns // size) for times, rows, columns in grids])  # in tokens
        merged_of = [[next(merged) for _ in group] for group in images]
        texts = self.tokenizer.apply_chat_template(list(chats), tokenize=False, add_generation_prompt=True)
        expanded = [_expand(text, list(map(prod, own))) for text, own in zip(texts, merged_of, strict=True)]
        rows: list[list[int]] = self.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        if max_tokens is not None:
            _check_length(max(map(len, rows)), max_tokens)
        positions = [rotary_positions(row, own, self.image_token_id) for row, own in zip(rows, merged_of, strict=True)]
        return PromptBatch(
            input_ids=tuple(torch.tensor(row) for row in rows),
            position_ids=tuple(positions),
            next_positions=tuple(int(position.max()) + 1 for position in positions),
            chats=tuple(chats),
            num_images=tuple(len(group) for group in images),
            image_sizes=tuple(self.image_size(*group[0].size) for group in images),
            image_grids=tuple(grids),
            pixel_values=pixels["pixel_values"].to(torch.uint8).split([prod(grid) for grid in grids]),
        )

    def normalize(self, prompts: PromptBatch) -> PromptBatch:
        """The same prompts with pixels of `encode_bytes` as the model takes them, on the device where they are.

        The values are those of the image processor, bit by bit, for they are looked up in what it makes of all bytes.
        """
        pixels = torch.cat(prompts.pixel_values)
        levels, times = to_device(self._levels, pixels.device), self.image_processor.temporal_patch_size
        channels = pixels.view(len(pixels), len(levels), -1).unbind(1)
        values = torch.stack([level[part.long()] for level, part in zip(levels, channels, strict=True)], 1)
        values = values[:, :, None].expand(-1, -1, times, -1).flatten(1)  # [N, channels * times * height * width]
        return replace(prompts, pixel_values=values.split([len(image) for image in prompts.pixel_values]))

    def pictures(self, prompts: PromptBatch) -> list[list[Image.Image]]:
        """The pictures of each prompt as the model sees them, at their resized sizes: `normalize` undone.

        An image processor with the same bounds leaves such a picture as it is, so others see the same pixels too.
        """
        pictures = (self._picture(*each) for each in zip(prompts.pixel_values, prompts.image_grids, strict=True))
        return [list(islice(pictures, count)) for count in prompts.num_images]

    def _picture(self, patches: Tensor, grid: Grid) -> Image.Image:
        """A picture from its patches [N, channels * times * height * width]."""
        size, side = self.image_processor.merge_size, self.image_processor.patch_size
        channels, (_, rows, columns) = len(self._levels), grid
        darkest, brightest = self._levels[:, :1], self._levels[:, -1:]
        values = patches.cpu().view(len(patches), channels, -1, side * side)[:, :, 0]  # [N, channels, side * side]
        pixels = ((values - darkest) / (brightest - darkest) * 255).round().to(torch.uint8)
        blocks = pixels.view(rows // size, columns // size, size, size, channels, side, side)
        pixels = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, channels)
        return Image.fromarray(pixels.numpy())

    def without_repeats(self, input_ids: Tensor) -> list[int]:
        """Token ids of a prompt with one placeholder for each picture, from [P] with one for each of its features."""
        is_picture = input_ids == self.image_token_id
        is_repeat = is_picture & F.pad(is_picture, (1, 0))[:-1]
        ids: list[int] = input_ids[~is_repeat].tolist()
        return ids

    def image_size(self, width: int, height: int) -> ImageSize:
        """Sizes of a picture of this size, without the picture itself; raises as `check_aspect` does."""
        check_aspect(width, height)
        resized_height, resized_width = smart_resize(
            height,
            width,
            factor=self.image_processor.patch_size * self.image_processor.merge_size,
            min_pixels=self.image_processor.size["shortest_edge"],
            max_pixels=self.image_processor.size["longest_edge"],
        )
        return ImageSize(width=width, height=height, resized_width=resized_width, resized_height=resized_height)

    def num_prompt_tokens(self, chat: list[dict[str, Any]], image_size: ImageSize) -> int:
        """Tokens of a prompt with one picture, without the picture itself."""
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        patches = image_size.resized_width * image_size.resized_height // self.image_processor.patch_size**2
        expanded = _expand(cast(str, text), [patches // self.image_processor.merge_size**2])
        return len(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])

    def check_prompt(self, chat: list[dict[str, Any]], *, width: int, height: int, max_tokens: int | None) -> None:
        """Refuse a prompt with one picture of this size as `encode` would, without the picture itself."""
        image_size = self.image_size(width, height)
        texts = [str(part.get("text", "")) for message in chat for part in message["content"]]
        for token in (token for token in _PLACEHOLDERS if any(token in text for text in texts)):
            raise UserError(f"A prompt has {token} in its text, which stands for what the model sees; leave it out.")
        if max_tokens is not None:
            _check_length(self.num_prompt_tokens(chat, image_size), max_tokens)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_targets(self, texts: Sequence[str], eos_token_id: int) -> list[Tensor]:
        """Token ids of answers, each closed by the end token: what SFT teaches."""
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [torch.tensor([*row, eos_token_id]) for row in rows]

    def token_ends(self, completion: Tensor) -> list[int]:
        """Where each token of a completion ends in its text, in characters.

        Where several tokens make one character it belongs to the last of them.
        """
        ends, text = [], ""
        for number, token in enumerate(completion.tolist(), 1):
            if token not in self._texts:
                self._texts[token] = self.decode([torch.tensor([token])])[0]
            text += self._texts[token]
            if "\ufffd" in self._texts[token]:  # a part of a character
                text = self.decode([completion[:number]])[0].rstrip("\ufffd")
            ends.append(len(text))
        return ends

    def decode(self, completions: Sequence[Tensor], *, has_special_tokens: bool = True) -> list[str]:
        """Text of completions; special tokens stay as a rule, for boxes are written with them."""
        rows = [completion.tolist() for completion in completions]
        options = {"skip_special_tokens": not has_special_tokens, "clean_up_tokenization_spaces": False}
        return self.tokenizer.batch_decode(rows, **options)


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


def check_aspect(width: int, height: int) -> None:
    """Refuse, with a `UserError`, a picture that is too narrow for smart-resize."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"A picture has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other."
        )


def _levels(image_processor: Qwen2VLImageProcessorPil) -> Tensor:
    """[channels, 256] what an image processor makes of every byte of every channel."""
    levels = np.tile(np.arange(256, dtype=np.uint8), (len(image_processor.image_mean), 1, 1))
    if image_processor.do_rescale:
        levels = image_processor.rescale(levels, image_processor.rescale_factor)
    if image_processor.do_normalize:
        levels = image_processor.normalize(levels, image_processor.image_mean, image_processor.image_std)
    return torch.from_numpy(levels[:, 0]).float()


def _check_length(num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise UserError(
            f"A prompt has {num_tokens} tokens but max_prompt_length is {max_tokens}; raise it or lower max_pixels."
        )


def _expand(text: str, num_tokens: list[int]) -> str:
    """The prompt's text with each picture's placeholder repeated once per feature of the picture."""
    parts = text.split(IMAGE_TOKEN)
    if len(parts) != len(num_tokens) + 1:
        raise UserError(
            f"A prompt names {len(parts) - 1} pictures but has {len(num_tokens)}; "
            f"does its text contain {IMAGE_TOKEN}, or does the chat template ignore pictures?"
        )
    return parts[0] + "".join(IMAGE_TOKEN * n + part for n, part in zip(num_tokens, parts[1:], strict=True))
