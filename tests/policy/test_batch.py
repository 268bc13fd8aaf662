from dataclasses import replace

import torch

from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy.oracle import encode


def processor_of(folder):
    return Policy.load(PolicyConfig(name=str(folder))).processor


def assert_same(one, other):
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.num_images == other.num_images
    assert one.image_sizes == other.image_sizes


def test_a_selection_is_what_encoding_only_those_prompts_gives(folder):
    processor = processor_of(folder)
    batch = encode(processor)
    for places in ([0], [1], [2], [1, 0], [2, 1], [2, 2, 0], range(1, 3)):
        assert_same(batch.select(places), encode(processor, list(places)))


def test_a_selection_of_a_selection_keeps_its_pictures(folder):
    processor = processor_of(folder)
    assert_same(encode(processor).select([2, 1]).select([1]), encode(processor, [1]))


def test_the_lengths_leave_padding_out(folder):
    processor = processor_of(folder)
    batch = encode(processor)
    assert len(batch) == 3
    assert batch.lengths == [encode(processor, [place]).input_ids.shape[1] for place in range(3)]


def test_moving_moves_every_tensor(folder):
    plain = encode(processor_of(folder))
    batch = replace(plain, image_features=tuple(torch.full((1, 2, 3), float(image)) for image in range(4)))
    moved = batch.to("meta")
    values = [getattr(moved, name) for name in moved.__dataclass_fields__ if name not in ("num_images", "image_sizes")]
    tensors = [tensor for value in values for tensor in (value if isinstance(value, tuple) else [value])]
    assert len(tensors) == 5 + 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_images, moved.image_sizes) == (batch.num_images, batch.image_sizes)
    assert_same(batch.to("cpu"), batch)
