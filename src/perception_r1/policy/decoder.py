"""The language model for one token per row: the arithmetic of its layers in transformers, without their wrappers.

A tiny network spends most of a decoding step in wrappers, and a large one on a GPU in launching small kernels. Here
linear layers of the same input are one product, adapters are merged, and a CUDA graph can capture every operation.

Legend: B prompts, S rows of each, R = B*S rows, H heads, K key-value heads, D head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_r1.policy.batch import to_device
from perception_r1.policy.cache import DecodeCache, PositionEmbeddings
from perception_r1.policy.families import VisionLanguageModel, family_of
from perception_r1.policy.fused_linear import FusedLinear
from perception_r1.policy.precision import at_least_fp32, autocast_device
from perception_r1.policy.prompt_cache import PromptCache

_MAX_COPIED_WEIGHTS = 2**28
"""Language models of at most so many weights are copied for speed; larger ones are read in place where they can be."""


class Decoder:
    """The next token's logits from each row's last token.

    The model's weights are copied where they are joined, merged, packed or cast: after an update `sync_weights` copies
    again.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        text, config = model.model.language_model, model.config.get_text_config()
        self._text = text
        self._embedding = text.embed_tokens
        self._rotary = text.rotary_emb
        self.device: torch.device = self._embedding.weight.device
        self.dtype = _compute_dtype(self._embedding.weight)
        """Of products, keys and values: that of the weights, or of automatic mixed precision where it is on."""
        num_weights = sum(parameter.numel() for parameter in text.parameters())
        is_in_place = self._embedding.weight.dtype == self.dtype and num_weights > _MAX_COPIED_WEIGHTS
        self._family = family_of(model)
        layer_class = self._family.decoder_layer
        attention = next(layer.self_attn for layer in text.layers if hasattr(layer, "self_attn"))
        self._layers = [layer_class(layer, config, None if is_in_place else self.dtype) for layer in text.layers]
        self._norm, self._normalise, self._signs = text.norm, layer_class.normalise, layer_class.signs
        self._head_size = attention.head_dim
        heads = config.num_attention_heads, config.num_key_value_heads
        scales = [[attention.scaling]] * heads[0] + [[1.0]] * heads[1]
        self._head_scale = torch.tensor(scales, dtype=at_least_fp32(self.dtype), device=self.device)  # of queries
        self._head = FusedLinear([model.lm_head], None if is_in_place else self.dtype)
        self._addresses = _addresses(model)

    def is_compatible(self, model: VisionLanguageModel) -> bool:
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
        """Rotary embedding of the `num_tokens` tokens behind each prompt, of whole heads."""
        positions = torch.tensor(prompts.next_positions)[:, None] + torch.arange(num_tokens)  # [B, T]
        position_ids = self._family.position_ids(to_device(positions, self.device).expand(3, -1, -1))
        cos, sin = self._rotary(self._embedding.weight, position_ids)
        sin = self._signs(sin)
        rest = (0, self._head_size - cos.shape[-1])  # what is not turned
        return F.pad(cos, rest, value=1.0), F.pad(sin, rest)

    def first_logits(self, prompts: PromptCache) -> Tensor:
        """[B, V] logits of the first completion token."""
        with torch.autocast(autocast_device(self.device), enabled=False):
            return self._head(prompts.hidden.to(self.dtype))

    def __call__(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """Read a token of each row, keep its keys and values, predict the next.

        Args:
            tokens: [R] ids.
            cache: Of these rows; it advances.

        Returns:
            [R, V] logits.
        """
        with torch.autocast(autocast_device(self.device), enabled=False):
            cos, sin = (part * self._head_scale for part in cache.begin_step())  # [B, 1, H + K, D]
            rows = self._embedding(tokens).unflatten(0, (len(cos), -1))  # [B, S, hidden size]
            for number, layer in enumerate(self._layers):
                rows = layer(number, rows, cos, sin, cache)
            cache.end_step()
            return self._head(self._normalise(rows, self._norm).to(self.dtype)).flatten(0, 1)


def _addresses(model: VisionLanguageModel) -> tuple[object, ...]:
    """Device, and where every weight and buffer of language model and vocabulary head lies, adapters included."""
    text, head = model.model.language_model, model.lm_head
    tensors = (*text.parameters(), *text.buffers(), *head.parameters())
    return text.embed_tokens.weight.device, *(tensor.data_ptr() for tensor in tensors)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = autocast_device(weight.device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
