"""Answers that earn more than better ones: a search, for every task and reward.

    python benchmarks/red_team.py

An answer is better than another if no metric of it is worse and one is better. The metrics are those that a table of
results would show: of boxes F1 at each of COCO's thresholds, from 0.5 to 0.95, with the best matching at each; of
counts whether they are right and how far off; of a single box IoU and accuracies; of texts similarity, words and exact
matches. For each scene there are honest answers, which are the right one with errors of all sizes: sides that are off,
objects that are missing, there twice, false or wrongly named. From many starts an answer is changed step by step
so that it earns ever more beside the honest answers that are better. What is reported is the worst gap that was found,
as a share of full marks, and the answer that made it; a search can miss a worse one, so it is a lower bound.

Writes benchmarks/results/red_team.json and the table of docs/tasks.md.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from pages import fill, table
from rapidfuzz.distance import Levenshtein

from perception_r1.geometry import IOU_THRESHOLDS, best_share, fbeta, iou, iou_matrix
from perception_r1.records import Box, LabelledBox
from perception_r1.task import Task
from perception_r1.tasks.counting import Counting, CountingPrediction, CountingTarget
from perception_r1.tasks.detection import Detection, DetectionPrediction, DetectionTarget
from perception_r1.tasks.grounding import Grounding, GroundingPrediction, GroundingTarget
from perception_r1.tasks.ocr import Ocr, OcrTarget

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "red_team.json"
PAGE = ROOT / "docs" / "tasks.md"
NAMES = ("cat", "cup", "dog")
WORDS = ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "far", "away"]
TASKS: dict[str, list[Task[Any, Any]]] = {
    "grounding": [
        Grounding(),
        Grounding(iou_threshold=0.75),
        Grounding(reward="thresholds"),
        Grounding(reward="giou"),
    ],
    "counting": [Counting(), Counting(reward="mean_f1"), Counting(reward="mean_f1", beta=2.0)],
    "detection": [
        Detection(categories=NAMES),
        Detection(categories=NAMES, iou_threshold=0.75),
        Detection(categories=NAMES, reward="mean_f1"),
        Detection(categories=NAMES, reward="mean_f1", beta=2.0),
    ],
    "ocr": [Ocr(), Ocr(reward="lines"), Ocr(reward="unit_tests")],
}
FULL_MARKS = {"grounding": 2.0, "detection": 3.0}
"""Of the paper's rewards; all others end at 1."""
NUM_HONEST = 200
NUM_STARTS = 10
NUM_STEPS = 200
_EPSILON = 1e-9

Answer: TypeAlias = Any
"""A list of labelled boxes, or a text."""


@dataclass(frozen=True)
class Scene:
    """What is right, and how answers to it are scored.

    Attributes:
        right: The right answer.
        target: The same as the task's target.
    """

    right: Answer
    target: Any


# ------------------------------------------------------------------------------------------------ scenes and answers


def some_box(draw: random.Random) -> Box:
    """A box of any size at any place."""
    width, height = draw.uniform(0.03, 0.4), draw.uniform(0.03, 0.4)
    x, y = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
    return x, y, x + width, y + height


def scene(task: Task[Any, Any], draw: random.Random) -> Scene:
    """A scene of a task: up to ten objects, or up to five lines."""
    if task.name == "ocr":
        text = "\n".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 5)))
        return Scene(text, OcrTarget(text=text))
    number = 1 if task.name == "grounding" else draw.choice([0, 1, 2, 3, 5, 10])
    names = NAMES if task.name == "detection" else NAMES[:1]
    right = [LabelledBox(label=draw.choice(names), box=some_box(draw)) for _ in range(number)]
    boxes = tuple(item.box for item in right)
    if task.name == "grounding":
        return Scene(right, GroundingTarget(box=boxes[0]))
    if task.name == "counting":
        points = tuple(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes)
        return Scene(right, CountingTarget(count=number, points=points, boxes=boxes))
    return Scene(right, DetectionTarget(objects=tuple(right)))


def prediction(task: Task[Any, Any], answer: Answer) -> Any:
    """An answer in good form as the task reads it."""
    if task.name == "ocr":
        return answer
    boxes = tuple(item.box for item in answer)
    if task.name == "grounding":
        return GroundingPrediction(boxes=boxes, label="cup", is_well_formed=len(boxes) == 1) if boxes else None
    if task.name == "counting":
        return CountingPrediction(count=len(boxes), boxes=boxes, label="cup" if boxes else "", is_well_formed=True)
    return DetectionPrediction(objects=tuple(answer), num_listed=len(answer), is_exact=True)


