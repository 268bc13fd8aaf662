import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.policy.families.patch_tower import encode_images
from perception_r1.policy.segments import cut, segmented_attention
from tests.policy import oracle

SIZES = [(280, 140), (28, 28), (140, 336)]
"""Images of several windows, of one token, and higher than wide."""


@pytest.fixture(params=oracle.PATCH_FAMILIES)
def family(request):
    return request.param


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
        expected_image = torch.stack([expected.pooler_output[number], *layers])
        torch.testing.assert_close(image, expected_image, rtol=1e-12, atol=1e-12)


def test_only_what_qwen3_vl_adds_to_layers_makes_features_deeper(policy, family, prompts):
    num_layers = len(policy.model.config.vision_config.deepstack_visual_indexes) if "qwen3_vl" in family else 0
    assert {len(image) for image in encode_images(policy.model, prompts)} == {1 + num_layers}


def test_images_and_windows_of_equal_length_are_one_call(policy, family, prompts, monkeypatch):
    lengths = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        lengths.append((len(query), query.shape[2]))
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    encode_images(policy.model, prompts)
    sizes = [rows * columns for _, rows, columns in prompts.image_grids]
    visual = policy.model.model.visual
    num_full = len(getattr(visual, "fullatt_block_indexes", visual.blocks))
    num_windowed = len(visual.blocks) - num_full
    if family == "qwen2_5_vl":
        assert sum(count * length for count, length in lengths) == len(visual.blocks) * sum(sizes)
        of_images = [(1, size) for size in sizes]
        of_windows = [call for call in lengths if call not in of_images] + [(1, 4)]  # an image of a single window
        assert len(of_windows) == num_windowed * len({length for _, length in of_windows})
        assert max(count for count, _ in of_windows) == 5
    else:
        assert (lengths, num_windowed) == ([(1, size) for size in sizes] * num_full, 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(0, 5))
def test_every_segment_attends_to_itself(lengths, seed):
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4, dtype=torch.float64)
    found, _ = segmented_attention(None, query, key, value, None, scaling=0.7, images=cut(lengths, query.device))
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    expected = [((0.7 * q @ k.mT).softmax(-1) @ v).transpose(1, 2) for q, k, v in parts]
    torch.testing.assert_close(found, torch.cat(expected, 1))


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_windows_matter_to_the_comparison(policy, plain, prompts):
    plain.model.visual.window_size *= 100
    pixels, grids = torch.cat(prompts.pixel_values), torch.tensor(prompts.image_grids)
    expected = plain.model.get_image_features(pixels, grids).pooler_output
    assert not torch.allclose(encode_images(policy.model, prompts)[0][0], expected[0], atol=1e-6)
