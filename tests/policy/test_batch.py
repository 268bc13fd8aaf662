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
    assert one.frames == other.frames


def test_a_selection_is_what_encoding_only_those_prompts_gives(folder):
    processor = processor_of(folder)
    batch = encode(processor)
    for places in ([0], [1], [2], [1, 0], [2, 1], [2, 2, 0], range(1, 3)):
        assert_same(batch.select(places), encode(processor, list(places)))


def test_a_selection_of_a_selection_keeps_its_pictures(folder):
    processor = processor_of(folder)
    assert_same(encode(processor).select([2, 1]).select([1]), encode(processor, [1]))


def test_padding_is_known(folder):
    batch = encode(processor_of(folder))
    assert len(batch) == 3
    assert batch.is_padded
    assert not batch.select([1]).is_padded


def test_moving_moves_every_tensor(folder):
    batch = encode(processor_of(folder))
    moved = batch.to("meta")
    tensors = [getattr(moved, name) for name in moved.__dataclass_fields__ if name not in ("num_images", "frames")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_images, moved.frames) == (batch.num_images, batch.frames)
    assert_same(batch.to("cpu"), batch)
