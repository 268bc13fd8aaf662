"""Worlds of coloured shapes, for grounding, counting and detection.

Objects lie at any pixel, in any size and aspect, on textured backgrounds, and may hide parts of each other. Boxes are
their full extents. Annotations come in no order, as people give them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perception_r1.data.synthetic.phrases import refer
from perception_r1.data.synthetic.render import (
    COLOURS,
    SHAPES,
    Canvas,
    background,
    paint,
    shape_mask,
    to_image,
)
from perception_r1.data.synthetic.worlds import Owner, Scene, Thing, World, check_ranges
from perception_r1.errors import UserError

Kind = tuple[str, str]
"""Colour and shape."""

_TRIES = 30
"""Places that are tried for an object before it is made smaller."""
_SHRINK = 0.85


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Objects in an image, before anything is asked.

    Attributes:
        things: Those that found room, in the order in which they were wished for.
        owner: Which of them is seen where.
        canvas: What was drawn.
    """

    things: tuple[Thing, ...]
    owner: Owner
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class ShapeWorld(World):
    """Coloured shapes on a textured background.

    Attributes:
        image_size: Width and height of the image in pixels.
        min_size: Shorter side of the smallest object in pixels.
        max_size: Longer side of the largest object in pixels.
        max_aspect: Longest side of an object over its shortest.
        min_visible: Share of every object that is seen at least, whatever hides the rest.
        contrast: Largest deviation of the background's texture, in steps of 0 to 255.
    """

    image_size: int = 140
    min_size: int = 16
    max_size: int = 56
    max_aspect: float = 1.6
    min_visible: float = 0.7
    contrast: float = 22.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, image_size=(28, 4096), min_size=(6, self.image_size), max_aspect=(1, 4))
        check_ranges(self, max_size=(self.min_size, self.image_size), min_visible=(0.3, 1), contrast=(0, 60))

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of every shape."""
        return SHAPES

    def background(self, rng: random.Random) -> Canvas:
        """What the objects are drawn on."""
        return background(rng, self.image_size, self.image_size, self.contrast)

    def place(self, rng: random.Random, kinds: Sequence[Kind]) -> Placed:
        """Draw objects one over the other; one that finds no room, however small, is left out."""
        size = self.image_size
        canvas = self.background(rng)
        owner: Owner = np.full((size, size), -1, np.int16)
        things: list[Thing] = []
        areas: list[int] = []  # pixels of each, hidden or not
        # the more there are, the smaller the largest
        largest = max(self.min_size, min(self.max_size, int(size / math.sqrt(max(1, len(kinds))) * 0.95)))
        for colour, shape in kinds:
            longer, aspect = self.pick(rng, largest, self.min_size), self.max_aspect ** rng.random()
            while (found := self._find_room(rng, shape, longer, aspect, owner, areas)) is None:
                if longer == self.min_size:
                    break
                longer = max(self.min_size, int(longer * _SHRINK))
            if found is None:
                continue
            x, y, width, height = found
            mask = shape_mask(shape, width, height)
            paint(rng, canvas, shape, colour, (x, y), mask)
            owner[y : y + height, x : x + width][mask >= 0.5] = len(things)
            things.append(Thing(name=shape, colour=colour, box=(x, y, x + width, y + height)))
            areas.append(int((mask >= 0.5).sum()))
        return Placed(things=tuple(things), owner=owner, canvas=canvas)

    def _find_room(
        self, rng: random.Random, shape: str, longer: int, aspect: float, owner: Owner, areas: Sequence[int]
    ) -> tuple[int, int, int, int] | None:
        """x, y, width and height of a place where enough of all others stays visible."""
        shorter = max(self.min_size, round(longer / aspect))
        width, height = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
        solid = shape_mask(shape, width, height) >= 0.5
        for _ in range(_TRIES):
            x, y = rng.randint(0, self.image_size - width), rng.randint(0, self.image_size - height)
            hidden = owner[y : y + height, x : x + width][solid]
            if (hidden < 0).all():
                return x, y, width, height
            for index in set(hidden[hidden >= 0].tolist()):
                seen = int((owner == index).sum()) - int((hidden == index).sum())
                if seen < self.min_visible * areas[index]:
                    break
            else:
                return x, y, width, height
        return None

    def scene(self, placed: Placed, values: dict[str, object]) -> Scene:
        """A finished scene."""
        return Scene(image=to_image(placed.canvas), values=values, things=placed.things, owner=placed.owner)


@dataclass(frozen=True, kw_only=True)
class GroundingWorld(ShapeWorld):
    """One object is asked for, by what tells it from the others: colour, shape, size, place, or a neighbour.

    Attributes:
        min_distractors: Fewest other objects.
        max_distractors: Most other objects, many of them alike in colour, shape or both.
    """

    min_distractors: int = 0
    max_distractors: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, min_distractors=(0, 100), max_distractors=(self.min_distractors, 100))

    def draw(self, rng: random.Random) -> Scene:
        """A row with question and box."""
        while True:  # until the object has a name of its own, which nearly every scene offers
            wanted = random_kind(rng)
            others = [_alike(rng, wanted) for _ in range(self.pick(rng, self.min_distractors, self.max_distractors))]
            kinds = [wanted, *others]
            rng.shuffle(kinds)
            placed = self.place(rng, kinds)
            targets = [thing for thing in placed.things if (thing.colour, thing.name) == wanted]
            for target in rng.sample(targets, len(targets)):
                if (values := self.ask(rng, target, placed.things)) is not None:
                    return self.scene(placed, values)

    def ask(self, rng: random.Random, target: Thing, things: Sequence[Thing]) -> dict[str, object] | None:
        """The row of a question about one of these things; None where no phrase tells it from the others."""
        phrases = refer(target, things, side=self.image_size)
        if not phrases:
            return None
        return {"question": phrases[self.pick(rng, 0, len(phrases) - 1)], "box": list(target.box)}


@dataclass(frozen=True, kw_only=True)
class CountingWorld(ShapeWorld):
    """Some objects of the kind that is asked for, among others that are alike.

    Attributes:
        empty_share: Share of the images without any object of the kind that is asked for.
        min_targets: Fewest objects of that kind in the others.
        max_targets: Most of them.
        min_distractors: Fewest other objects.
        max_distractors: Most other objects.
    """

    max_size: int = 44
    empty_share: float = 0.05
    min_targets: int = 1
    max_targets: int = 12
    min_distractors: int = 0
    max_distractors: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, empty_share=(0, 1), min_targets=(1, 1000), max_targets=(self.min_targets, 1000))
        check_ranges(self, min_distractors=(0, 1000), max_distractors=(self.min_distractors, 1000))
        room = (self.image_size // self.min_size) ** 2
        if self.max_targets + self.max_distractors > room:
            raise UserError(
                f"up to {self.max_targets + self.max_distractors} objects of {self.min_size} px do not fit into"
                f" {self.image_size} px, which has room for {room}: use a larger image_size or fewer objects"
            )

    def draw(self, rng: random.Random) -> Scene:
        """A row with label, count, points and boxes; the label is a shape, with its colour or without."""
        wanted, is_coloured = random_kind(rng), rng.random() < 0.5
        count = 0 if rng.random() < self.empty_share else self.pick(rng, self.min_targets, self.max_targets)
        kinds = [(wanted[0] if is_coloured else rng.choice(list(COLOURS)), wanted[1]) for _ in range(count)]
        while len(kinds) < count + self.pick(rng, self.min_distractors, self.max_distractors):
            other = _alike(rng, wanted)
            if other[1] != wanted[1] or (is_coloured and other != wanted):
                kinds.append(other)
        rng.shuffle(kinds)
        placed = self.place(rng, kinds)
        label = f"{wanted[0]} {wanted[1]}" if is_coloured else wanted[1]
        return self.scene(placed, count_objects(placed.things, label))


@dataclass(frozen=True, kw_only=True)
class DetectionWorld(ShapeWorld):
    """Any objects; all of them are asked for, by their shapes.

    Attributes:
        empty_share: Share of the images without any object.
        min_objects: Fewest objects in the others.
        max_objects: Most objects.
    """

    empty_share: float = 0.05
    min_objects: int = 1
    max_objects: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, empty_share=(0, 1), min_objects=(1, 1000), max_objects=(self.min_objects, 1000))

    def draw(self, rng: random.Random) -> Scene:
        """A row with objects."""
        count = 0 if rng.random() < self.empty_share else self.pick(rng, self.min_objects, self.max_objects)
        placed = self.place(rng, [random_kind(rng) for _ in range(count)])
        return self.scene(placed, detect_objects(placed.things))


def random_kind(rng: random.Random) -> Kind:
    """Any colour and shape."""
    return rng.choice(list(COLOURS)), rng.choice(SHAPES)


def count_objects(things: Sequence[Thing], label: str) -> dict[str, object]:
    """The row of a counting question: objects whose shape, or colour and shape, is the label."""
    boxes = [list(thing.box) for thing in things if thing.is_called(label)]
    points = [[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in boxes]
    return {"label": label, "count": len(boxes), "points": points, "boxes": boxes}


def detect_objects(things: Sequence[Thing]) -> dict[str, object]:
    """The row of a detection question."""
    return {"objects": [{"box": list(thing.box), "label": thing.name} for thing in things]}


def _alike(rng: random.Random, kind: Kind) -> Kind:
    """A kind that is often the same in colour, in shape, or in both."""
    other = random_kind(rng)
    keeps = rng.choice(("both", "colour", "shape", "nothing"))
    return (
        kind[0] if keeps in ("both", "colour") else other[0],
        kind[1] if keeps in ("both", "shape") else other[1],
    )
