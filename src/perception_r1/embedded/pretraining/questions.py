"""What the embedded model is pretrained on: synthetic scenes, each with several questions of all tasks, and pages.

Scene k is the same in every run and on any number of processes. It is drawn from the training share of its world, so
no held-out image is ever seen. Most are as a world draws them by itself; `is_mixed` makes a third of them harder.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

from perception_r1.codecs import Codec
from perception_r1.data.synthetic.objects import (
    CountingWorld,
    DetectionWorld,
    GroundingWorld,
    ShapeWorld,
    count_objects,
    detect_objects,
    random_kind,
)
from perception_r1.data.synthetic.pages import TextWorld
from perception_r1.data.synthetic.scenes import SyntheticScenes
from perception_r1.data.synthetic.worlds import Scene, Thing, World
from perception_r1.records import ImageSize, Sample
from perception_r1.rows import Row
from perception_r1.task import THINK_REQUEST, Task
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr

NUM_QUESTIONS = 4
"""Questions about a scene of objects; a page has one."""
MIXED_SKEWS = (2.0, 2.0, 0.7)
"""Of mixed scenes, two thirds are as a world draws them by itself, and one third is harder."""
SHAPE_WORLDS: tuple[ShapeWorld, ...] = (GroundingWorld(), CountingWorld(), DetectionWorld())
PAGES = TextWorld()
_SEED = 20_26
"""Of all scenes; runs of the tasks use small seeds."""
_ABSENT_SHARE = 0.05
"""Questions for a kind of object that may not be there."""

_THINK_SHARE = 0.05
"""Images whose questions ask for thoughts before the answer; the ideal ones are empty."""

GROUNDING, COUNTING, DETECTION, OCR = Grounding(), Counting(), Detection(categories=DetectionWorld().labels), Ocr()


_Asked: TypeAlias = tuple[Task[Any, Any], dict[str, object], Sequence[int]]
"""A task, the row of a question, and the things that the answer lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt about an image, with its ideal answer.

    Attributes:
        things: Numbers of the scene's things that the answer lists, in its order: objects, or characters.
    """

    task: str
    prompt: str
    answer: str
    things: tuple[int, ...]


def shape_scene(index: int, codec: Codec, *, is_mixed: bool = False) -> tuple[Scene, list[Question]]:
    """Scene number `index` with its questions: one of detection, one or more of counting, the others of grounding."""
    rng = random.Random(f"{_SEED} {index}")
    scene = _scenes(rng.choice(SHAPE_WORLDS), _skew(rng, is_mixed))[index]
    numbers = range(len(scene.things))
    asked: list[_Asked] = [(DETECTION, detect_objects(scene.things), numbers)]
    for number in rng.sample(numbers, len(numbers)):
        values = SHAPE_WORLDS[0].ask(rng, scene.things[number], scene.things)  # type: ignore[attr-defined]
        if values is not None and len(asked) < NUM_QUESTIONS - 1:
            asked.append((GROUNDING, values, [number]))
    while len(asked) < NUM_QUESTIONS:
        label = _label(rng, scene.things)
        counted = [number for number in numbers if scene.things[number].is_called(label)]
        asked.append((COUNTING, count_objects(scene.things, label), counted))
    return scene, [_question(scene, each, codec) for each in _with_thoughts(rng, asked)]


def page(index: int, codec: Codec, *, is_mixed: bool = False) -> tuple[Scene, list[Question]]:
    """Page number `index` with its question."""
    rng = random.Random(f"{_SEED} {index}")
    scene = _scenes(PAGES, _skew(rng, is_mixed))[index]
    asked: list[_Asked] = [(OCR, scene.values, range(len(scene.things)))]
    return scene, [_question(scene, each, codec) for each in _with_thoughts(rng, asked)]


def corpus() -> list[str]:
    """What the tokenizer learns its merges from: prompts and names, as often as they matter."""
    texts = [DETECTION.prompt(""), OCR.prompt(""), THINK_REQUEST, "<think></think><answer>", "</answer>", "),("] * 8
    for index in range(400):
        rng = random.Random(f"{_SEED} {index}")
        colour, shape = random_kind(rng)
        texts += [COUNTING.prompt(f"{colour} {shape}"), f"{colour} {shape}", shape]
        scene = SHAPE_WORLDS[0].draw(rng)
        texts.append(GROUNDING.prompt(str(scene.values["question"])))
    return texts


def _with_thoughts(rng: random.Random, asked: Sequence[_Asked]) -> Sequence[_Asked]:
    """The same questions, now and then with the request to think first."""
    if rng.random() >= _THINK_SHARE:
        return asked
    return [(replace(task, think=True), values, things) for task, values, things in asked]


def _label(rng: random.Random, things: Sequence[Thing]) -> str:
    """A kind to count: a shape, with its colour or without, nearly always one that is there."""
    colour, shape = random_kind(rng)
    if things and rng.random() >= _ABSENT_SHARE:
        thing = rng.choice(things)
        colour, shape = thing.colour, thing.name
    return f"{colour} {shape}" if rng.random() < 0.5 else shape


def _question(scene: Scene, asked: _Asked, codec: Codec) -> Question:
    task, values, things = asked
    width, height = scene.image.size
    query, target = task.read_row(Row(values, width=width, height=height))
    sample = Sample(id="", image=scene.image, width=width, height=height, query=query, target=target)
    size = ImageSize(width=width, height=height, resized_width=width, resized_height=height)
    prompt = task.messages(sample)[0]["content"][1]["text"]
    answer = task.target_text(sample, codec, size)
    return Question(task=task.name, prompt=prompt, answer=answer, things=tuple(things))


def _skew(rng: random.Random, is_mixed: bool) -> float:
    skew = rng.choice(MIXED_SKEWS)
    return skew if is_mixed else World.skew


@cache
def _scenes(world: World, skew: float) -> SyntheticScenes:
    return SyntheticScenes(replace(world, skew=skew), "train", _SEED, 2**40)
