"""Worlds: what can be in a synthetic image, drawn with exact annotations as rows of the project's own data format.

Objects sit on a grid, so their boxes are whole pixels that a patch-based model can name exactly. The background carries
the position (red grows to the right, green grows downwards) and differs a little from image to image.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from perception_r1.data.synthetic.render import COLOURS, SHAPES, background, glyph, grain, mask, tinted
from perception_r1.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One synthetic image with its annotation.

    Attributes:
        image: The image in RGB.
        values: The row in the task's own data format, without the image: boxes and points in pixels.
    """

    image: Image.Image
    values: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """What can be in an image.

    Attributes:
        tint: Largest random shift of the background colour from image to image, in steps of 0 to 255.
    """

    tint: int = 8

    def __post_init__(self) -> None:
        _check(self, tint=(0, 60))

    @property
    def labels(self) -> tuple[str, ...]:
        """Every name an object can have; none where objects have no names."""
        return ()

    @abstractmethod
    def draw(self, rng: random.Random) -> Scene:
        """One scene; all randomness comes from the generator."""


@dataclass(frozen=True, kw_only=True)
class ShapeWorld(World):
    """Coloured shapes of one size, which never overlap, on a grid.

    Attributes:
        image_size: Width and height of the image in pixels.
        grid: Every object's corner is a multiple of this many pixels.
        object_size: Width and height of an object in pixels, a multiple of the grid.
        num_colours: How many colours there are: red, green, blue, yellow, in this order.
        num_shapes: How many shapes there are: circle, square, in this order.
    """

    image_size: int = 112
    grid: int = 14
    object_size: int = 28
    num_colours: int = 3
    num_shapes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, image_size=(28, 4096), grid=(1, self.image_size), object_size=(4, self.image_size))
        _check(self, num_colours=(1, len(COLOURS)), num_shapes=(1, len(SHAPES)))
        if self.object_size % self.grid:
            raise UserError(f"object_size must be a multiple of grid ({self.grid}), got {self.object_size}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Every name an object can have, such as "red circle"."""
        colours, shapes = list(COLOURS)[: self.num_colours], SHAPES[: self.num_shapes]
        return tuple(f"{colour} {shape}" for colour in colours for shape in shapes)

    def _place(self, rng: random.Random, labels: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Labels with boxes in pixels, in raster order: top to bottom, then left to right."""
        size, corners = self.object_size, self._corners(rng, len(labels))
        objects = [(label, [x, y, x + size, y + size]) for label, (x, y) in zip(labels, corners, strict=True)]
        return sorted(objects, key=lambda item: (item[1][1], item[1][0]))

    def _corners(self, rng: random.Random, count: int) -> list[tuple[int, int]]:
        """Corners anywhere on the grid; on a tiling, which always has room, when the first corners block the rest."""
        size = self.object_size
        steps = range(0, self.image_size - size + 1, self.grid)
        free = [(x, y) for y in steps for x in steps]
        corners: list[tuple[int, int]] = []
        while free and len(corners) < count:
            x, y = rng.choice(free)
            corners.append((x, y))
            free = [(a, b) for a, b in free if abs(a - x) >= size or abs(b - y) >= size]
        if len(corners) == count:
            return corners
        tiles = range(0, self.image_size - size + 1, size)
        return rng.sample([(x, y) for y in tiles for x in tiles], count)

    def _paint(self, rng: random.Random, objects: Sequence[tuple[str, list[int]]]) -> Image.Image:
        image = background(rng, self.image_size, self.tint)
        for label, (x, y, _, _) in objects:
            colour, shape = label.split()
            image.paste(COLOURS[colour], (x, y), mask(shape, self.object_size))
        return image

    def _check_room(self, num_targets: int, num_distractors: int) -> None:
        if num_distractors and len(self.labels) < 2:
            raise UserError("distractors need a second kind of object: raise num_colours or num_shapes")
        count = num_targets + num_distractors
        capacity = (self.image_size // self.object_size) ** 2
        if count > capacity:
            raise UserError(
                f"up to {count} objects of {self.object_size} px do not fit into {self.image_size} px,"
                f" which has room for {capacity}: use a larger image_size or fewer objects"
            )


@dataclass(frozen=True, kw_only=True)
class GroundingWorld(ShapeWorld):
    """One object is asked for; the others, if any, are of other kinds.

    Attributes:
        max_distractors: Largest number of other objects.
    """

    object_size: int = 42
    num_shapes: int = 2
    max_distractors: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, max_distractors=(0, 100))
        self._check_room(1, self.max_distractors)

    def draw(self, rng: random.Random) -> Scene:
        """A row with question and box."""
        wanted, others = _draw_kinds(rng, self.labels, self.max_distractors)
        objects = self._place(rng, [wanted, *others])
        box = next(box for label, box in objects if label == wanted)
        return Scene(image=self._paint(rng, objects), values={"question": wanted, "box": box})


@dataclass(frozen=True, kw_only=True)
class CountingWorld(ShapeWorld):
    """Some objects of the kind that is asked for, among others.

    Attributes:
        min_targets: Smallest number of objects of the kind that is asked for.
        max_targets: Largest number of them.
        max_distractors: Largest number of other objects.
    """

    grid: int = 28
    min_targets: int = 1
    max_targets: int = 5
    max_distractors: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, min_targets=(1, 1000), max_targets=(self.min_targets, 1000), max_distractors=(0, 1000))
        self._check_room(self.max_targets, self.max_distractors)

    def draw(self, rng: random.Random) -> Scene:
        """A row with label, count, points and boxes."""
        wanted, others = _draw_kinds(rng, self.labels, self.max_distractors)
        count = rng.randint(self.min_targets, self.max_targets)
        objects = self._place(rng, [wanted] * count + others)
        boxes = [box for label, box in objects if label == wanted]
        points = [[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in boxes]
        values: dict[str, object] = {"label": wanted, "count": count, "points": points, "boxes": boxes}
        return Scene(image=self._paint(rng, objects), values=values)


@dataclass(frozen=True, kw_only=True)
class DetectionWorld(ShapeWorld):
    """Any objects; all of them are asked for.

    Attributes:
        empty_share: Share of the images without any object.
        max_objects: Largest number of objects.
    """

    image_size: int = 84
    grid: int = 28
    num_colours: int = 4
    empty_share: float = 0.1
    max_objects: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.empty_share <= 1:
            raise UserError(f"empty_share must lie between 0 and 1, got {self.empty_share}")
        _check(self, max_objects=(1, 1000))
        self._check_room(self.max_objects, 0)

    def draw(self, rng: random.Random) -> Scene:
        """A row with objects."""
        count = 0 if rng.random() < self.empty_share else rng.randint(1, self.max_objects)
        objects = self._place(rng, [rng.choice(self.labels) for _ in range(count)])
        values: dict[str, object] = {"objects": [{"box": box, "label": label} for label, box in objects]}
        return Scene(image=self._paint(rng, objects), values=values)


@dataclass(frozen=True, kw_only=True)
class TextWorld(World):
    """Lines of random characters, each in a cell of its own, on paper.

    Attributes:
        alphabet: The characters; the default leaves out those that are easily confused (O, Q, I, S, Z ...).
        min_chars: Fewest characters in a line.
        max_chars: Most characters in a line; it sets the width of the image.
        num_lines: Lines of text; it sets the height of the image.
        cell_width: Width of a character's cell in pixels.
        cell_height: Height of a character's cell in pixels.
        font_size: Size of the font in pixels.
        noise: Largest random shift of a single pixel, in steps of 0 to 255.
    """

    alphabet: str = "0123456789ABCDEFHKLMNPRT"
    min_chars: int = 3
    max_chars: int = 6
    num_lines: int = 1
    cell_width: int = 14
    cell_height: int = 28
    font_size: int = 20
    noise: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, min_chars=(1, 1000), max_chars=(self.min_chars, 1000), num_lines=(1, 1000), noise=(0, 60))
        _check(self, cell_width=(6, 256), cell_height=(6, 256), font_size=(6, self.cell_height))
        if not self.alphabet or not all("!" <= char <= "~" for char in self.alphabet):
            raise UserError(f"alphabet must be printable ASCII characters without spaces, got {self.alphabet!r}")

    def draw(self, rng: random.Random) -> Scene:
        """A row with text."""
        width, height = self.cell_width * self.max_chars, self.cell_height * self.num_lines
        paper, ink = rng.randint(192, 240), rng.randint(8, 80)
        image = Image.new("RGB", (width, height), tinted(rng, paper, self.tint))
        colour = tinted(rng, ink, self.tint)
        lines = []
        for row in range(self.num_lines):
            line = "".join(rng.choices(self.alphabet, k=rng.randint(self.min_chars, self.max_chars)))
            for column, char in enumerate(line):
                cell = glyph(char, self.font_size, self.cell_width, self.cell_height)
                image.paste(colour, (column * self.cell_width, row * self.cell_height), cell)
            lines.append(line)
        return Scene(image=grain(rng, image, self.noise), values={"text": "\n".join(lines)})


def _draw_kinds(rng: random.Random, labels: Sequence[str], max_distractors: int) -> tuple[str, list[str]]:
    """The label that is asked for and the labels of the distractors, which all differ from it."""
    wanted = rng.choice(labels)
    num_distractors = rng.randint(0, max_distractors)
    others = [label for label in labels if label != wanted]
    return wanted, [rng.choice(others) for _ in range(num_distractors)]


def _check(world: World, **ranges: tuple[int, int]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(world, name)
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, got {value}")
