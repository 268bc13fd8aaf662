"""Splits of a world: the same everywhere, disjoint, without repetition where they are held out."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from perception_r1.data.synthetic.objects import CountingWorld, DetectionWorld, GroundingWorld
from perception_r1.data.synthetic.pages import TextWorld
from perception_r1.data.synthetic.scenes import SyntheticScenes, scene_fingerprint
from perception_r1.data.synthetic.worlds import Scene, World
from perception_r1.errors import UserError

WORLDS = [GroundingWorld(), CountingWorld(), DetectionWorld(), TextWorld()]

by_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: type(world).__name__)


@dataclass(frozen=True, kw_only=True)
class GreyWorld(World):
    """One pixel in one of so many greys: a world that repeats itself."""

    num_greys: int = 100

    def draw(self, rng: random.Random) -> Scene:
        grey = rng.randrange(self.num_greys)
        image = Image.new("RGB", (1, 1), (grey, grey, grey))
        return Scene(image=image, values={"text": str(grey)}, things=(), owner=np.zeros((1, 1), np.int16))


@by_world
def test_a_scene_depends_on_world_seed_split_and_index_alone(world):
    first, second = SyntheticScenes(world, "train", 3, 50), SyntheticScenes(world, "train", 3, 1000)
    backwards = {index: second[index] for index in reversed(range(20))}
    for index in range(20):
        assert first[index].values == backwards[index].values
        assert first[index].image.tobytes() == backwards[index].image.tobytes()
    other_seed, other_split = SyntheticScenes(world, "train", 4, 50), SyntheticScenes(world, "val", 3, 20)
    assert first[0].image.tobytes() not in (other_seed[0].image.tobytes(), other_split[0].image.tobytes())


def images(world: World, seed: int, **sizes: int) -> dict[str, list[bytes]]:
    sources = {split: SyntheticScenes(world, split, seed, size) for split, size in sizes.items()}
    return {split: [scene.image.tobytes() for scene in source] for split, source in sources.items()}


@by_world
def test_no_image_is_in_two_splits_or_twice_in_a_held_out_one(world):
    found = images(world, 0, train=150, val=40, test=40)
    train, val, test = map(set, found.values())
    assert train.isdisjoint(val)
    assert train.isdisjoint(test)
    assert val.isdisjoint(test)
    assert (len(val), len(test)) == (40, 40)
    assert len(train) == 150


def test_splits_stay_disjoint_and_unique_in_a_world_that_repeats_itself():
    """There are few images, so only the split by hash keeps them apart, whatever the seed and the other settings."""
    train, val, test = map(set, images(GreyWorld(), 0, train=400, val=5, test=5).values())
    other = set(images(GreyWorld(skew=0.5), 1, train=400)["train"])
    assert len(train) < 100
    assert (train | other).isdisjoint(val | test)
    assert val.isdisjoint(test)
    assert len(val) == len(test) == 5


def test_a_world_with_too_few_images_is_an_error():
    with pytest.raises(ValueError, match="GreyWorld has too few different images for 50 val scenes"):
        SyntheticScenes(GreyWorld(), "val", 0, 50)


def test_fingerprint_names_every_setting():
    prints = [
        scene_fingerprint(DetectionWorld(), "val", 0, 5),
        scene_fingerprint(DetectionWorld(skew=1.0), "val", 0, 5),
        scene_fingerprint(CountingWorld(), "val", 0, 5),
        scene_fingerprint(DetectionWorld(), "test", 0, 5),
        scene_fingerprint(DetectionWorld(), "val", 1, 5),
        scene_fingerprint(DetectionWorld(), "val", 0, 6),
    ]
    assert len(set(prints)) == len(prints) == 6


@pytest.mark.parametrize(
    ("world", "change", "sentence"),
    [
        (GroundingWorld(), {"skew": 0.0}, "skew must be more than 0 and at most 100, got 0.0"),
        (GroundingWorld(), {"min_distractors": 8}, "max_distractors must be between 8 and 100, got 7"),
        (GroundingWorld(), {"min_size": 5}, "min_size must be between 6 and 140, got 5"),
        (GroundingWorld(), {"image_size": 56, "max_size": 60}, "max_size must be between 16 and 56, got 60"),
        (CountingWorld(), {"min_targets": 0}, "min_targets must be between 1"),
        (CountingWorld(), {"max_targets": 0}, "max_targets must be between 1"),
        (
            CountingWorld(),
            {"max_targets": 70},
            "up to 75 objects of 16 px do not fit into 140 px, which has room",
        ),
        (DetectionWorld(), {"empty_share": 1.5}, "empty_share must be between 0 and 1, got 1.5"),
        (DetectionWorld(), {"max_size": 4}, "max_size must be between 16 and 140, got 4"),
        (TextWorld(), {"max_angle": 90.0}, "max_angle must be between 0 and 15, got 90.0"),
        (TextWorld(), {"min_lines": 4}, "max_lines must be between 4 and 100, got 3"),
    ],
)
def test_impossible_settings_are_refused(world, change, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(world, **change)


def test_source_refuses_wrong_arguments_and_indices():
    with pytest.raises(ValueError, match="split must be one of train, val, test"):
        SyntheticScenes(DetectionWorld(), "dev", 0, 5)
    with pytest.raises(ValueError, match="at least 1 scene"):
        SyntheticScenes(DetectionWorld(), "val", 0, 0)
    with pytest.raises(IndexError):
        SyntheticScenes(DetectionWorld(), "val", 0, 5)[5]
    assert len(list(SyntheticScenes(DetectionWorld(), "val", 0, 5))) == 5
