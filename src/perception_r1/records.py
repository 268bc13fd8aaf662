"""The records that travel the road: samples, boxes, scores.

Inside the program every box is xyxy and every point xy, as fractions of the original image (0..1, origin top left).
Only a codec (`codecs.py`) knows how a model family writes them; only a row (`rows.py`) knows pixels. An area of an
outline, which no box gives, is in pixels squared of the original image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeAlias

from PIL import Image
from typing_extensions import TypeVar

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in fractions of the original image."""
Point = tuple[float, float]
"""x, y in fractions of the original image."""
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSize:
    """The two sizes of one image, in pixels: as stored, and as the model sees it after smart-resize."""

    width: int
    height: int
    resized_width: int
    resized_height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledBox:
    """One object: its name and its box in fractions of the original image."""

    label: str
    box: Box


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """What a data row tells about one object.

    Attributes:
        item: Its name and box.
        area: Area of its outline in pixels squared of the original image; None where the row does not tell.
        is_crowd: It is a region of many objects of this name.
    """

    item: LabelledBox
    area: float | None
    is_crowd: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlay:
    """Something to draw on an image: a box or a point (fractions of the original image), maybe with a caption."""

    shape: Box | Point
    caption: str = ""


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image file that lies in a table and not in a folder.

    Attributes:
        name: Tells the images of a data set apart; equal for rows of the same image.
        read: Its bytes.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageSource: TypeAlias = Path | ImageBytes
"""Where an image can be read from."""

TargetT = TypeVar("TargetT")
ImageT = TypeVar("ImageT", covariant=True, default=Image.Image | ImageSource)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(Generic[TargetT, ImageT]):
    """One image, one question about it, and the right answer.

    A `Sample[Target]` may be loaded or not; `load_sample_image` makes a `LoadedSample[Target]` of it.

    Attributes:
        id: Unique within its data source.
        image: The image in RGB, or what it is read from.
        width: Width of the original image in pixels.
        height: Height of the original image in pixels.
        query: What fills the slot of the task's prompt ("red cup"); empty when the prompt has none.
        target: The task's own target record.
        source: Name of its data source, where that has one.
        row: The data row that it was read from, without the image; what `Task.read_row` reads again.
    """

    id: str
    image: ImageT
    width: int
    height: int
    query: str
    target: TargetT
    source: str = ""
    row: Mapping[str, object] = field(default_factory=dict)


LoadedSample: TypeAlias = Sample[TargetT, Image.Image]
UnloadedSample: TypeAlias = Sample[TargetT, ImageSource]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a completion is worth.

    Attributes:
        reward: What GRPO maximises.
        components: The unweighted reward components by name.
        metrics: Evaluation metrics of this one sample by name (0/1 for an accuracy, a count for a number of errors).
        reward_terms: Weights and values whose weighted sum, once bounded, is the reward; none where it is no sum.
    """

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reward_terms: tuple[tuple[float, float], ...] = ()
