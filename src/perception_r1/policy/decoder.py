"""The language model for one token per row: the arithmetic of its layers in transformers, without their wrappers.

A tiny network spends most of a decoding step in wrappers, and a large one on a GPU in launching small kernels. Here
linear layers of the same input are one product, adapters are merged, and a CUDA graph can capture every operation.

Legend: B prompts, S rows of each, R = B*S rows, H heads, K key-value heads, D head size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_r1.policy.batch import to_device
from perception_r1.policy.cache import DecodeCache, PositionEmbeddings
from perception_r1.policy.forward import at_least_fp32
from perception_r1.policy.prefill import PromptCache
from perception_r1.policy.vision import QwenVL

_MAX_COPIED_WEIGHTS = 2**28
"""Language models of at most so many weights are copied for speed; larger ones are read in place where they can be."""


class Decoder:
    """The next token's logits from each row's last token.

    The model's weights are copied where they are joined, merged or cast: after an update `sync_weights` copies again.
    """

    def __init__(self, model: QwenVL) -> None:
        text, config = model.model.language_model, model.config.get_text_config()
        self._text = text
        self._embedding = text.embed_tokens
        self._rotary = text.rotary_emb
        self.device: torch.device = self._embedding.weight.device
        self.dtype = _compute_dtype(self._embedding.weight)
        """Of products, keys and values: that of the weights, or of automatic mixed precision where it is on."""
        num_weights = sum(parameter.numel() for parameter in text.parameters())
        is_in_place = self._embedding.weight.dtype == self.dtype and num_weights > _MAX_COPIED_WEIGHTS
        self._layers = [_Layer(layer, config, None if is_in_place else self.dtype) for layer in text.layers]
        self._norm = text.norm
        heads = config.num_attention_heads, config.num_key_value_heads
        scales = [[text.layers[0].self_attn.scaling]] * heads[0] + [[1.0]] * heads[1]
        self._head_scale = torch.tensor(scales, dtype=at_least_fp32(self.dtype), device=self.device)  # of queries
        self._head = _FusedLinear([model.lm_head], None if is_in_place else self.dtype)
        self._addresses = _addresses(model)

    def is_compatible(self, model: QwenVL) -> bool:
        """The model's weights still lie where they lay, and products are computed in the same type.

        Weights that were moved away and back are new memory, though the parameters are the same objects; a captured
        step would go on reading the old.
        """
        weight = model.model.language_model.embed_tokens.weight
        return _addresses(model) == self._addresses and _compute_dtype(weight) == self.dtype

    @property
    def adapters(self) -> tuple[tuple[bool, bool], ...]:
        """Whether adapters are off, and merged: a captured step keeps to the state in which it was captured."""
        layers = (module for module in self._text.modules() if hasattr(module, "get_delta_weight"))
        return tuple(sorted({(layer.disable_adapters, layer.merged) for layer in layers}))

    def sync_weights(self) -> None:
        """Take over what training has changed."""
        for layer in self._layers:
            layer.sync_weights()
        self._head.sync_weights()

    def position_embeddings(self, prompts: PromptCache, num_tokens: int) -> PositionEmbeddings:
        """Rotary embedding of the `num_tokens` tokens behind each prompt."""
        positions = torch.tensor(prompts.next_positions)[:, None] + torch.arange(num_tokens)  # [B, T]
        cos, sin = self._rotary(self._embedding.weight, to_device(positions, self.device).expand(3, -1, -1))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)  # the signs of `rotate_half` are in the sine

    def first_logits(self, prompts: PromptCache) -> Tensor:
        """[B, V] logits of the first completion token."""
        with torch.autocast(_autocast_device(self.device), enabled=False):
            return self._head(prompts.hidden.to(self.dtype))

    def __call__(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """Read a token of each row, keep its keys and values, predict the next.

        Args:
            tokens: [R] ids.
            cache: Of these rows; it advances.

        Returns:
            [R, V] logits.
        """
        with torch.autocast(_autocast_device(self.device), enabled=False):
            cos, sin = (part * self._head_scale for part in cache.begin_step())  # [B, 1, H + K, D]
            rows = self._embedding(tokens).unflatten(0, (len(cos), -1))  # [B, S, hidden size]
            for number, layer in enumerate(self._layers):
                query, key, value = layer.project(rows, cos, sin)
                rows = rows + layer.output(cache.attend(number, query, key, value))
                rows = rows + layer.feed_forward(rows)
            cache.end_step()
            return self._head(_normalise(rows, self._norm).to(self.dtype)).flatten(0, 1)


class _Layer:
    def __init__(self, layer: Any, config: Any, dtype: torch.dtype | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # Qwen3-VL only
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._activation = mlp.act_fn
        self._qkv = _FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.output = _FusedLinear([attention.o_proj], dtype)
        self._gate_up = _FusedLinear([mlp.gate_proj, mlp.up_proj], dtype)
        self._down = _FusedLinear([mlp.down_proj], dtype)

    def sync_weights(self) -> None:
        for product in (self._qkv, self.output, self._gate_up, self._down):
            product.sync_weights()

    def project(self, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, D], keys and values [B, S, K, D] from [B, S, hidden size], turned by cosine and sine."""
        total = self._heads + 2 * self._kv_heads
        joined = self._qkv(_normalise(rows, self._norms[0])).unflatten(-1, (total, -1))
        turned, value = joined.split([self._heads + self._kv_heads, self._kv_heads], 2)
        if self._head_norms[0] is not None:
            parts = turned.split([self._heads, self._kv_heads], 2)
            turned = torch.cat([_normalise(part, norm) for part, norm in zip(parts, self._head_norms, strict=True)], 2)
        half = turned.shape[-1] // 2
        turned = torch.addcmul(turned * cos, torch.cat([turned[..., half:], turned[..., :half]], -1), sin)
        query, key = turned.to(value.dtype).split([self._heads, self._kv_heads], 2)
        return query, key, value

    def feed_forward(self, rows: Tensor) -> Tensor:
        """[B, S, hidden size] from the same."""
        gate, up = self._gate_up(_normalise(rows, self._norms[1])).chunk(2, -1)
        return self._down(self._activation(gate) * up)


