"""What holds for every task in the folder with every codec; a new task needs a sample here and nothing else."""

import json
from dataclasses import is_dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.errors import UserError
from perception_r1.metrics import make_metrics
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, LabelledBox, Sample, Score
from perception_r1.scoring import parse_completions, prefix_rewards, score_completions
from perception_r1.task import MAX_TEXT, Task
from perception_r1.tasks import TASKS
from perception_r1.tasks.counting import CountingTarget
from perception_r1.tasks.detection import DetectionTarget
from perception_r1.tasks.grounding import GroundingTarget
from perception_r1.tasks.ocr import OcrTarget
from tests.hostile import WORST, texts

# sides on which hundredths of the image are whole numbers in every codec's units
FRAME = ImageSize(width=400, height=300, resized_width=700, resized_height=1400)
CUPS = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 1.0))
PLACES = ((0.25, 0.5), (0.5, 0.25), (0.75, 0.75))
OBJECTS = (
    LabelledBox(label="cup", box=CUPS[0]),
    LabelledBox(label="dog", box=CUPS[1]),
    LabelledBox(label="cup", box=CUPS[1]),
)
TARGETS: dict[str, tuple[float, list[tuple[str, Any]]]] = {
    "grounding": (2.0, [("red cup", GroundingTarget(box=CUPS[0]))]),
    "counting": (
        1.0,
        [
            ("cup", CountingTarget(count=3, points=PLACES)),
            ("cup", CountingTarget(count=2, points=((0.2, 0.3), (0.75, 0.75)), boxes=CUPS)),
        ],
    ),
    "detection": (3.0, [("", DetectionTarget(objects=OBJECTS)), ("", DetectionTarget(objects=()))]),
    "ocr": (1.0, [("", OcrTarget(text="two\nlines")), ("", OcrTarget(text=""))]),
}
"""Full marks and samples of every task."""
REWARDS: list[tuple[str, dict[str, Any], float]] = [
    *(("grounding", {"reward": reward}, 1.0) for reward in ("thresholds", "giou")),
    ("grounding", {"iou_threshold": 0.75}, 2.0),
    ("counting", {"matching": "sequential"}, 1.0),
    *((name, {"reward": "mean_f1"} | beta, 1.0) for name in ("counting", "detection") for beta in ({}, {"beta": 2.0})),
    ("detection", {"iou_threshold": 0.75, "matching": "sequential"}, 3.0),
    *(("ocr", {"reward": reward}, 1.0) for reward in ("lines", "unit_tests")),
    *((name, {}, full) for name, (full, _) in TARGETS.items()),
]
"""Task, options and full marks of every reward."""
GARBAGE = ["hello", "\x00", "{}", "null", "[1", "<|box_start|>(1,2,3,4)<|box_end|>", "9" * 5000, "[" * 5000, "<answer>"]

CASES = [(name, *case) for name, (_, cases) in TARGETS.items() for case in cases]
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
tasks = pytest.mark.parametrize("name", TASKS)
thinking = pytest.mark.parametrize("think", [False, True], ids=["plain", "think"])


def make(name: str, query: str, target: Any) -> Sample[Any]:
    return Sample(id="1", image=Path("none.png"), width=400, height=300, query=query, target=target)


def check_names(task: Task[Any, Any], score: Score) -> None:
    assert tuple(score.components) == task.component_names
    assert tuple(score.metrics) == task.metric_names
    assert all(isfinite(value) for value in (score.reward, *score.components.values(), *score.metrics.values()))


def test_every_task_has_samples():
    assert set(TARGETS) == set(TASKS)


@thinking
@codecs
@pytest.mark.parametrize(("name", "query", "target"), CASES)
def test_the_answer_reads_back_with_full_marks(name, query, target, codec, think):
    task, sample = TASKS[name](think=think), make(name, query, target)
    for end in ("", "<|im_end|>", "<|im_end|><|endoftext|>\n", "<end_of_turn><eos>"):
        prediction = task.parse_completion(task.target_text(sample, codec, FRAME) + end, codec, FRAME)
        score = task.score(prediction, target)
        assert score.reward == pytest.approx(TARGETS[name][0])
        check_names(task, score)
        json.dumps(task.serialize_prediction(prediction, FRAME))
        assert all(len(mark.shape) in (2, 4) for mark in [*task.overlays(target), *task.overlays(prediction)])


@codecs
@pytest.mark.parametrize(("name", "query", "target"), CASES)
def test_an_answer_without_the_tags_asked_for_is_worth_nothing(name, query, target, codec):
    task, sample = TASKS[name](think=True), make(name, query, target)
    text = TASKS[name]().target_text(sample, codec, FRAME)
    for variant in (text, f"<answer>{text}</answer>", f"<think></think>{text}", f"<think><answer>{text}</answer>"):
        assert task.parse_completion(variant, codec, FRAME) is None
        assert task.score(None, target).reward == 0


