import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab

from perception_r1.data.synthetic.scenes import SyntheticScenes, scene_fingerprint
from perception_r1.data.synthetic.worlds import CountingWorld, DetectionWorld, GroundingWorld, TextWorld
from perception_r1.errors import UserError

WORLDS = [GroundingWorld(), CountingWorld(), DetectionWorld(), TextWorld()]
SHAPE_WORLDS = WORLDS[:3]
PURE = {"red": (238, 58, 52), "green": (52, 205, 92), "blue": (66, 112, 252), "yellow": (250, 214, 56)}

by_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: type(world).__name__)


def raster(box):
    return box[1], box[0]


def found_objects(image: Image.Image, size: int) -> list[tuple[list[int], str]]:
    """What an eye sees: every window, at steps of 7 px, that is filled by a square or a disc of one colour."""
    pixels = np.asarray(image).astype(int)
    across = np.arange(size) + 0.5 - size / 2
    distance = np.hypot(across[:, None], across[None, :])
    inside, outside = distance < size / 2 - 0.8, distance > size / 2 + 0.8
    found = []
    for colour, value in PURE.items():
        is_colour = (pixels == value).all(-1)
        for y in range(0, pixels.shape[0] - size + 1, 7):
            for x in range(0, pixels.shape[1] - size + 1, 7):
                window = is_colour[y : y + size, x : x + size]
                if window.all():
                    found.append(([x, y, x + size, y + size], f"{colour} square"))
                elif window[inside].all() and not window[outside].any():
                    found.append(([x, y, x + size, y + size], f"{colour} circle"))
    return sorted(found, key=lambda item: raster(item[0]))


def annotated(values: dict) -> list[tuple[list[int], str]]:
    if "objects" in values:
        return [(item["box"], item["label"]) for item in values["objects"]]
    if "question" in values:
        return [(values["box"], values["question"])]
    return [(box, values["label"]) for box in values["boxes"]]


@by_world
def test_a_scene_depends_on_world_seed_split_and_index_alone(world):
    first, second = SyntheticScenes(world, "train", 3, 50), SyntheticScenes(world, "train", 3, 1000)
    backwards = {index: second[index] for index in reversed(range(20))}
    for index in range(20):
        assert first[index].values == backwards[index].values
        assert first[index].image.tobytes() == backwards[index].image.tobytes()
    other_seed, other_split = SyntheticScenes(world, "train", 4, 50), SyntheticScenes(world, "val", 3, 20)
    assert first[0].image.tobytes() not in (other_seed[0].image.tobytes(), other_split[0].image.tobytes())


@by_world
def test_no_picture_is_in_two_splits_or_twice_in_a_held_out_one(world):
    sizes = {"train": 300, "val": 60, "test": 60}
    pictures = {
        split: [source[index].image.tobytes() for index in range(size)]
        for split, size in sizes.items()
        for source in [SyntheticScenes(world, split, 0, size)]
    }
    train, val, test = map(set, pictures.values())
    assert train.isdisjoint(val)
    assert train.isdisjoint(test)
    assert val.isdisjoint(test)
    assert (len(val), len(test)) == (60, 60)
    assert len(train) >= 298


def test_splits_stay_disjoint_and_unique_in_a_world_that_repeats_itself():
    """Without tint and noise there are few pictures, so only the split by hash keeps them apart."""
    world = DetectionWorld(tint=0, num_colours=2, max_objects=2)
    pictures = {}
    for split, size in {"train": 400, "val": 20, "test": 20}.items():
        source = SyntheticScenes(world, split, 0, size)
        pictures[split] = [source[index].image.tobytes() for index in range(size)]
    assert len(set(pictures["train"])) < 200
    assert set(pictures["train"]).isdisjoint(pictures["val"])
    assert set(pictures["train"]).isdisjoint(pictures["test"])
    assert len(set(pictures["val"])) == len(set(pictures["test"])) == 20


def test_a_world_with_too_few_pictures_is_an_error():
    with pytest.raises(ValueError, match="too few different images for 50 val scenes"):
        SyntheticScenes(DetectionWorld(tint=0, num_colours=1, max_objects=1), "val", 0, 50)


@pytest.mark.parametrize("world", SHAPE_WORLDS, ids=lambda world: type(world).__name__)
def test_annotations_say_what_the_picture_shows(world):
    rng = random.Random(1)
    for _ in range(150):
        scene = world.draw(rng)
        found, told = found_objects(scene.image, world.object_size), annotated(scene.values)
        if not isinstance(world, DetectionWorld):
            found = [item for item in found if item[1] == told[0][1]]
        assert found == told


def test_a_box_is_the_exact_extent_of_what_differs_from_the_background():
    world = CountingWorld(max_targets=1, max_distractors=0, tint=0)
    empty = np.asarray(DetectionWorld(tint=0, image_size=112, empty_share=1.0).draw(random.Random(0)).image)
    rng = random.Random(0)
    for _ in range(20):
        scene = world.draw(rng)
        y, x = np.nonzero((np.asarray(scene.image) != empty).any(-1))
        assert scene.values["boxes"] == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]


