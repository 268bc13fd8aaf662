"""Hostile answers, and what becomes of them on the road that training and evaluation take from a text to a score.

Answers are right ones and worked examples with damage, pieces of the grammars in any order, lists of odd boxes in any
family's form, and single pieces over and over up to the longest text that is read.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from campaigns.mutations import damaged_text
from perception_r1.codecs import Codec
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, UnloadedSample
from perception_r1.rewards import RowScorer
from perception_r1.scoring import (
    ParsedCompletion,
    parse_completions,
    prefix_rewards,
    score_as_published,
    score_completions,
)
from perception_r1.task import MAX_TEXT, Task
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
TASKS: tuple[Task[Any, Any], ...] = (
    *(Grounding(), Grounding(reward="thresholds"), Grounding(reward="giou"), Grounding(think=True, iou_threshold=0.75)),
    *(Counting(), Counting(reward="mean_f1", beta=2.0), Counting(matching="sequential"), Counting(think=True)),
    *(Detection(), Detection(matching="sequential"), Detection(reward="mean_f1"), Detection(think=True)),
    *(Detection(published_boxes="resized"), Ocr(), Ocr(reward="lines"), Ocr(reward="unit_tests"), Ocr(think=True)),
)
"""Every task with its options that read or score otherwise."""
KINDS = tuple((task, codec) for task in TASKS for codec in CODECS.values())
PIECES = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|im_end|>", "<|endoftext|>"),
    *("<think>", "</think>", "<answer>", "</answer>", "</think><answer>", "```json", "```", "<|", "dog", "person"),
    *("(1,2),(300,400)", "(1,2)", "[1, 2, 300, 400]", "(", ")", ",", " ", "\n", ".", "-", "1", "1000", "9" * 50, "1.5"),
    *("1e999", "NaN", "-Infinity", "[", "]", "{", "}", ":", '"', "\\", '"label"', '"bbox_2d"', '"label": "dog"'),
    *("<|object_ref_start|>dog<|object_ref_end|>", "<|box_start|>(1,2),(300,400)<|box_end|>", "null", "true", "None"),
    *('{"bbox_2d": [1, 2, 300, 400], "label": "dog"}, ', '{"bbox_2d": [1, 2, NaN, 1e999], "label": "\\ud800"}'),
    *("\u0661\u0662", "\x00", "\u200b", "\u2028", "\ud800", "\U0001f600", "__import__('os')", "'", "lambda:0", "[]"),
    *("0x10", "1_0", "j", "[[[["),
)
"""What the grammars are made of."""
_NUMBERS = ("0", "1", "999", "1000", "1001", "-1", "1e3", "0.5", "NaN", "1e999", '"1"', "null", "true", "9" * 30, "01")
_LABELS = ("dog", "person", "", " ", "the red cup", "birds", "\\ud800", "<|box_start|>", "a" * 300, "\u0661", "dog\n")
_FULL = {"grounding": 2.0, "detection": 3.0}
_LONG_SHARE = 0.01
"""Texts as long as is read."""
_ROUNDING = 1e-9
_NUM_REPEATS = 5
"""Measurements of what seems slow: the least counts, for others are those of a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The text that took longest.

    Attributes:
        milliseconds: CPU time, the least of several measurements.
        what: Task, options and codec.
        text: Its beginning, and its length.
    """

    milliseconds: float = 0.0
    what: str = ""
    text: str = ""


@dataclass(kw_only=True)
class Scored:
    """What came of many answers.

    Attributes:
        num_valid: Of them, those in which something was read.
        slowest: Of reading and scoring, in both ways of reading.
        slowest_parts: Of scoring an answer after each of its boxes.
        faults: What went wrong.
    """

    num_valid: int
    slowest: Slowest
    slowest_parts: Slowest
    faults: list[str]


def score_many(draw: random.Random, kind: int, count: int) -> Scored:
    """Make hostile answers to one task in one form, and score them."""
    task, codec = KINDS[kind % len(KINDS)]
    samples, golden = _samples(task, codec)
    right = tuple(task.target_text(sample, codec, size) for sample, size in samples)
    found = Scored(num_valid=0, slowest=Slowest(), slowest_parts=Slowest(), faults=[])
    for _ in range(count):
        index = draw.randrange(len(samples))
        text = hostile_answer(draw, right[index], golden)
        try:
            found.num_valid += _try(task, codec, *samples[index], text, found)
        except Exception as error:
            found.faults.append(f"{name_of(task, codec)}: {type(error).__name__}: {error} for {_short(text)}")
    return found


def hostile_answer(draw: random.Random, right: str, golden: tuple[str, ...]) -> str:
    """Any text that a model might write."""
    if draw.random() < _LONG_SHARE:
        return _long(draw)
    kind = draw.randrange(4)
    if kind == 0:
        return damaged_text(right, draw, PIECES, golden)
    if kind == 1:
        return damaged_text(draw.choice(golden), draw, PIECES, golden)
    if kind == 2:
        return "".join(draw.choices(PIECES, k=draw.randrange(25)))
    return damaged_text(_boxes(draw), draw, PIECES)


def name_of(task: Task[Any, Any], codec: Codec) -> str:
    """Task, the options that are not its own, and codec."""
    plain = type(task)()
    options = [f"{key} {value}" for key, value in vars(task).items() if value != getattr(plain, key)]
    return ", ".join([task.name, *options, codec.name])


def _try(
    task: Task[Any, Any], codec: Codec, sample: UnloadedSample[Any], size: ImageSize, text: str, found: Scored
) -> bool:
    """Take one answer along the road; whether something was read in it."""

    def score() -> list[Any]:
        parsed = parse_completions(task, codec, samples=[sample], image_sizes=[size], completions=[text])
        scored = score_completions(task, parsed, is_evaluation=True)
        return scored + score_as_published(task, codec, scored)

    both, seconds = _timed(score, found.slowest.milliseconds)
    if seconds * 1000 > found.slowest.milliseconds:
        found.slowest = Slowest(milliseconds=seconds * 1000, what=name_of(task, codec), text=_short(text))
    for scored in both:
        _check(task, scored.score)
        json.dumps(task.serialize_prediction(scored.prediction, size), allow_nan=False)
    parsed: ParsedCompletion = both[0]
    rewards, seconds = _timed(lambda: prefix_rewards(task, codec, parsed), found.slowest_parts.milliseconds)
    if seconds * 1000 > found.slowest_parts.milliseconds:
        found.slowest_parts = Slowest(milliseconds=seconds * 1000, what=name_of(task, codec), text=_short(text))
    ends = [end for end, _ in rewards]
    if ends != sorted(ends) or not all(isfinite(reward) for _, reward in rewards):
        raise AssertionError("the rewards of the parts are out of order or not finite")
    return parsed.prediction is not None


def _check(task: Task[Any, Any], score: Any) -> None:
    full = _FULL.get(task.name, 1.0) if getattr(task, "reward", "") == "perception_r1" else 1.0
    if not -_ROUNDING <= score.reward <= full + _ROUNDING:
        raise AssertionError(f"the reward is {score.reward}, outside of 0..{full}")
    for name, value in score.components.items():
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            raise AssertionError(f"{name} is {value}, outside of 0..1")
    if not all(isfinite(value) for value in score.metrics.values()):
        raise AssertionError(f"a metric is not finite: {score.metrics}")


def _timed(function: Any, known: float) -> tuple[Any, float]:
    """A result and the CPU seconds that it takes; measured again where it seems to be slower than what is known."""
    started = time.process_time()
    result = function()
    seconds = time.process_time() - started
    if seconds * 1000 > known:
        for _ in range(_NUM_REPEATS):
            started = time.process_time()
            function()
            seconds = min(seconds, time.process_time() - started)
    return result, seconds


def _samples(
    task: Task[Any, Any], codec: Codec
) -> tuple[Sequence[tuple[UnloadedSample[Any], ImageSize]], tuple[str, ...]]:
    """The worked examples of a task, and the completions of all tasks."""
    scorer = RowScorer(task, codec)
    names = ("grounding", "counting", "detection", "ocr")
    lines = {name: (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in names}
    samples = [scorer.read(json.loads(line)) for line in lines[task.name]]
    return samples, tuple(json.loads(line)["completion"] for name in names for line in lines[name])


def _boxes(draw: random.Random) -> str:
    """A list of boxes in a family's form, with odd numbers and labels; now and then more than are read."""
    count = draw.choice((0, 1, 1, 2, 3, 8, 40)) if draw.random() < 0.98 else draw.choice((200, 512, 513, 800))
    odd = draw.random() < 0.5

    def number() -> str:
        return draw.choice(_NUMBERS) if odd and draw.random() < 0.2 else str(draw.randrange(1001))

    label = draw.choice(_LABELS)
    if draw.random() < 0.5:
        box = (f"<|box_start|>({number()},{number()}),({number()},{number()})<|box_end|>" for _ in range(count))
        return f"<|object_ref_start|>{label}<|object_ref_end|>" + "".join(box)
    items = (f'{{"bbox_2d": [{", ".join(number() for _ in range(4))}], "label": "{label}"}}' for _ in range(count))
    return f"[{', '.join(items)}]"


def _long(draw: random.Random) -> str:
    """A piece, or a few, over and over, with a beginning and an end."""
    piece = "".join(draw.choices(PIECES, k=draw.choice((1, 1, 2, 4)))) or " "
    start, end = (draw.choice(("", *PIECES)) for _ in range(2))
    size = draw.choice((MAX_TEXT, MAX_TEXT, MAX_TEXT + 1, draw.randrange(1, MAX_TEXT)))
    room = max(0, size - len(start) - len(end))
    return start + (piece * (room // len(piece) + 1))[:room] + end


def _short(text: str) -> str:
    return f"{text[:120]!r} of {len(text)} characters"
