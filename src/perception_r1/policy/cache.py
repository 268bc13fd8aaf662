"""Keys and values of the rows of a rollout: of their prompts, once per group, and of the tokens that they have written.

`SharedPromptCache` and `ContiguousCache` (a single row per prompt, nothing to share) compute with exactly what has been
written, and finished rows leave them. `StaticCache` has fixed shapes and changes only in place, as a captured CUDA
graph wants, until rows leave it.

Legend: B prompts, S rows of each, P prompt tokens (longest), T tokens that can be written, H heads, K key-value heads,
D head size. Rows are numbered prompt by prompt.
"""

from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_r1.policy.attention import next_token_attention
from perception_r1.policy.batch import to_device
from perception_r1.policy.logits import at_least_fp32
from perception_r1.policy.prompt_cache import PromptCache

KeysAndValues: TypeAlias = tuple[Tensor, Tensor]
PositionEmbeddings: TypeAlias = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, [B, T, D] each: the rows of a prompt stand at the same positions."""


class DecodeCache(ABC):
    """Keys and values of all layers, and the step at which the next token is written."""

    @abstractmethod
    def begin_step(self) -> PositionEmbeddings:
        """Turn to the next token: cosine and sine for it, [B, 1, 1, D] each."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep a layer's keys and values of the next token, and attend to everything up to it.

        Args:
            layer: Number of the layer.
            query: [B, S, H, D], scaled.
            key: [B, S, K, D].
            value: [B, S, K, D].

        Returns:
            [B, S, H*D].
        """

    @abstractmethod
    def end_step(self) -> None:
        """The token has been written: every layer has had its turn."""


class _EagerCache(DecodeCache):
    """What the two caches of the eager path have in common; the position embeddings are of all T tokens."""

    def __init__(self, prompts: PromptCache, position_embeddings: PositionEmbeddings, dtype: torch.dtype) -> None:
        self._position_embeddings = position_embeddings
        self._room = position_embeddings[0].shape[1]
        self._longest = prompts.keys[0].shape[2]
        self._bias = _bias(prompts, self._room, dtype)  # [B, 1, 1, 1, P + T]
        self._step = 0

    def begin_step(self) -> PositionEmbeddings:
        """See `DecodeCache`."""
        cos, sin = self._position_embeddings
        return cos[:, self._step, None, None], sin[:, self._step, None, None]

    def end_step(self) -> None:
        """See `DecodeCache`."""
        self._step += 1

    def _keep_prompts(self, prompts: Tensor) -> None:
        self._position_embeddings = self._position_embeddings[0][prompts], self._position_embeddings[1][prompts]
        self._bias = None if self._bias is None else self._bias[prompts]


class SharedPromptCache(_EagerCache):
    """Prompts once per group; beside them the own tokens of each row."""

    def __init__(
        self, prompts: PromptCache, position_embeddings: PositionEmbeddings, *, num_rows: int, dtype: torch.dtype
    ) -> None:
        super().__init__(prompts, position_embeddings, dtype)
        self._prompts = _cast(prompts, dtype)
        batch, heads, _, size = prompts.keys[0].shape
        shape = (batch, heads, num_rows, self._room, size)
        self._own = [(keys.new_empty(shape), keys.new_empty(shape)) for keys, _ in self._prompts]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `DecodeCache`."""
        keys, values = self._own[layer]  # [B, K, S, T, D]
        keys[:, :, :, self._step] = key.transpose(1, 2)
        values[:, :, :, self._step] = value.transpose(1, 2)
        num_written = self._step + 1
        own = keys[:, :, :, :num_written], values[:, :, :, :num_written]
        bias = None if self._bias is None else self._bias[..., : self._longest + num_written]
        return next_token_attention(query, self._prompts[layer], own, bias)

    def select_rows(self, rows: Tensor) -> None:
        """Let go of all rows but these, given as [B', S'] numbers; those of one line share a prompt."""
        num_rows = self._own[0][0].shape[2]
        prompts, slots = rows[:, 0] // num_rows, rows % num_rows
        self._keep_prompts(prompts)
        self._prompts = [(keys[prompts], values[prompts]) for keys, values in self._prompts]

        def select(own: Tensor) -> Tensor:
            kept = own.new_empty(len(rows), own.shape[1], rows.shape[1], *own.shape[3:])
            kept[:, :, :, : self._step] = _select_slots(own[:, :, :, : self._step], prompts, slots)
            return kept

        self._own = [(select(keys), select(values)) for keys, values in self._own]