@thinking
@codecs
@tasks
@pytest.mark.parametrize("text", [*GARBAGE, "a" * (MAX_TEXT + 1)], ids=lambda text: text[:10])
def test_garbage_scores_zero(name, codec, think, text):
    task = TASKS[name](think=think)
    target = OcrTarget(text="ßðø") if name == "ocr" else TARGETS[name][1][0][1]
    score = task.score(task.parse_completion(text, codec, FRAME), target)
    assert score.reward == 0
    check_names(task, score)


@codecs
@tasks
@given(text=texts, think=st.booleans())
def test_hostile_text_is_scored_without_a_complaint(name, codec, text, think):
    task = TASKS[name](think=think)
    prediction = task.parse_completion(text, codec, FRAME)
    for _, target in TARGETS[name][1]:
        score = task.score(prediction, target)
        check_names(task, score)
        assert 0 <= score.reward <= TARGETS[name][0]
    json.dumps(task.serialize_prediction(prediction, FRAME), allow_nan=False)


@tasks
@pytest.mark.parametrize("text", WORST.values(), ids=WORST)
def test_worst_cases_are_scored_without_a_complaint(name, text):
    for codec in CODECS.values():
        task = TASKS[name]()
        check_names(task, task.score(task.parse_completion(text, codec, FRAME), TARGETS[name][1][0][1]))


@tasks
def test_names_are_all_different_and_the_primary_metric_is_one_of_them(name):
    task = TASKS[name]()
    assert is_dataclass(task)
    metrics = make_metrics(task)
    target = TARGETS[name][1][0][1]
    metrics.update(preds=[None], target=[target], image_sizes=[FRAME], ids=["1"])
    values = metrics.compute()
    own = ["reward", *(f"reward/{name}" for name in task.component_names), *task.metric_names]
    assert len(set(own)) == len(own)
    assert set(own) <= set(values)
    assert task.primary_metric in values
    assert all(value.ndim == 0 for value in values.values())


@tasks
def test_prompt_template_is_an_option_with_slots(name):
    task = TASKS[name](prompt_template="Of {labels}: find {query}, in JSON: {}")
    assert task.prompt("a {labels} cup") == f"Of {', '.join(task.labels)}: find a {{labels}} cup, in JSON: {{}}"


@tasks
def test_slot_that_nothing_fills_is_refused(name):
    with pytest.raises(UserError, match=r"prompt_template may hold \{query\} and \{labels\}, not \{question\}"):
        TASKS[name](prompt_template="Find the {question}.")


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
@codecs
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_prefixes_of_the_ideal_answer_gain_up_to_its_reward(case, codec, end):
    name, query, target = case
    task = TASKS[name]()
    text = task.target_text(make(name, query, target), codec, FRAME) + end
    (parsed,) = parse_completions(
        task, codec, samples=[make(name, query, target)], image_sizes=[FRAME], completions=[text]
    )
    found = prefix_rewards(task, codec, parsed)
    ends, rewards = [end for end, _ in found], [reward for _, reward in found]
    assert ends[0] == 0
    assert ends == sorted(set(ends))
    if name == "ocr":
        assert found == [(0, 0.0)]
    else:
        assert len(found) == 1 + max(
            1, len(getattr(target, "objects", getattr(target, "points", None) or (0,)))
        ) * bool(task.num_objects(target))
        assert rewards == sorted(rewards)
        assert rewards[-1] == pytest.approx(TARGETS[name][0])


@codecs
@pytest.mark.parametrize(("name", "options", "full"), REWARDS)
def test_every_reward_is_best_for_the_right_answer_and_none_pays_for_length(name, options, full, codec):
    task = TASKS[name](**options)
    for query, target in TARGETS[name][1]:
        sample = make(name, query, target)
        right = task.format_target(sample, codec, FRAME)
        objects = codec.parse_boxes(right, FRAME).items
        again = [LabelledBox(label=item.label, box=item.box) for item in objects]
        false = LabelledBox(label="cup", box=(0.9, 0.01, 0.95, 0.05))
        longer = [right + "\n" + right, right + "\nzzz", right + "\n" * 50] if name == "ocr" else []
        if name != "ocr":
            longer = [codec.format_boxes([*again, *more], FRAME) for more in ([false], again, [false] * 9) if more]
        answers = [right, *longer, *GARBAGE, *WORST.values(), ""]
        parsed = parse_completions(
            task,
            codec,
            samples=[sample] * len(answers),
            image_sizes=[FRAME] * len(answers),
            completions=answers,
        )
        rewards = [each.score.reward for each in score_completions(task, parsed)]
        assert rewards[0] == pytest.approx(full)
        assert all(0 <= reward <= full + 1e-12 for reward in rewards)
        assert all(reward < full - 1e-6 for text, reward in zip(answers, rewards, strict=True) if text in longer)


@given(text=texts)
@tasks
def test_prefixes_of_any_text_are_read(name, text):
    task = TASKS[name]()
    for codec in CODECS.values():
        prefixes = task.parse_prefixes(text, codec, FRAME)
        assert prefixes[0][0] == 0
        assert all(before < behind for (before, _), (behind, _) in pairwise(prefixes))
