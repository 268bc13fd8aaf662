import pytest
import torch

from perception_r1.policy.vision import encode_images
from tests.policy import oracle

SIZES = [(280, 140), (28, 28), (140, 336)]
"""Images of several windows, of one token, and higher than wide."""


@pytest.fixture
def prompts(policy):
    """A prompt with all three images."""
    return policy.processor.encode([oracle.chat("", 3)], [[oracle.noise(*size) for size in SIZES]], max_tokens=None)


def test_features_are_those_of_a_tower_that_computes_its_geometry_itself(policy, plain, prompts):
    pixels, grids = torch.cat(prompts.pixel_values), torch.tensor(prompts.image_grids)
    expected = plain.model.get_image_features(pixels, grids)
    features = encode_images(policy.model, prompts)
    assert [image.shape[1] for image in features] == [image.shape[0] for image in expected.pooler_output]
    for number, image in enumerate(features):
        layers = [layer[number] for layer in getattr(expected, "deepstack_features", None) or []]
        assert torch.equal(image, torch.stack([expected.pooler_output[number], *layers]))


def test_only_what_qwen3_adds_to_layers_makes_features_deeper(policy, family, prompts):
    num_layers = len(policy.model.config.vision_config.deepstack_visual_indexes) if family == "qwen3_vl" else 0
    assert {len(image) for image in encode_images(policy.model, prompts)} == {1 + num_layers}


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_windows_matter_to_the_comparison(policy, plain, prompts):
    plain.model.visual.window_size *= 100
    pixels, grids = torch.cat(prompts.pixel_values), torch.tensor(prompts.image_grids)
    expected = plain.model.get_image_features(pixels, grids).pooler_output
    assert not torch.allclose(encode_images(policy.model, prompts)[0][0], expected[0], atol=1e-6)
