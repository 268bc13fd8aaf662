"""Chat messages and pictures to PromptBatch, token ids to text: tokenizer and image processor of a model folder.

What differs between families (placeholders, sizes, patches or tiles, positions) is in `families/`. The hub's own
processor classes want a video processor, which wants torchvision; pictures need neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from perception_r1.errors import UserError, reading
from perception_r1.policy.batch import Grid, PromptBatch, to_device
from perception_r1.records import ImageSize


class Processor(ABC):
    """Text and pictures in, tensors out, and back to text; each family has its own.

    Attributes:
        image_token: Stands for a picture in the text that the chat template writes.
        feature_token: Stands for a single feature of a picture in a prompt.
        other_placeholders: Tokens in whose place the model sees something else, as a video.
        end_of_turn: Closes the model's turn, where the tokenizer's own end token is another.
        image_processor_class: That of transformers, without torchvision.
        restores_pictures: Whether what the model sees of a picture can be made a picture again, of which an image
            processor makes the same.
        keeps_pictures: Let prompts have the pictures themselves too, for another program that is to see them; set by a
            generation engine.
    """

    image_token: ClassVar[str]
    feature_token: ClassVar[str]
    other_placeholders: ClassVar[tuple[str, ...]] = ()
    end_of_turn: ClassVar[str | None] = None
    image_processor_class: ClassVar[Any]
    restores_pictures: ClassVar[bool] = True
    keeps_pictures: bool = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> None:
        if tokenizer.chat_template is None:
            raise UserError("The tokenizer has no chat template; use the folder of an instruction-tuned model.")
        if self.feature_token not in tokenizer.get_vocab():
            raise UserError(
                f"The tokenizer does not know {self.feature_token}; use the tokenizer files that belong to the model."
            )
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._levels = _levels(image_processor)
        self._texts: dict[int, str] = {}
        can_think = "enable_thinking" in str(tokenizer.chat_template)
        self.template_options: dict[str, bool] = {"enable_thinking": False} if can_think else {}
        """For a chat template that knows thinking: tasks read an answer as a whole, so there is none before it."""
        self.image_token_id = cast(int, tokenizer.convert_tokens_to_ids(self.feature_token))

    @classmethod
    def load(cls, name: str | Path, config: Any) -> Self:
        """Read tokenizer and image processor of a hub id or folder with this configuration; see `load_processor`."""
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        image_processor = cls.image_processor_class.from_pretrained(name)
        return cls(tokenizer, image_processor, **cls.read_layout(config))

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: Any) -> Self:
        """That of a model of which there is a configuration alone, with a tokenizer of another: enough for planning."""
        tokenizer.add_tokens([cls.image_token, cls.feature_token])
        processor = cls(tokenizer, cls.image_processor_class(**cls.image_options(config)), **cls.read_layout(config))
        processor.image_token_id = config.image_token_id
        return processor

    @classmethod
    def read_layout(cls, config: Any) -> dict[str, Any]:
        """What the constructor has to know of the model's configuration."""
        return {}

    @classmethod
    @abstractmethod
    def image_options(cls, config: Any) -> dict[str, Any]:
        """Options of the image processor which a model's configuration leaves no choice about."""

    @abstractmethod
    def set_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Bound the pixels of pictures as the model sees them; None keeps a bound.

        Raises:
            UserError: A bound is not known to the family, or `min_pixels` exceeds `max_pixels`.
        """

    @property
    @abstractmethod
    def pixel_bounds(self) -> tuple[int, int]:
        """Fewest and most pixels of a picture as the model sees it."""

    @abstractmethod
    def image_size(self, width: int, height: int) -> ImageSize:
        """Sizes of a picture of this size, without the picture itself.

        Raises:
            UserError: The model cannot take such a picture.
        """

    @property
    @abstractmethod
    def largest_image_size(self) -> ImageSize:
        """Sizes of the picture with the most tokens."""

    @abstractmethod
    def grid(self, image_size: ImageSize) -> Grid:
        """Patches of a picture of these sizes; see `PromptBatch`."""

    @abstractmethod
    def pixel_shape(self, grid: Grid) -> tuple[int, ...]:
        """Of the pixels of a picture with these patches, as the model takes them."""

    @abstractmethod
    def num_image_tokens(self, image_size: ImageSize) -> int:
        """Features of a picture of these sizes, each of which is a token."""

    @abstractmethod
    def encode_pictures(self, pictures: Sequence[Image.Image], grids: Sequence[Grid]) -> Sequence[Tensor]:
        """Pixels of pictures, which have these patches, as bytes; see `PromptBatch`."""

    @abstractmethod
    def picture(self, pixels: Tensor, grid: Grid) -> Image.Image:
        """A picture as the model sees it, from its pixels as `normalize` leaves them."""

    @property
    def hub_options(self) -> dict[str, Any] | None:
        """Options with which the hub's own processor makes the same of a picture, for vLLM; None: not seen to work."""
        return None

    def placeholder(self, num_tokens: int) -> str:
        """What stands for a picture in the text of a prompt."""
        return self.feature_token * num_tokens

    def positions(self, input_ids: list[int], grids: Sequence[Grid]) -> Tensor:
        """[3, P] rotary positions of a prompt, whose pictures have these patches; here one follows another."""
        return torch.arange(len(input_ids)).expand(3, -1)

    def spread(self, values: Tensor, pixels: Tensor) -> Tensor:
        """Values [N, channels, values of a patch or tile] of pixels [N, ...], as the model takes them."""
        return values.view(pixels.shape)

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
            UserError: A prompt is too long, names another number of pictures, or has one that the model cannot take.

        Returns:
            A batch whose `pixel_values` are bytes.
        """
        sizes = [[self.image_size(*image.size) for image in group] for group in images]
        grids_of = [[self.grid(image_size) for image_size in own] for own in sizes]
        grids = [grid for own in grids_of for grid in own]
        pictures = [image for group in images for image in group]
        pixels = self.encode_pictures(pictures, grids)
        expanded = [self._expand(text, own) for text, own in zip(self.prompt_texts(chats), sizes, strict=True)]
        rows: list[list[int]] = self.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        if max_tokens is not None:
            _check_length(max(map(len, rows)), max_tokens)
        positions = [self.positions(row, own) for row, own in zip(rows, grids_of, strict=True)]
        return PromptBatch(
            input_ids=tuple(torch.tensor(row) for row in rows),
            position_ids=tuple(positions),
            next_positions=tuple(int(position.max()) + 1 for position in positions),
            chats=tuple(chats),
            num_images=tuple(len(group) for group in images),
            image_sizes=tuple(group[0] for group in sizes),
            image_grids=tuple(grids),
            pixel_values=tuple(pixels),
            pictures=tuple(pictures) if self.keeps_pictures else None,
        )

    def normalize(self, prompts: PromptBatch) -> PromptBatch:
        """The same prompts with pixels of `encode_bytes` as the model takes them, on the device where they are.

        The values are those of the image processor, bit by bit, for they are looked up in what it makes of all bytes.
        """
        pixels = torch.cat(prompts.pixel_values)
        levels = to_device(self._levels, pixels.device)
        channels = pixels.view(len(pixels), len(levels), -1).unbind(1)
        looked_up = torch.stack([level[part.long()] for level, part in zip(levels, channels, strict=True)], 1)
        values = self.spread(looked_up, pixels)
        return replace(prompts, pixel_values=values.split([len(image) for image in prompts.pixel_values]))

    def pictures(self, prompts: PromptBatch) -> list[list[Image.Image]]:
        """The pictures of each prompt: what it has kept, else what the model sees, which is `normalize` undone.

        The latter have their resized sizes. An image processor with the same bounds leaves such a picture as it is, so
        others see the same pixels too.
        """
        seen = zip(prompts.pixel_values, prompts.image_grids, strict=True)
        pictures = iter(prompts.pictures) if prompts.pictures else (self.picture(*each) for each in seen)
        return [list(islice(pictures, count)) for count in prompts.num_images]

    def to_bytes(self, values: Tensor) -> Tensor:
        """Bytes [N, channels, ...] from the values that `normalize` has made of them, on the CPU."""
        shape = len(self._levels), *[1] * (values.ndim - 2)
        darkest, brightest = self._levels[:, 0].view(shape), self._levels[:, -1].view(shape)
        return ((values.cpu() - darkest) / (brightest - darkest) * 255).round().to(torch.uint8)

    def without_repeats(self, input_ids: Tensor) -> list[int]:
        """Token ids of a prompt with one placeholder for each picture, from [P] with one for each of its features."""
        is_picture = input_ids == self.image_token_id
        is_repeat = is_picture & F.pad(is_picture, (1, 0))[:-1]
        ids: list[int] = input_ids[~is_repeat].tolist()
        return ids

    def prompt_texts(self, chats: Sequence[list[dict[str, Any]]]) -> list[str]:
        """What the chat template makes of chats; it is a program of the model's folder, which may refuse some."""
        options: dict[str, Any] = {"add_generation_prompt": True, **self.template_options}
        with reading("The model's chat template does not take this chat", "use roles and parts that it knows"):
            return cast(list[str], self.tokenizer.apply_chat_template(list(chats), tokenize=False, **options))

    def num_prompt_tokens(self, chat: list[dict[str, Any]], image_size: ImageSize) -> int:
        """Tokens of a prompt with one picture, without the picture itself."""
        expanded = self._expand(self.prompt_texts([chat])[0], [image_size])
        return len(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])

    def check_prompt(self, chat: list[dict[str, Any]], *, width: int, height: int, max_tokens: int | None) -> None:
        """Refuse a prompt with one picture of this size as `encode` would, without the picture itself."""
        image_size = self.image_size(width, height)
        texts = [str(part.get("text", "")) for message in chat for part in message["content"]]
        placeholders = (self.image_token, self.feature_token, *self.other_placeholders)
        for token in (token for token in placeholders if any(token in text for text in texts)):
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

    def _expand(self, text: str, image_sizes: Sequence[ImageSize]) -> str:
        """The prompt's text with all that stands for its pictures."""
        parts = text.split(self.image_token)
        num_features = sum(part.count(self.feature_token) for part in parts)
        if len(parts) != len(image_sizes) + 1 or num_features:
            raise UserError(
                f"A prompt names {len(parts) - 1} pictures but has {len(image_sizes)}; does its text contain "
                f"{self.feature_token}, or does the chat template ignore pictures?"
            )
        pictures = [self.placeholder(self.num_image_tokens(image_size)) for image_size in image_sizes]
        return parts[0] + "".join(picture + part for picture, part in zip(pictures, parts[1:], strict=True))


def _levels(image_processor: Any) -> Tensor:
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
