"""How each model family writes boxes: the only place that knows."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from perception_r1.task import Box, Frame, LabelledBox

MAX_OBJECTS = 512
"""Most objects that are read from one answer; COCO's fullest image has 93. A longer list is no answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedItem:
    """One entry of an answer as it was read; None stands for a part that is missing or invalid."""

    label: str | None
    box: Box | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The objects that an answer lists.

    Attributes:
        items: Every entry found, in order, valid or not.
        is_exact: The whole text is a list in the codec's form, nothing before, between or after it.
    """

    items: tuple[ListedItem, ...]
    is_exact: bool


class Codec(ABC):
    """Writes and reads labelled boxes as one model family does."""

    name: ClassVar[str]

    @abstractmethod
    def write(self, objects: Sequence[LabelledBox], frame: Frame) -> str:
        """Text for a list of objects."""

    @abstractmethod
    def read(self, text: str, frame: Frame) -> Listing:
        """Objects found in any text whatever; never raises."""