class ContiguousCache(_EagerCache):
    """One row per prompt, written behind it into the same buffer."""

    def __init__(self, prompts: PromptCache, position_embeddings: PositionEmbeddings, *, dtype: torch.dtype) -> None:
        super().__init__(prompts, position_embeddings, dtype)
        filling = (0, 0, 0, self._room)
        self._kept = [(F.pad(keys, filling), F.pad(values, filling)) for keys, values in _cast(prompts, dtype)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `DecodeCache`."""
        keys, values = self._kept[layer]  # [B, K, P + T, D]
        index = self._longest + self._step
        keys[:, :, index] = key[:, 0]
        values[:, :, index] = value[:, 0]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys[:, :, : index + 1],
            values[:, :, : index + 1],
            attn_mask=None if self._bias is None else self._bias[:, 0, ..., : index + 1],
            scale=1.0,
            enable_gqa=query.shape[2] != keys.shape[1],
        )
        return attended.transpose(1, 2).flatten(2)

    def select_rows(self, rows: Tensor) -> None:
        """As for `SharedPromptCache`, with S' = 1."""
        prompts = rows[:, 0]
        self._keep_prompts(prompts)
        self._kept = [(keys[prompts], values[prompts]) for keys, values in self._kept]


class StaticCache(DecodeCache):
    """Buffers of fixed shape: attention reads them up to a width, and hides what has not been written.

    Args:
        like: As many prompts of the same model, for shapes.
        prompt_room: Longest prompt that fits.
        num_rows: S.
        num_tokens: T.
        dtype: Of keys and values.
    """

    def __init__(
        self, like: PromptCache, *, prompt_room: int, num_rows: int, num_tokens: int, dtype: torch.dtype
    ) -> None:
        (num_prompts, heads, _, size), hidden = like.keys[0].shape, like.hidden
        shape = (num_prompts, heads, prompt_room, size)
        self._prompts = [(keys.new_zeros(shape, dtype=dtype), keys.new_zeros(shape, dtype=dtype)) for keys in like.keys]
        own_shape = (num_prompts, heads, num_rows, num_tokens, size)  # zeros: what is hidden must still be finite
        self._own = [(keys.new_zeros(own_shape), keys.new_zeros(own_shape)) for keys, _ in self._prompts]
        turns = hidden.new_zeros(2, num_prompts, num_tokens, size, dtype=at_least_fp32(dtype))
        self._position_embeddings = turns[0], turns[1]
        self._prompt_room = prompt_room
        self.bias = hidden.new_zeros(num_prompts, 1, 1, 1, prompt_room + num_tokens, dtype=dtype)
        """[B, 1, 1, 1, P + T] minus infinity for what has not been written."""
        self.width = num_tokens
        """How many written tokens attention reads; never fewer than there are."""
        self.step = hidden.new_zeros(1, dtype=torch.long)
        """[1] tokens written so far."""

    @property
    def num_rows(self) -> int:
        """S."""
        return self._own[0][0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Of all keys and values."""
        pairs = (*self._prompts, *self._own)
        return sum(tensor.nbytes for pair in pairs for tensor in pair)

    def load(self, prompts: PromptCache, position_embeddings: PositionEmbeddings) -> None:
        """Begin anew with other prompts of the same number, none longer than the room for them."""
        longest = prompts.keys[0].shape[2]
        for (keys, values), more_keys, more_values in zip(self._prompts, prompts.keys, prompts.values, strict=True):
            keys[:, :, :longest] = more_keys
            values[:, :, :longest] = more_values
        for buffer, values in zip(self._position_embeddings, position_embeddings, strict=True):
            buffer.copy_(values)
        self.bias.fill_(float("-inf"))
        self.bias[..., :longest] = to_device(_prompt_bias(prompts), self.bias.device)[:, None, None, None]
        self.step.zero_()

    def begin_step(self) -> PositionEmbeddings:
        """See `DecodeCache`."""
        self.bias.index_fill_(-1, self.step + self._prompt_room, 0.0)  # the token is about to be seen
        cos, sin = (values.index_select(1, self.step)[:, :, None] for values in self._position_embeddings)
        return cos, sin

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `DecodeCache`."""
        keys, values = self._own[layer]
        keys.index_copy_(3, self.step, key.transpose(1, 2)[:, :, :, None])
        values.index_copy_(3, self.step, value.transpose(1, 2)[:, :, :, None])
        own = keys[:, :, :, : self.width], values[:, :, :, : self.width]
        return next_token_attention(query, self._prompts[layer], own, self.bias[..., : self._prompt_room + self.width])

    def end_step(self) -> None:
        """See `DecodeCache`; behind the last token it begins anew, for a capture makes more steps than may fit."""
        self.step.add_(1).remainder_(self._own[0][0].shape[3])

    def select_rows(self, rows: Tensor) -> None:
        """As for `SharedPromptCache`; the buffers are then others, so that nothing captured can be replayed."""
        prompts, slots = rows[:, 0] // self.num_rows, rows % self.num_rows
        self._position_embeddings = self._position_embeddings[0][prompts], self._position_embeddings[1][prompts]
        self.bias = self.bias[prompts]
        for layer in range(len(self._own)):  # one after another, so that no more than a layer is held twice
            keys, values = self._prompts[layer]
            self._prompts[layer] = keys[prompts], values[prompts]
            keys, values = self._own[layer]
            self._own[layer] = (
                _select_slots(keys, prompts, slots).contiguous(),
                _select_slots(values, prompts, slots).contiguous(),
            )


def _select_slots(own: Tensor, prompts: Tensor, slots: Tensor) -> Tensor:
    """[B', K, S', T, D] from [B, K, S, T, D]: of prompts [B'] the rows with the numbers [B', S']."""
    return own[prompts[:, None], :, slots].transpose(1, 2)


def _cast(prompts: PromptCache, dtype: torch.dtype) -> list[KeysAndValues]:
    return [(keys.to(dtype), values.to(dtype)) for keys, values in zip(prompts.keys, prompts.values, strict=True)]


def _bias(prompts: PromptCache, num_tokens: int, dtype: torch.dtype) -> Tensor | None:
    """[B, 1, 1, 1, P + T] minus infinity behind the end of a shorter prompt; None where all are equally long."""
    if len(set(prompts.lengths)) == 1:
        return None
    bias = to_device(_prompt_bias(prompts).to(dtype), prompts.hidden.device)
    return F.pad(bias, (0, num_tokens))[:, None, None, None]


def _prompt_bias(prompts: PromptCache) -> Tensor:
    """[B, P] zero for tokens and minus infinity for filling; on the CPU."""
    is_token = torch.arange(max(prompts.lengths)) < torch.tensor(prompts.lengths)[:, None]
    return torch.zeros(is_token.shape).masked_fill(~is_token, float("-inf"))
