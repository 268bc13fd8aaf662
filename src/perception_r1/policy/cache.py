"""Keys and values of the rows of a rollout: of their prompts, once per group, and of the tokens that they have written.

Beside them stand the states of linear attention (`row_states.py`), in models that have it.

`SharedPromptCache` and `ContiguousCache` (a single row per prompt, nothing to share) compute with exactly what has been
written, and finished rows leave them. `StaticCache` has fixed shapes and changes only in place, as a captured CUDA
graph wants, until rows leave it.

Legend: B prompts, S rows of each, P prompt tokens (longest), T tokens that can be written, H heads, K key-value heads,
D head size. Rows are numbered prompt by prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_r1.policy.attention import next_token_attention
from perception_r1.policy.batch import to_device
from perception_r1.policy.precision import at_least_fp32
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.prompt_states import KeysAndValues
from perception_r1.policy.row_states import RowStates

PositionEmbeddings: TypeAlias = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, [B, T, D] each: the rows of a prompt stand at the same positions."""


class DecodeCache(ABC):
    """What all layers keep of the rows, and the step at which the next token is written.

    Attributes:
        states: Of the layers of linear attention.
    """

    states: RowStates

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

    def __init__(
        self, prompts: PromptCache, position_embeddings: PositionEmbeddings, *, num_rows: int, dtype: torch.dtype
    ) -> None:
        self.states = RowStates(prompts, num_rows=num_rows, dtype=dtype)
        self._num_rows = num_rows
        self._position_embeddings = position_embeddings
        self._room = position_embeddings[0].shape[1]
        self._longest = max(prompts.lengths)
        self._bias = _bias(prompts, self._room, dtype)  # [B, 1, 1, 1, P + T]
        self._step = 0

    def begin_step(self) -> PositionEmbeddings:
        """See `DecodeCache`."""
        cos, sin = self._position_embeddings
        return cos[:, self._step, None, None], sin[:, self._step, None, None]

    def end_step(self) -> None:
        """See `DecodeCache`."""
        self._step += 1

    def _keep(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Let go of all but keys and values; returns which prompts [B'] stay, and which of their rows [B', S']."""
        prompts, slots = rows[:, 0] // self._num_rows, rows % self._num_rows
        self._num_rows = rows.shape[1]
        self.states.select(prompts, slots)
        self._position_embeddings = self._position_embeddings[0][prompts], self._position_embeddings[1][prompts]
        self._bias = None if self._bias is None else self._bias[prompts]
        return prompts, slots


class SharedPromptCache(_EagerCache):
    """Prompts once per group; beside them the own tokens of each row."""

    def __init__(
        self, prompts: PromptCache, position_embeddings: PositionEmbeddings, *, num_rows: int, dtype: torch.dtype
    ) -> None:
        super().__init__(prompts, position_embeddings, num_rows=num_rows, dtype=dtype)
        self._prompts = _cast(prompts, dtype)
        self._own = {number: self._make_room(pair.keys) for number, pair in self._prompts.items()}

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
        prompts, slots = self._keep(rows)
        self._prompts = {number: _map(pair, lambda own: own[prompts]) for number, pair in self._prompts.items()}

        def select(own: Tensor) -> Tensor:
            kept = own.new_empty(len(rows), own.shape[1], rows.shape[1], *own.shape[3:])
            kept[:, :, :, : self._step] = _select_slots(own[:, :, :, : self._step], prompts, slots)
            return kept

        self._own = {number: _map(pair, select) for number, pair in self._own.items()}

    def _make_room(self, keys: Tensor) -> KeysAndValues:
        """Of own tokens, from a layer's keys [B, K, P, D] of prompts."""
        shape = (*keys.shape[:2], self._num_rows, self._room, keys.shape[3])
        return KeysAndValues(keys.new_empty(shape), keys.new_empty(shape))


class ContiguousCache(_EagerCache):
    """One row per prompt, written behind it into the same buffer."""

    def __init__(self, prompts: PromptCache, position_embeddings: PositionEmbeddings, *, dtype: torch.dtype) -> None:
        super().__init__(prompts, position_embeddings, num_rows=1, dtype=dtype)
        pairs = _cast(prompts, dtype).items()
        self._kept = {number: _map(pair, lambda own: F.pad(own, (0, 0, 0, self._room))) for number, pair in pairs}

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
        prompts, _ = self._keep(rows)
        self._kept = {number: _map(pair, lambda own: own[prompts]) for number, pair in self._kept.items()}


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
        self.states = RowStates(like, num_rows=num_rows, dtype=dtype)
        self._prompts, self._own = {}, {}  # zeros: what is hidden must still be finite
        for number, (keys, _) in like.keys_and_values.items():
            num_prompts, heads, _, size = keys.shape
            shape, own_shape = (num_prompts, heads, prompt_room, size), (num_prompts, heads, num_rows, num_tokens, size)
            self._prompts[number] = _zeros(shape, keys, dtype)
            self._own[number] = _zeros(own_shape, keys, dtype)
        hidden = like.hidden
        turns = hidden.new_zeros(2, num_prompts, num_tokens, size, dtype=at_least_fp32(dtype))
        self._position_embeddings = turns[0], turns[1]
        self._prompt_room, self._num_tokens = prompt_room, num_tokens
        self.num_rows = num_rows
        """S."""
        self.bias = hidden.new_zeros(num_prompts, 1, 1, 1, prompt_room + num_tokens, dtype=dtype)
        """[B, 1, 1, 1, P + T] minus infinity for what has not been written."""
        self.width = num_tokens
        """How many written tokens attention reads; never fewer than there are."""
        self.step = hidden.new_zeros(1, dtype=torch.long)
        """[1] tokens written so far."""

    @property
    def num_bytes(self) -> int:
        """Of all that the layers keep."""
        pairs = (*self._prompts.values(), *self._own.values())
        return sum(tensor.nbytes for tensors in (*pairs, self.states.tensors()) for tensor in tensors)

    def changing(self) -> list[Tensor]:
        """What depends on how many steps have been made, but for keys and values, which a step merely adds to."""
        return [self.step, self.bias, *self.states.tensors()]

    def load(self, prompts: PromptCache, position_embeddings: PositionEmbeddings) -> None:
        """Begin anew with other prompts of the same number, none longer than the room for them."""
        longest = max(prompts.lengths)
        for number, pair in self._prompts.items():
            for kept, more in zip(pair, prompts.keys_and_values[number], strict=True):
                kept[:, :, :longest] = more
        self.states.load(prompts)
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
        self.step.add_(1).remainder_(self._num_tokens)

    def select_rows(self, rows: Tensor) -> None:
        """As for `SharedPromptCache`; the buffers are then others, so that nothing captured can be replayed."""
        prompts, slots = rows[:, 0] // self.num_rows, rows % self.num_rows
        self.num_rows = rows.shape[1]
        self._position_embeddings = self._position_embeddings[0][prompts], self._position_embeddings[1][prompts]
        self.bias = self.bias[prompts]
        self.states.select(prompts, slots)
        for number in self._own:  # one after another, so that no more than a layer is held twice
            self._prompts[number] = _map(self._prompts[number], lambda kept: kept[prompts])
            self._own[number] = _map(self._own[number], lambda own: _select_slots(own, prompts, slots).contiguous())


def _select_slots(own: Tensor, prompts: Tensor, slots: Tensor) -> Tensor:
    """[B', K, S', T, D] from [B, K, S, T, D]: of prompts [B'] the rows with the numbers [B', S']."""
    return own[prompts[:, None], :, slots].transpose(1, 2)


def _cast(prompts: PromptCache, dtype: torch.dtype) -> dict[int, KeysAndValues]:
    return {number: _map(pair, lambda own: own.to(dtype)) for number, pair in prompts.keys_and_values.items()}


def _map(pair: KeysAndValues, change: Callable[[Tensor], Tensor]) -> KeysAndValues:
    return KeysAndValues(change(pair.keys), change(pair.values))


def _zeros(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> KeysAndValues:
    return KeysAndValues(like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype))


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
