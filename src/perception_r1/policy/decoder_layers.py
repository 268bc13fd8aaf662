"""Layers of language models for one token per row: the arithmetic of transformers, without wrappers.

Linear layers of the same input are one product, and adapters are merged.

Legend: B prompts, S rows of each, H heads, K key-value heads, D head size.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_r1.policy.cache import DecodeCache
from perception_r1.policy.fused_linear import FusedLinear


class DecoderLayer:
    """A layer of the language model for one token per row; that of Qwen2, or of Qwen3 with its norms of heads.

    Args:
        layer: Of transformers.
        config: Of the language model.
        dtype: Type in which joined and merged weights are held; None: layers are called as they are.

    Attributes:
        output_norms: Names of the norms of what attention and what the feed-forward layer add, where there are any.
    """

    output_norms: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype | None) -> None:
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._output_norms = [getattr(layer, name) for name in self.output_norms]
        self._mixer = self.make_mixer(layer, config, dtype)
        self._feed_forward = self.make_feed_forward(layer.mlp, dtype)

    @staticmethod
    def normalise(rows: Tensor, norm: Any) -> Tensor:
        """RMS norm over the last dimension, in the type of its input."""
        return F.rms_norm(rows, rows.shape[-1:], norm.weight.to(rows.dtype), norm.variance_epsilon)

    @staticmethod
    def signs(sin: Tensor) -> Tensor:
        """Sines of the rotary embedding [..., D] with the signs that `Attention.partners` wants."""
        first, second = sin.chunk(2, -1)
        return torch.cat([-first, second], -1)  # those of `rotate_half`

    def make_mixer(self, layer: Any, config: Any, dtype: torch.dtype | None) -> "Mixer":
        """What lets a token know of those before it, from the layer of transformers."""
        return Attention(layer.self_attn, config, dtype, self.normalise)

    def make_feed_forward(self, mlp: Any, dtype: torch.dtype | None) -> "FeedForward":
        """What comes behind attention, from the module of transformers."""
        return DenseFeedForward(mlp, dtype)

    def sync_weights(self) -> None:
        """Take over what training has changed."""
        for part in (self._mixer, self._feed_forward):
            part.sync_weights()

    def __call__(self, number: int, rows: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache) -> Tensor:
        """The next state of every row.

        Args:
            number: Of the layer.
            rows: [B, S, hidden size].
            cos: [B, 1, H + K, D].
            sin: [B, 1, H + K, D], with its `signs`.
            cache: What the rows have seen; it takes this token up.

        Returns:
            [B, S, hidden size].
        """
        mixed = self._mixer(number, self.normalise(rows, self._norms[0]), cos, sin, cache)
        rows = rows + self._normalise_output(mixed, 0)
        return rows + self._normalise_output(self._feed_forward(self.normalise(rows, self._norms[1])), 1)

    def _normalise_output(self, added: Tensor, part: int) -> Tensor:
        return self.normalise(added, self._output_norms[part]) if self._output_norms else added


class Mixer(Protocol):
    """[B, S, hidden size] from the same, normalised; see `DecoderLayer`."""

    def __call__(self, number: int, rows: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache) -> Tensor:
        """The same shape."""

    def sync_weights(self) -> None:
        """Take over what training has changed."""


class Attention:
    """Full attention; where only a part of each head is turned (`partial_rotary_factor`), it is the first.

    Args:
        attention: Of transformers.
        config: Of the language model.
        dtype: As for `DecoderLayer`.
        normalise: That of the layer, for norms of heads where there are any.
    """

    def __init__(
        self, attention: Any, config: Any, dtype: torch.dtype | None, normalise: Callable[[Tensor, Any], Tensor]
    ) -> None:
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = attention.head_dim
        self._turned_size = int(self._size * config.rope_parameters.get("partial_rotary_factor", 1.0))
        self._head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # not in Qwen2
        self._normalise = normalise
        self._qkv = FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._output = FusedLinear([attention.o_proj], dtype)

    def sync_weights(self) -> None:
        """See `Mixer`."""
        self._qkv.sync_weights()
        self._output.sync_weights()

    def __call__(self, number: int, rows: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache) -> Tensor:
        """See `Mixer`."""
        joined = self._qkv(rows).unflatten(-1, (-1, self._size))
        turned, value = joined.split([self._heads + self._kv_heads, self._kv_heads], 2)
        query, key = self._turn(turned, cos, sin)
        return self._output(cache.attend(number, query, key, value))

    @staticmethod
    def partners(heads: Tensor) -> list[Tensor]:
        """In parts, beside every value of heads [..., D] the one with which it is turned: the other half."""
        first, second = heads.chunk(2, -1)
        return [second, first]

    def _turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, S, H, D] and keys [B, S, K, D], normalised and turned, from [B, S, H + K, D]."""
        turned, counts = heads, [self._heads, self._kv_heads]
        if self._head_norms[0] is not None:
            pairs = zip(heads.split(counts, 2), self._head_norms, strict=True)
            turned = torch.cat([self._normalise(part, norm) for part, norm in pairs], 2)
        end = self._turned_size
        swapped = self.partners(turned[..., :end])
        if end < self._size:
            swapped.append(turned[..., end:])
        turned = torch.addcmul(turned * cos, torch.cat(swapped, -1), sin).to(heads.dtype)
        query, key = turned.split(counts, 2)
        return query, key


class FeedForward(Protocol):
    """[..., hidden size] from the same, normalised."""

    def __call__(self, rows: Tensor) -> Tensor:
        """The same shape."""

    def sync_weights(self) -> None:
        """Take over what training has changed."""


class DenseFeedForward:
    """A gated feed-forward layer, with gate and values in two matrices or in one."""

    def __init__(self, mlp: Any, dtype: torch.dtype | None) -> None:
        is_joined = hasattr(mlp, "gate_up_proj")
        self._activation = mlp.activation_fn if is_joined else mlp.act_fn
        self._gate_up = FusedLinear([mlp.gate_up_proj] if is_joined else [mlp.gate_proj, mlp.up_proj], dtype)
        self._down = FusedLinear([mlp.down_proj], dtype)

    def sync_weights(self) -> None:
        """See `FeedForward`."""
        self._gate_up.sync_weights()
        self._down.sync_weights()

    def __call__(self, rows: Tensor) -> Tensor:
        """See `FeedForward`."""
        gate, up = self._gate_up(rows).chunk(2, -1)
        return self._down(self._activation(gate) * up)
