"""Qwen3.5: three layers of linear attention (gated delta nets) to one of full attention, whose output is gated.

Boxes and the vision tower are those of Qwen3-VL, but image features reach the first layer alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5Config

from perception_r1.policy.cache import DecodeCache
from perception_r1.policy.decoder_layers import Attention, DecoderLayer, Mixer
from perception_r1.policy.families.base import VisionLanguageModel
from perception_r1.policy.families.qwen3_vl import Qwen3VLCodec
from perception_r1.policy.families.qwen_vl import QwenVL
from perception_r1.policy.fused_linear import FusedLinear
from perception_r1.policy.linear_attention import gates, next_token_linear_attention, share_states
from perception_r1.policy.precision import at_least_fp32


class GatedAttention(Attention):
    """Full attention whose output is multiplied by a gate, which `q_proj` computes beside the query of each head."""

    def __call__(self, number: int, rows: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache) -> Tensor:
        """See `Mixer`."""
        joined = self._qkv(rows).unflatten(-1, (-1, self._size))
        doubled, key, value = joined.split([2 * self._heads, self._kv_heads, self._kv_heads], 2)
        query, gate = doubled.unflatten(2, (self._heads, 2)).unbind(3)
        query, key = self._turn(torch.cat([query, key], 2), cos, sin)
        attended = cache.attend(number, query, key, value)
        return self._output(attended * gate.flatten(2).sigmoid())


class LinearAttention:
    """A gated delta net, which goes on from the states of each row.

    Args:
        delta_net: Of transformers.
        dtype: As for `DecoderLayer`.
    """

    def __init__(self, delta_net: Any, dtype: torch.dtype | None) -> None:
        self._delta_net = delta_net
        self._sizes = [delta_net.in_proj_qkv.out_features, delta_net.value_dim, *[delta_net.num_v_heads] * 2]
        names = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
        self._input = FusedLinear([getattr(delta_net, name) for name in names], dtype)
        self._output = FusedLinear([delta_net.out_proj], dtype)

    def sync_weights(self) -> None:
        """See `Mixer`."""
        self._input.sync_weights()
        self._output.sync_weights()

    def __call__(self, number: int, rows: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache) -> Tensor:
        """See `Mixer`; there are no positions."""
        net = self._delta_net
        mixed, gate, decay, rate = self._input(rows).split(self._sizes, -1)
        read = next_token_linear_attention(net, cache.states[number], mixed, *gates(net, decay, rate))
        dtype = at_least_fp32(read.dtype)
        weight, gate = net.norm.weight.to(dtype), gate.unflatten(-1, read.shape[2:]).to(dtype)
        normed = F.rms_norm(read.to(dtype), weight.shape, weight, net.norm.variance_epsilon) * F.silu(gate)
        return self._output(normed.to(rows.dtype).flatten(2))


class Qwen35DecoderLayer(DecoderLayer):
    """A layer of either kind; its norms hold how far their weights are from 1."""

    @staticmethod
    def normalise(rows: Tensor, norm: Any) -> Tensor:
        """See `DecoderLayer`."""
        dtype = at_least_fp32(rows.dtype)
        weight = 1 + norm.weight.to(dtype)
        return F.rms_norm(rows.to(dtype), weight.shape, weight, norm.eps).to(rows.dtype)

    def make_mixer(self, layer: Any, config: Any, dtype: torch.dtype | None) -> Mixer:
        """See `DecoderLayer`."""
        if layer.block_type == "linear_attention":
            return LinearAttention(layer.linear_attn, dtype)
        return GatedAttention(layer.self_attn, config, dtype, self.normalise)


class Qwen35(QwenVL):
    """See `Family`."""

    name = "qwen3_5"
    codec = Qwen3VLCodec()
    patch_size = 16
    decoder_layer = Qwen35DecoderLayer
    layer_types = frozenset({"full_attention", "linear_attention"})

    def prepare(self, model: VisionLanguageModel) -> None:
        """See `Family`."""
        super().prepare(model)
        share_states(model.model.language_model)

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Any:
        """See `Family`."""
        return Qwen3_5Config(text_config=qwen3_5_text(text), vision_config=qwen3_5_vision(vision), **common)


def qwen3_5_text(text: dict[str, Any]) -> dict[str, Any]:
    """Settings of a language model that attends in every second layer, with heads of which half is turned."""
    size, num_pairs = text["hidden_size"] // text["num_attention_heads"], max(1, text["num_attention_heads"] // 2)
    kinds = ["linear_attention", "full_attention"] * text["num_hidden_layers"]
    own = {"head_dim": 2 * size, "layer_types": kinds[: text["num_hidden_layers"]]}
    own |= {"rope_parameters": text["rope_parameters"] | {"mrope_interleaved": True, "partial_rotary_factor": 0.5}}
    own |= {"linear_num_key_heads": num_pairs, "linear_num_value_heads": 2 * num_pairs}
    return text | own | {"linear_key_head_dim": size // 2, "linear_value_head_dim": size}


def qwen3_5_vision(vision: dict[str, Any]) -> dict[str, Any]:
    """Settings of a vision tower with learned positions."""
    own = {"intermediate_size": 3 * vision["hidden_size"], "patch_size": 16, "num_position_embeddings": 256}
    return vision | own
