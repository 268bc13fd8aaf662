"""Shapes in the repository are those of the published models."""

from pathlib import Path

import pytest
import torch
import yaml

from perception_r1.planning import policy as module
from perception_r1.planning.policy import ShapePolicy, empty_model, read_config
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.readme import ROOT

PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
}
"""Numbers of weights on the hub."""
ROUNDED = {
    "OpenGVLab/InternVL3-2B-hf": 2.09,
    "OpenGVLab/InternVL3-8B-hf": 7.94,
    "google/gemma-3-4b-it": 4.3,
    "google/gemma-3-12b-it": 12.19,
}
"""The same in billions, as the hub shows them."""

GLM = ("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.6V-Flash")

WITH_PREDICTION = {
    "Qwen/Qwen3.5-0.8B": 873_438_784,
    "Qwen/Qwen3.5-2B": 2_274_069_824,
    "Qwen/Qwen3.5-4B": 4_659_865_088,
    "Qwen/Qwen3.5-9B": 9_653_104_368,
    "Qwen/Qwen3.5-27B": 27_781_427_952,
    "Qwen/Qwen3.5-35B-A3B": 35_951_822_704,
}
"""The same of models that have another layer, which predicts a second token and which transformers does not load."""


@pytest.mark.parametrize(("name", "number"), PUBLISHED.items())
def test_a_model_has_as_many_weights_as_on_the_hub(name, number):
    weights = {id(weight): weight for weight in empty_model(PolicyConfig(name=name)).parameters()}
    assert sum(weight.numel() for weight in weights.values()) == number
    assert {weight.device.type for weight in weights.values()} == {"meta"}


@pytest.mark.parametrize(("name", "number"), WITH_PREDICTION.items())
def test_a_model_has_as_many_weights_as_on_the_hub_without_those_that_predict_a_second_token(name, number):
    model = empty_model(PolicyConfig(name=name))
    attends = next(layer for layer in model.model.language_model.layers if layer.block_type == "full_attention")
    size = model.config.text_config.hidden_size
    of_layer = sum(weight.numel() for weight in attends.parameters())  # behind it norms of its two inputs and output
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    assert sum(weights.values()) + of_layer + 2 * size * size + 3 * size == number


@pytest.mark.parametrize(("name", "billions"), ROUNDED.items())
def test_a_model_outside_qwen_vl_has_about_as_many(name, billions):
    weights = {id(weight): weight for weight in empty_model(PolicyConfig(name=name)).parameters()}
    assert round(sum(weight.numel() for weight in weights.values()) / 1e9, 2) == billions


@pytest.mark.parametrize("name", GLM)
def test_glm4v_has_as_many_weights_as_its_published_sizes_make(name):
    model = empty_model(PolicyConfig(name=name))
    attention = 4096 * (32 + 2 + 2) * 128 + (32 + 2 + 2) * 128 + 32 * 128 * 4096
    text = 2 * 151_552 * 4096 + 40 * (attention + 3 * 4096 * 13_696 + 4 * 4096) + 4096
    assert round(text / 1e9, 1) == 9.4
    parts = (*model.model.language_model.parameters(), *model.lm_head.parameters())
    assert sum(weight.numel() for weight in parts) == text


def test_a_model_with_experts_has_as_many_weights_as_its_published_sizes_make():
    model = empty_model(PolicyConfig(name="Qwen/Qwen3-VL-30B-A3B-Instruct"))
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 128
    experts = 128 * 2048 + 128 * 3 * 2048 * 768
    text = 2 * 151_936 * 2048 + 48 * (attention + experts + 2 * 2048) + 2048
    assert round(text / 1e9, 1) == 30.5
    parts = (*model.model.language_model.parameters(), *model.lm_head.parameters())
    assert sum(weight.numel() for weight in parts) == text


def test_every_configured_model_can_be_planned_offline(monkeypatch):
    monkeypatch.setattr(module, "model_family", lambda name: pytest.fail(f"{name} is looked for on the hub"))
    files = [path for path in (ROOT / "configs" / "model").glob("*.yaml") if path.stem != "tiny"]
    assert len(files) == len(PUBLISHED) + len(WITH_PREDICTION) + len(ROUNDED) + len(GLM) + 1
    for path in files:
        name = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["policy"]["name"]
        assert read_config(name).model_type in FAMILIES


@pytest.mark.parametrize(
    "options", [{}, {"lora": LoraConfig(r=2)}, {"freeze_vision": True, "dtype": "bfloat16"}], ids=str
)
def test_a_policy_without_values_has_the_weights_of_one_with_values(grouped_folders, family, options):
    config = PolicyConfig(name=str(grouped_folders[family]), **options)
    real, empty = (dict(kind.load(config).named_parameters()) for kind in (Policy, ShapePolicy))
    assert list(real) == list(empty)
    for name, weight in real.items():
        other = empty[name]
        assert (weight.shape, weight.dtype, weight.requires_grad) == (other.shape, other.dtype, other.requires_grad)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_shapes_come_with_the_package():
    text = Path(ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"planning/shapes/*"' in text
    assert torch.device("meta") == ShapePolicy.load(PolicyConfig()).device
