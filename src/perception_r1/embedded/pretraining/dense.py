"""Dense supervision of vision: what is at every point of an image, told by the language model's own early states.

Answers alone teach a tower from nothing slowly: a scene gives some hundred tokens, most of them form. Here every point
of a fine grid over the image is asked for the thing that is seen there: its name, its colour and its full box. A linear
head reads this off the states of the image tokens behind an early layer of the language model, so that all later ones
find it there. The head is thrown away after pretraining.

Legend: F image tokens, S points of an image token, C names, K colours.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_r1.data.synthetic.pages import CHARACTERS
from perception_r1.data.synthetic.render import COLOURS, SHAPES
from perception_r1.data.synthetic.worlds import Owner, Scene

TOKEN_SIZE = 28
"""Pixels of an image token, across and down."""
_STEP = 7
"""Pixels between points."""
_POINTS = (TOKEN_SIZE // _STEP) ** 2
_NAMES = {name: number for number, name in enumerate((*SHAPES, *CHARACTERS), 1)}  # 0: background
_COLOURS = {"": 0} | {name: number for number, name in enumerate(COLOURS, 1)}
_BOX_WEIGHT = 10.0
"""Makes a distance of a tenth of the image cost as much as one nat."""


class DenseHead(nn.Module):
    """Names, colours and boxes at the points of image tokens, from their states."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.names = nn.Linear(hidden_size, _POINTS * (len(_NAMES) + 1))
        self.colours = nn.Linear(hidden_size, _POINTS * len(_COLOURS))
        self.boxes = nn.Linear(hidden_size, _POINTS * 4)

    def forward(self, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses by name: sums over all points, or over those on a thing.

        Args:
            states: [F, H] of all image tokens.
            targets: [F, S, 6] of `dense_targets`.
        """
        states, targets = self.norm(states), targets.flatten(0, 1)  # [F*S, 6]
        names = self.names(states).view(len(targets), -1)
        is_thing = targets[:, 0] > 0
        chosen = targets[is_thing]
        colours = self.colours(states).view(len(targets), -1)[is_thing]
        boxes = self.boxes(states).view(len(targets), 4)[is_thing]
        return {
            "name": F.cross_entropy(names, targets[:, 0].long(), reduction="sum"),
            "colour": F.cross_entropy(colours, chosen[:, 1].long(), reduction="sum"),
            "box": _BOX_WEIGHT * (boxes - chosen[:, 2:]).abs().mean(-1).sum(),
        }


def dense_targets(scenes: Sequence[Scene]) -> Tensor:
    """[F, S, 6] name, colour and x1, y1, x2, y2 in fractions of the image at each point; image after image."""
    return torch.from_numpy(np.concatenate([_of_scene(scene) for scene in scenes]))


def owners(scene: Scene) -> Owner:
    """[F, S] number of the thing that is seen at each point, -1 for the background."""
    height, width = scene.owner.shape
    rows, columns = height // TOKEN_SIZE, width // TOKEN_SIZE
    at_points = scene.owner[_STEP // 2 :: _STEP, _STEP // 2 :: _STEP]  # [rows * side, columns * side]
    side = TOKEN_SIZE // _STEP
    return at_points.reshape(rows, side, columns, side).transpose(0, 2, 1, 3).reshape(rows * columns, -1)


def _of_scene(scene: Scene) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    height, width = scene.owner.shape
    table = np.zeros((len(scene.things) + 1, 6), np.float32)  # the last one is the background
    for number, thing in enumerate(scene.things):
        x1, y1, x2, y2 = thing.box
        table[number] = _NAMES[thing.name], _COLOURS[thing.colour], x1 / width, y1 / height, x2 / width, y2 / height
    return table[owners(scene)]
