"""What is drawn is what is annotated."""

import math
import random

import numpy as np
import pytest
from scipy.ndimage import label as connected

from perception_r1.data.synthetic.objects import CountingWorld, DetectionWorld, GroundingWorld
from perception_r1.data.synthetic.pages import CHARACTERS, TextWorld
from perception_r1.data.synthetic.render import COLOURS, SHAPES, shape_mask
from perception_r1.data.synthetic.worlds import World

SHAPE_WORLDS = [GroundingWorld(), CountingWorld(), DetectionWorld(), GroundingWorld(skew=0.5, min_distractors=5)]
WORLDS = [*SHAPE_WORLDS, TextWorld(), TextWorld(skew=0.5)]

by_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: type(world).__name__)
by_shape_world = pytest.mark.parametrize("world", SHAPE_WORLDS, ids=lambda world: type(world).__name__)


def scenes(world: World, count: int):
    return [world.draw(random.Random(seed)) for seed in range(count)]


@by_world
def test_a_scene_depends_on_the_generator_alone(world):
    for first, second in zip(scenes(world, 10), scenes(world, 10), strict=True):
        assert first.values == second.values
        assert first.image.tobytes() == second.image.tobytes()


@by_shape_world
def test_what_is_seen_of_a_thing_lies_in_its_box_and_enough_of_it_is_seen(world):
    for scene in scenes(world, 60):
        for number, thing in enumerate(scene.things):
            y, x = np.nonzero(scene.owner == number)
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 <= x.min() <= x.max() < x2 <= world.image_size
            assert 0 <= y1 <= y.min() <= y.max() < y2 <= world.image_size
            assert min(x2 - x1, y2 - y1) >= world.min_size
            whole = (shape_mask(thing.name, x2 - x1, y2 - y1) >= 0.5).sum()
            assert len(x) >= world.min_visible * whole


def test_an_eye_that_knows_only_the_background_finds_the_annotated_boxes_and_colours():
    """Objects on a plain background, apart from each other: connected pixels that differ from it are the objects."""
    world = DetectionWorld(contrast=0.0, min_visible=1.0, empty_share=0.0, max_objects=4)
    num_found = 0
    for scene in scenes(world, 80):
        pixels = np.asarray(scene.image).astype(float)
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        areas, number = connected(np.abs(pixels - colours[counts.argmax()]).max(-1) > 4, np.ones((3, 3)))
        if number != len(scene.things):
            continue  # two objects touch
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            found = [k for k in np.unique(areas[y1:y2, x1:x2]) if k and (areas == k)[y1:y2, x1:x2].sum() > 40]
            boxes = []
            for k in found:
                y, x = np.nonzero(areas == k)
                boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
            distances = [np.abs(np.subtract(box, thing.box)).max() for box in boxes]
            assert min(distances) <= 1
            seen = np.median(pixels[areas == found[int(np.argmin(distances))]], axis=0)
            assert min(COLOURS, key=lambda name: np.linalg.norm(seen - COLOURS[name])) == thing.colour
            num_found += 1
    assert num_found > 60


@pytest.mark.parametrize(
    ("shape", "area"),
    [("rectangle", 1.0), ("ellipse", math.pi / 4), ("triangle", 0.5), ("diamond", 0.5), ("cross", 5 / 9)],
)
def test_a_shape_fills_its_box_as_geometry_says(shape, area):
    assert shape_mask(shape, 54, 36).mean() == pytest.approx(area, abs=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(16, 16), (20, 31), (56, 35)])
def test_a_shape_touches_all_sides_of_its_box(shape, size):
    mask = shape_mask(shape, *size)
    assert mask.shape == size[::-1]
    assert min(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) > 0


def test_targets_come_in_no_order_and_in_every_shape():
    boxes = [[item["box"] for item in scene.values["objects"]] for scene in scenes(DetectionWorld(), 300)]
    several = [found for found in boxes if len(found) > 3]
    assert sum(found == sorted(found, key=lambda box: (box[1], box[0])) for found in several) < len(several) / 5
    assert {thing.name for scene in scenes(DetectionWorld(), 300) for thing in scene.things} == set(SHAPES)
    assert {len(found) for found in boxes} == set(range(11))


def test_counts_reach_from_none_to_twelve_and_agree_with_what_is_there():
    counts = set()
    for scene in scenes(CountingWorld(skew=1.0), 400):
        label = scene.values["label"]
        named = [thing for thing in scene.things if label in (thing.name, f"{thing.colour} {thing.name}")]
        assert scene.values["boxes"] == [list(thing.box) for thing in named]
        assert scene.values["count"] == len(named)
        counts.add(len(named))
    assert counts == set(range(13))


def test_a_colour_and_a_shape_that_are_asked_for_are_there_once():
    asked = 0
    for scene in scenes(GroundingWorld(), 300):
        words = scene.values["question"].split()
        if len(words) == 2 and words[0] not in ("small", "large"):
            found = [thing for thing in scene.things if [thing.colour, thing.name] == words]
            assert [list(thing.box) for thing in found] == [scene.values["box"]]
            asked += 1
    assert asked > 50


@by_shape_world
def test_less_skew_is_harder(world):
    easy, hard = (np.mean([len(scene.things) for scene in scenes(type(world)(skew=skew), 150)]) for skew in (3.0, 0.4))
    assert hard > easy + 1


def test_a_page_shows_the_characters_of_its_text_in_whole_image_tokens():
    for scene in scenes(TextWorld(skew=0.7), 100):
        text = scene.values["text"]
        assert [thing.name for thing in scene.things] == [char for char in text if not char.isspace()]
        assert set(text) <= {*CHARACTERS, " ", "\n"}
        assert all(line.strip() == line != "" for line in text.split("\n"))
        assert all(length % 28 == 0 for length in scene.image.size)
        dark = np.asarray(scene.image).mean(-1) < 100
        assert not dark.any() or (scene.owner[dark] >= 0).mean() > 0.9