class _FusedLinear:
    """Linear layers of the same input as one product.

    Args:
        layers: nn.Linear, or adapters of peft around them.
        dtype: Type in which the joined and merged weights are held; None: the layers are called as they are.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype | None) -> None:
        self._layers, self._dtype = layers, dtype
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self.sync_weights()

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy the weights, in place from the second time on: captured graphs go on reading them."""
        if self._dtype is None:
            return
        weight = _join([_merged_weight(layer) for layer in self._layers], self._dtype)
        biases = [_base(layer).bias for layer in self._layers if _base(layer).bias is not None]
        bias = _join(biases, self._dtype) if biases else None
        if self._weight is None:
            self._weight, self._bias = weight, bias
        elif weight.data_ptr() != self._weight.data_ptr():
            self._weight.copy_(weight)
        if bias is not None and self._bias is not None and bias.data_ptr() != self._bias.data_ptr():
            self._bias.copy_(bias)

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        if self._weight is not None:
            return F.linear(rows.to(self._weight.dtype), self._weight, self._bias)
        outputs = [layer(rows) for layer in self._layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _addresses(model: QwenVL) -> tuple[object, ...]:
    """Device, and where every weight and buffer of language model and vocabulary head lies, adapters included."""
    text, head = model.model.language_model, model.lm_head
    tensors = (*text.parameters(), *text.buffers(), *head.parameters())
    return text.embed_tokens.weight.device, *(tensor.data_ptr() for tensor in tensors)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = _autocast_device(weight.device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _autocast_device(device: torch.device) -> str:
    """Whose mixed precision holds there; on the meta device, where memory is planned, that of CUDA."""
    return "cuda" if device.type == "meta" else device.type


def _normalise(rows: Tensor, norm: Any) -> Tensor:
    """RMS norm over the last dimension, in the type of its input."""
    return F.rms_norm(rows, rows.shape[-1:], norm.weight.to(rows.dtype), norm.variance_epsilon)


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _merged_weight(layer: Any) -> Tensor:
    """The weight of a linear layer with its active adapters; where there may be one it is a copy, on or off."""
    weight: Tensor = _base(layer).weight
    if not hasattr(layer, "get_delta_weight"):
        return weight
    weight = weight.clone()  # `sync_weights` writes into it
    if not layer.disable_adapters and not layer.merged:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name)
    return weight


def _join(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor after another along the first dimension; a single one of the right type is not copied."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))).to(dtype)
