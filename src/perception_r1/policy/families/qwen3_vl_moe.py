"""Qwen3-VL-MoE: Qwen3-VL with feed-forward layers of many experts, of which each token takes a few."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig

from perception_r1.policy.decoder_layers import DecoderLayer, DenseFeedForward, FeedForward
from perception_r1.policy.families.qwen3_vl import Qwen3VL, qwen3_text, qwen3_vision


class SparseFeedForward:
    """The experts of transformers as they are: copies of all of them would take more memory than they save time."""

    def __init__(self, mlp: Any) -> None:
        self._mlp = mlp

    def sync_weights(self) -> None:
        """See `FeedForward`: it reads the weights themselves."""

    def __call__(self, rows: Tensor) -> Tensor:
        """See `FeedForward`."""
        found: Tensor = self._mlp(rows.to(self._mlp.gate.weight.dtype))
        return found.to(rows.dtype)


class MoeDecoderLayer(DecoderLayer):
    """A layer with experts, or without, as the configuration says."""

    def make_feed_forward(self, mlp: Any, dtype: torch.dtype | None) -> FeedForward:
        """See `DecoderLayer`."""
        return SparseFeedForward(mlp) if hasattr(mlp, "experts") else DenseFeedForward(mlp, dtype)


class Qwen3VLMoe(Qwen3VL):
    """See `Family`."""

    name = "qwen3_vl_moe"
    decoder_layer = MoeDecoderLayer

    def named_weights(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """See `Family`: on the hub the matrices of experts are the other way round, and transformers leaves them so."""
        for name, parameter in model.named_parameters():
            is_of_experts = name.rpartition(".")[0].endswith(".experts")
            yield name, parameter.detach().transpose(1, 2) if is_of_experts else parameter.detach()

    def save(self, model: Any, folder: str | Path) -> None:
        """See `Family`."""
        state = {name: tensor.contiguous() for name, tensor in self.named_weights(model)}
        model.save_pretrained(folder, state_dict=state, save_original_format=False)

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Qwen3VLMoeConfig:
        """See `QwenVL`; of its layers every second one has experts."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": text["intermediate_size"] // 2}
        experts |= {"decoder_sparse_step": 2, "norm_topk_prob": True}  # the last is read by vLLM
        return Qwen3VLMoeConfig(text_config=qwen3_text(text) | experts, vision_config=qwen3_vision(vision), **common)
