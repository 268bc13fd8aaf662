"""Fixtures of the engine's tests: policies in float64, so that comparisons can be strict."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle

_LIKE_OTHERS = ("qwen3_vl", "qwen3_5_moe")
"""What they have is also in Qwen3-VL-MoE and in Qwen3.5: they belong to the slow tests."""


def _param(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in _LIKE_OTHERS else name


@pytest.fixture(params=[_param(name) for name, family in FAMILIES.items() if family.shares_prompts])
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
def exact_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers computes in float32 whatever the weights' type, here in the type of the weights."""
    to, softmax, grid_sample = torch.Tensor.to, torch.nn.functional.softmax, torch.nn.functional.grid_sample

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if word is torch.float32 else word for word in args)
            kwargs |= {"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else {}
        return to(self, *args, **kwargs)

    def exact_softmax(scores: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        return softmax(scores, *args, dtype=None if scores.dtype == torch.float64 else dtype, **kwargs)

    def exact_grid_sample(values: torch.Tensor, grid: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return grid_sample(values, to(grid, values.dtype), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", exact_grid_sample)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: keep(self, torch.float32))
    monkeypatch.setattr(torch.nn.functional, "softmax", exact_softmax)