def honest(right: Answer, draw: random.Random) -> Answer:
    """The right answer with errors of a size."""
    size = draw.choice([0.0, 0.02, 0.05, 0.1, 0.3])
    if isinstance(right, str):
        return "".join(draw.choice("abcdef ") if draw.random() < size else letter for letter in right)
    answer = [item for item in right if draw.random() >= size]
    answer = [change_box(item, draw, size / 4) if size else item for item in answer]
    if len(right) > 1:  # grounding has one box
        answer += [draw.choice(right) for _ in range(draw.random() < size)]
        answer += [LabelledBox(label=draw.choice(NAMES), box=some_box(draw)) for _ in range(draw.random() < size)]
        answer = [replace(item, label=draw.choice(NAMES)) if draw.random() < size / 4 else item for item in answer]
    return answer


def change_box(item: LabelledBox, draw: random.Random, size: float) -> LabelledBox:
    """A box with its sides moved."""
    x1, y1, x2, y2 = (min(1.0, max(0.0, side + draw.gauss(0, size))) for side in item.box)
    box = (min(x1, x2), min(y1, y2), max(x1, x2) + 1e-6, max(y1, y2) + 1e-6)
    return LabelledBox(label=item.label, box=box)


def changed(answer: Answer, right: Answer, draw: random.Random) -> Answer:
    """An answer with one change, wild or small."""
    if isinstance(answer, str):
        at, end = sorted(draw.choices(range(len(answer) + 1), k=2))
        end = min(end, at + draw.choice([0, 1, 3, 10]))
        piece = draw.choice(["", "\n", " ", draw.choice(WORDS), str(right)[at : at + 5], answer[:10]])
        return answer[:at] + piece + answer[end:]
    items, kind = list(answer), draw.randrange(7)
    if kind == 0 and items:
        items.pop(draw.randrange(len(items)))
    elif kind == 1 and items:
        items.append(draw.choice(items))  # a duplicate
    elif kind == 2 and right:
        items.append(draw.choice(right))
    elif kind == 3:
        items.append(LabelledBox(label=draw.choice(NAMES), box=some_box(draw)))
    elif kind == 4:
        items.append(LabelledBox(label=draw.choice(NAMES), box=(0.0, 0.0, 1.0, 1.0)))
    elif items:
        at = draw.randrange(len(items))
        items[at] = change_box(items[at], draw, draw.choice([0.003, 0.02, 0.1]))
        if kind == 5:
            items[at] = LabelledBox(label=draw.choice(NAMES), box=items[at].box)
    return items[:15]