def test_counting_rows_agree_with_themselves_and_are_in_raster_order():
    rng, counts = random.Random(0), Counter()
    for _ in range(300):
        values = CountingWorld().draw(rng).values
        assert values["count"] == len(values["points"]) == len(values["boxes"])
        assert values["points"] == [[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in values["boxes"]]
        assert values["boxes"] == sorted(values["boxes"], key=raster)
        assert all(value % 28 == 0 for box in values["boxes"] for value in box)
        counts[values["count"]] += 1
    assert set(counts) == {1, 2, 3, 4, 5}


def test_objects_are_in_raster_order_and_empty_scenes_occur():
    rng, counts = random.Random(0), Counter()
    for _ in range(300):
        boxes = [item["box"] for item in DetectionWorld().draw(rng).values["objects"]]
        assert boxes == sorted(boxes, key=raster)
        counts[len(boxes)] += 1
    assert set(counts) == {0, 1, 2, 3}


def test_grounding_boxes_lie_on_the_grid_and_corners_are_multiples_of_125_thousandths():
    rng = random.Random(0)
    for _ in range(100):
        box = GroundingWorld().draw(rng).values["box"]
        assert all((1000 * value / 112) % 125 == 0 for value in box)


def test_objects_always_find_room_when_the_world_says_so():
    world = GroundingWorld(image_size=84, object_size=42, max_distractors=3)
    rng = random.Random(0)
    numbers = {len(found_objects(world.draw(rng).image, 42)) for _ in range(20)}
    assert numbers == {1, 2, 3, 4}
    full = CountingWorld(min_targets=16, max_targets=16, max_distractors=0)
    assert len(full.draw(rng).values["boxes"]) == 16


def test_the_background_tells_the_position_and_never_looks_like_an_object():
    rng = random.Random(0)
    for _ in range(50):
        pixels = np.asarray(DetectionWorld(empty_share=1.0, tint=8).draw(random.Random(rng.random())).image).astype(
            float
        )
        red, green = pixels[..., 0], pixels[..., 1]
        assert (np.diff(red[0, ::14]) > 5).all()
        assert (np.diff(green[::14, 0]) > 5).all()
        for colour in PURE.values():
            lab = rgb2lab(np.array(colour, float)[None, None] / 255)
            assert np.linalg.norm(rgb2lab(pixels / 255) - lab, axis=-1).min() > 25


def test_text_scenes_show_one_ink_blot_per_character():
    world = TextWorld(tint=0, noise=0)
    rng, lengths = random.Random(0), Counter()
    for _ in range(100):
        scene = world.draw(rng)
        text = scene.values["text"]
        grey = np.asarray(scene.image.convert("L")).astype(int)
        paper = grey.max()
        cells = [(grey[:, x : x + 14] < paper - 40).any() for x in range(0, 84, 14)]
        assert cells == [True] * len(text) + [False] * (6 - len(text))
        assert set(text) <= set(world.alphabet)
        lengths[len(text)] += 1
    assert set(lengths) == {3, 4, 5, 6}


def test_the_same_character_always_looks_the_same_and_different_ones_differ():
    world = TextWorld(min_chars=1, max_chars=1, tint=0, noise=0)
    shapes: dict[str, set[bytes]] = {}
    rng = random.Random(0)
    for _ in range(300):
        scene = world.draw(rng)
        grey = np.asarray(scene.image.convert("L")).astype(float)
        ink = np.round((grey.max() - grey) / (grey.max() - grey.min()) * 6)
        shapes.setdefault(scene.values["text"], set()).add((ink > 3).tobytes())
    assert set(shapes) == set(world.alphabet)
    assert len({min(variants) for variants in shapes.values()}) == len(world.alphabet)


def test_several_lines_are_joined_by_line_breaks():
    scene = TextWorld(num_lines=3).draw(random.Random(0))
    assert scene.image.size == (84, 84)
    assert scene.values["text"].count("\n") == 2


def test_fingerprint_names_every_setting():
    prints = [
        scene_fingerprint(DetectionWorld(), "val", 0, 5),
        scene_fingerprint(DetectionWorld(tint=9), "val", 0, 5),
        scene_fingerprint(CountingWorld(), "val", 0, 5),
        scene_fingerprint(DetectionWorld(), "test", 0, 5),
        scene_fingerprint(DetectionWorld(), "val", 1, 5),
        scene_fingerprint(DetectionWorld(), "val", 0, 6),
    ]
    assert len(set(prints)) == len(prints) == 6


@pytest.mark.parametrize(
    ("world", "change", "sentence"),
    [
        (GroundingWorld(), {"tint": 61}, "tint must be between 0 and 60, got 61"),
        (GroundingWorld(), {"object_size": 40}, r"object_size must be a multiple of grid \(14\), got 40"),
        (GroundingWorld(), {"max_distractors": 4}, "up to 5 objects of 42 px do not fit into 112 px"),
        (GroundingWorld(), {"num_colours": 1, "num_shapes": 1}, "distractors need a second kind of object"),
        (CountingWorld(), {"min_targets": 0}, "min_targets must be between 1"),
        (CountingWorld(), {"max_targets": 0}, "max_targets must be between 1"),
        (CountingWorld(), {"num_colours": 5}, "num_colours must be between 1 and 4, got 5"),
        (DetectionWorld(), {"max_objects": 10}, "which has room for 9"),
        (DetectionWorld(), {"empty_share": 1.5}, "empty_share must lie between 0 and 1, got 1.5"),
        (TextWorld(), {"alphabet": "ab c"}, "alphabet must be printable ASCII characters without spaces, got 'ab c'"),
        (TextWorld(), {"min_chars": 7}, "max_chars must be between 7"),
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
