import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import torch

from perception_r1.policy.batch import PromptBatch, move_together, to_device
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy.oracle import encode


def processor_of(folder):
    return Policy.load(PolicyConfig(name=str(folder))).processor


def assert_same(one, other):
    for name in ("input_ids", "position_ids", "pixel_values"):
        for tensor, expected in zip(getattr(one, name), getattr(other, name), strict=True):
            assert torch.equal(tensor, expected), name
    for name in ("lengths", "next_positions", "num_images", "image_sizes", "image_grids"):
        assert getattr(one, name) == getattr(other, name), name


def test_a_selection_is_what_encoding_only_those_prompts_gives(folder):
    processor = processor_of(folder)
    batch = encode(processor)
    for indices in ([0], [1], [2], [1, 0], [2, 1], [2, 2, 0], range(1, 3)):
        assert_same(batch.select(indices), encode(processor, list(indices)))


def test_a_selection_of_a_selection_keeps_its_pictures(folder):
    processor = processor_of(folder)
    assert_same(encode(processor).select([2, 1]).select([1]), encode(processor, [1]))


def test_a_selection_keeps_the_features_of_its_images(folder):
    plain = encode(processor_of(folder))
    batch = replace(plain, image_features=tuple(torch.full((1, 2, 3), float(image)) for image in range(4)))
    assert [float(features[0, 0, 0]) for features in batch.select([2, 1]).image_features] == [3, 1, 2]


def test_pictures_that_are_kept_go_where_their_prompts_go(folder):
    processor = processor_of(folder)
    assert encode(processor).pictures is None
    processor.keeps_pictures = True
    batch = encode(processor)
    joined = PromptBatch.concat([batch.select([2, 1]), pickle.loads(ForkingPickler.dumps(batch))])
    assert [[picture.size for picture in each] for each in processor.pictures(joined)] == [
        [(112, 56)], [(84, 28), (56, 56)], [(56, 84)], [(84, 28), (56, 56)], [(112, 56)]
    ]  # fmt: skip


def test_the_lengths_are_those_of_the_prompts_encoded_one_by_one(folder):
    processor = processor_of(folder)
    batch = encode(processor)
    assert len(batch) == 3
    assert batch.lengths == [len(encode(processor, [index]).input_ids[0]) for index in range(3)]
    assert len(set(batch.lengths)) == 3


def test_moving_moves_pixels_and_features_and_leaves_the_rest_on_the_host(folder):
    plain = encode(processor_of(folder))
    batch = replace(plain, image_features=tuple(torch.full((1, 2, 3), float(image)) for image in range(4)))
    moved = batch.to("meta")
    assert [tensor.device.type for tensor in moved.pixel_values + moved.image_features] == ["meta"] * 8
    assert [tensor.shape for tensor in moved.pixel_values] == [tensor.shape for tensor in batch.pixel_values]
    assert_same(replace(moved, pixel_values=batch.pixel_values), batch)
    assert_same(batch.to("cpu"), batch)


def test_integers_that_are_moved_together_keep_their_shapes():
    tensors = [torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.long), torch.arange(2)]
    moved = move_together(tensors, torch.device("meta"))
    assert [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in moved] == [
        (tensor.shape, torch.long, "meta") for tensor in tensors
    ]
    assert all(map(torch.equal, move_together(tensors, torch.device("cpu")), tensors))
    assert to_device(tensors[0], "cpu") is tensors[0]


def test_a_batch_that_is_sent_to_another_process_arrives_whole(folder):
    batch = encode(processor_of(folder))
    sent = pickle.loads(ForkingPickler.dumps(batch))  # as a worker of a loader sends it
    assert_same(sent, batch)
    assert not any(tensor.is_shared() for tensor in sent.input_ids + sent.position_ids + sent.pixel_values)
    assert_same(sent.select([1]), batch.select([1]))


def test_patches_are_counted_for_each_prompt(folder):
    batch = encode(processor_of(folder), [2, 1])
    per_image = [len(pixels) for pixels in batch.pixel_values]
    assert batch.num_patches == [per_image[0], sum(per_image[1:])]  # the second has two images