def starts(right: Answer, draw: random.Random) -> Answer:
    """Where a search begins: something honest, a part of what is right, or nonsense."""
    if isinstance(right, str):
        return draw.choice([honest(right, draw), "", right[: len(right) // 2], right * 2])
    middle = LabelledBox(label=NAMES[0], box=(0.45, 0.45, 0.55, 0.55))
    return draw.choice([honest(right, draw), right[:1], [], [middle] * max(1, len(right)), list(right) * 2])


# ----------------------------------------------------------------------------------------------------------- metrics


def metrics(answer: Answer, right: Answer, task: str) -> tuple[float, ...]:
    """What a table would show of one answer, higher is better; F1 stands for the average precision of many images."""
    if isinstance(right, str):
        mine, theirs = set(answer.split()), set(right.split())
        words = 2 * len(mine & theirs) / max(1, len(mine) + len(theirs))
        return Levenshtein.normalized_similarity(answer, right), float(answer == right), words
    if task == "grounding":
        overlap = iou(answer[0].box, right[0].box) if len(answer) == 1 else 0.0
        return overlap, *(float(overlap >= threshold) for threshold in (0.5, 0.75, 0.95))
    overlaps = iou_matrix([item.box for item in answer], [item.box for item in right])
    if task == "detection":
        for row, item in enumerate(answer):
            overlaps[row] *= [item.label == other.label for other in right]
    sizes = len(answer), len(right)
    reached = [overlaps >= threshold for threshold in IOU_THRESHOLDS]
    found = [fbeta(best_share(pairs.astype(float)) if pairs.any() else 0.0, *sizes) for pairs in reached]
    if task == "counting":
        found += [float(sizes[0] == sizes[1]), -float(abs(sizes[0] - sizes[1]))]
    return tuple(found)


def is_better(one: Sequence[float], other: Sequence[float]) -> bool:
    """Nowhere worse, and somewhere better."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b - _EPSILON for a, b in pairs) and any(a > b + _EPSILON for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------ search


def worst_gap(task: Task[Any, Any], found: Scene, draw: random.Random) -> tuple[float, Answer, Answer, int]:
    """The largest gap in a scene, the answer that makes it, the better one that earns less, and answers scored."""
    scored = count()

    def reward(answer: Answer) -> float:
        next(scored)
        return task.score(prediction(task, answer), found.target).reward

    better = [honest(found.right, draw) for _ in range(NUM_HONEST)]
    known = [(reward(answer), metrics(answer, found.right, task.name), answer) for answer in better]

    def gap(answer: Answer) -> tuple[float, Answer]:
        earned, own = reward(answer), metrics(answer, found.right, task.name)
        gaps = [(earned - theirs, other) for theirs, values, other in known if is_better(values, own)]
        return max(gaps, key=lambda pair: pair[0], default=(float("-inf"), None))

    best: tuple[float, Answer, Answer] = (0.0, None, None)
    for _ in range(NUM_STARTS):
        answer = starts(found.right, draw)
        value, other = gap(answer)
        for _ in range(NUM_STEPS):
            tried = changed(answer, found.right, draw)
            new, beaten = gap(tried)
            if new >= value:
                answer, value, other = tried, new, beaten
        if value > best[0]:
            best = value, answer, other
    return (*best, next(scored))


def search(task: Task[Any, Any], num_scenes: int, seed: int) -> dict[str, Any]:
    """The worst of several scenes."""
    draw, worst, num_answers, gaps = random.Random(seed), (0.0, None, None), 0, []
    for _ in range(num_scenes):
        found = scene(task, draw)
        value, answer, other, number = worst_gap(task, found, draw)
        num_answers += number
        gaps.append(value)
        if value > worst[0]:
            worst = value, tell(answer), tell(other)
            right = tell(found.right)
    full = FULL_MARKS.get(task.name, 1.0) if reward_of(task) == "perception_r1" else 1.0
    result: dict[str, Any] = {"full_marks": full, "worst_gap": worst[0] / full, "num_answers": num_answers}
    result["mean_of_worst_gaps"] = sum(gaps) / len(gaps) / full
    return result | ({"right": right, "answer": worst[1], "better": worst[2]} if worst[1] is not None else {})


def reward_of(task: Task[Any, Any]) -> str:
    """The name of its reward."""
    return str(task.reward)  # type: ignore[attr-defined]


def name_of(task: Task[Any, Any]) -> str:
    """Task and reward with the options that are not the task's own."""
    options = {field.name: getattr(task, field.name) for field in fields(task)}
    changed = [
        name for name in ("iou_threshold", "beta") if name in options and options[name] != getattr(type(task), name)
    ]
    return ", ".join([f"{task.name} {reward_of(task)}", *(f"{name} {options[name]}" for name in changed)])


def tell(answer: Answer) -> Any:
    """An answer for JSON."""
    if isinstance(answer, str):
        return answer
    return [[item.label, *(round(side, 3) for side in item.box)] for item in answer]


def gaps_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    rows = []
    for name, found in results.items():
        gaps = [f"{found[key]:.3f}" for key in ("worst_gap", "mean_of_worst_gaps")]
        rows.append([*name.split(" ", 1), *gaps, f"{found['num_answers']:,}"])
    return table(["task", "reward", "worst gap", "mean of the scenes' worst", "answers scored"], rows)


def main() -> int:
    """Search and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=tuple(TASKS), choices=TASKS)
    parser.add_argument("--num_scenes", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULT, help="File of the results.")
    args = parser.parse_args()
    results = {}
    for task in (task for name in args.tasks for task in TASKS[name]):
        name = name_of(task)
        results[name] = search(task, args.num_scenes, args.seed)
        print(f"{name}: {results[name]['worst_gap']:.3f}", flush=True)
    told = {"num_scenes": args.num_scenes, "seed": args.seed, "rewards": results}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if args.results == RESULT:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(fill(page, "red_team", {"gaps": gaps_table(results)}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
