"""Fixtures of the engine's tests: policies in float64, so that comparisons can be strict."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle

_MODULES = {name: [name] for name in FAMILIES} | {"internvl": ["internvl", "qwen2"]}
"""Of transformers, in which a family's layers are."""


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.shares_prompts])
def family(request: pytest.FixtureRequest) -> str:
    """A family whose prompts are shared."""
    return request.param


@pytest.fixture
def policy(grouped_folders: dict[str, Path], family: str) -> Policy:
    """A policy of each family in float64."""
    return Policy.load(PolicyConfig(name=str(grouped_folders[family]))).double().eval()


@pytest.fixture
def plain(grouped_folders: dict[str, Path], family: str) -> Any:
    """The same weights in the plain model."""
    return oracle.plain_model(grouped_folders[family])


@pytest.fixture
def adapted(grouped_folders: dict[str, Path], family: str) -> Policy:
    """The same policy inside an adapter that changes what it says."""
    policy = Policy.load(PolicyConfig(name=str(grouped_folders[family]), lora=LoraConfig(r=2))).double().eval()
    oracle.shake(policy.network)
    return policy


@pytest.fixture
def adapted_plain(plain: Any, adapted: Policy) -> Any:
    """The plain model inside the same adapter; the fixture `plain` itself is changed by it."""
    return oracle.adapt(plain, adapted.network)


@pytest.fixture
def exact_layers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Layers that transformers computes in float32 whatever the weights' type, here in the type of the weights."""
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in _MODULES[family]]

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        half = modules[0].rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    def route(self: Any, hidden: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    for name, value in [pair for module in modules for pair in vars(module).items()]:
        if isinstance(value, type) and name.endswith("RMSNorm"):
            monkeypatch.setattr(value, "forward", norm)
        if isinstance(value, type) and name.endswith("TopKRouter"):
            monkeypatch.setattr(value, "forward", route)
    if hasattr(modules[0], "apply_rotary_pos_emb_vision"):
        monkeypatch.setattr(modules[0], "apply_rotary_pos_emb_vision", rotate)
