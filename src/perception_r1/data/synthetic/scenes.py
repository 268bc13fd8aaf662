"""A synthetic data set: scenes of a world, each drawn when it is asked for, in splits that share no image.

Scene `i` of a split depends on nothing but (world, seed, split, i). A hash of its pixels decides to which split a
image belongs, so that no held-out image equals a training image.
"""

import hashlib
import json
import random
from dataclasses import asdict
from typing import get_args

from perception_r1.data.synthetic.worlds import Scene, World
from perception_r1.errors import UserError
from perception_r1.records import Split

_NUM_SHARES = 8
"""The pixel hash cuts all scenes into this many equal shares: one for val, one for test, the others for train."""
_MAX_DRAWS = 2000
"""Draws before a split of a world counts as exhausted; a scene is in a held-out split with probability 1/8."""


class SyntheticScenes:
    """A split of a world as a sequence of scenes, each drawn when it is asked for.

    A scene is drawn again until the hash of its pixels falls into the split's share, so no image of one split equals
    an image of another. Within val and test every image occurs once; building the source makes sure of it.

    Raises:
        UserError: The world has too few different scenes for the split, or an argument is out of range.
    """

    def __init__(self, world: World, split: Split, seed: int, size: int) -> None:
        if split not in get_args(Split):
            raise UserError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        if size < 1:
            raise UserError(f"a split needs at least 1 scene, got {size}")
        self.world, self.split, self.seed, self.size = world, split, seed, size
        self._settings = _settings(world, split, seed)
        seen: set[bytes] = set()
        # for every index, the number of the draw that is in the split and shows a new image
        self._draws = None if split == "train" else [self._next(index, seen)[0] for index in range(size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        if self._draws is not None:
            return self._draw(index, self._draws[index])
        return self._next(index, set())[1]

    def _next(self, index: int, seen: set[bytes]) -> tuple[int, Scene]:
        """The first draw of a scene that is in the split and not among those seen; adds it to them."""
        for draw in range(_MAX_DRAWS):
            scene = self._draw(index, draw)
            digest = _digest(scene.image.tobytes())
            split = {0: "val", 1: "test"}.get(digest[0] % _NUM_SHARES, "train")
            if split == self.split and digest not in seen:
                seen.add(digest)
                return draw, scene
        raise UserError(
            f"{type(self.world).__name__} has too few different images for {self.size} {self.split} scenes (stuck at"
            f" number {index}): ask for fewer or give it more variety (more objects, a larger image ...)"
        )

    def _draw(self, index: int, draw: int) -> Scene:
        seed = int.from_bytes(_digest(f"{self._settings} {index} {draw}".encode()), "big")
        return self.world.draw(random.Random(seed))


def scene_fingerprint(world: World, split: Split, seed: int, size: int) -> str:
    """A hex digest of everything that determines the scenes, which need not be built for it."""
    return _digest(f"{_settings(world, split, seed)} {size}".encode()).hex()


def _settings(world: World, split: Split, seed: int) -> str:
    return json.dumps([type(world).__name__, asdict(world), split, seed])


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
