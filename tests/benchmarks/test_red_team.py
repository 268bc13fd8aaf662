"""The search for answers that earn more than better ones."""

import json
import random

import pytest

from perception_r1.tasks.detection import Detection
from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

pages, red_team = program("pages"), program("red_team")


def test_better_is_nowhere_worse():
    assert red_team.is_better((1.0, 0.5), (0.5, 0.5))
    assert not red_team.is_better((1.0, 0.5), (1.0, 0.5))
    assert not red_team.is_better((1.0, 0.4), (0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "reward", "is_safe"),
    [("detection", "perception_r1", False), ("detection", "mean_f1", True), ("counting", "mean_f1", True)],
)
def test_a_gap_is_what_it_says(name, reward, is_safe, monkeypatch):
    monkeypatch.setattr(red_team, "NUM_STARTS", 3)
    monkeypatch.setattr(red_team, "NUM_STEPS", 60)
    task = next(task for task in red_team.TASKS[name] if task.reward == reward)
    draw = random.Random(1)
    scene = red_team.scene(task, draw)
    while len(scene.right) < 3:
        scene = red_team.scene(task, draw)
    gap, answer, better, number = red_team.worst_gap(task, scene, draw)
    assert number == red_team.NUM_HONEST + 3 * 61
    assert (gap <= 1e-9) is is_safe
    if not is_safe:
        earned = [task.score(red_team.prediction(task, each), scene.target).reward for each in (answer, better)]
        assert earned[0] - earned[1] == pytest.approx(gap)
        assert red_team.is_better(*(red_team.metrics(each, scene.right, name) for each in (better, answer)))


def test_the_right_answer_has_full_marks_and_the_best_metrics():
    draw = random.Random(0)
    for tasks in red_team.TASKS.values():
        for task in tasks:
            scene = red_team.scene(task, draw)
            reward = task.score(red_team.prediction(task, scene.right), scene.target).reward
            full = red_team.FULL_MARKS.get(task.name, 1.0) if task.reward == "perception_r1" else 1.0
            assert reward == pytest.approx(full)
            right = red_team.metrics(scene.right, scene.right, task.name)
            assert not any(
                red_team.is_better(red_team.metrics(other, scene.right, task.name), right)
                for other in (red_team.changed(scene.right, scene.right, draw) for _ in range(20))
            )


def test_invalid_boxes_are_never_made():
    draw = random.Random(0)
    task = Detection(categories=red_team.NAMES)
    answer = red_team.scene(task, draw).right
    for _ in range(300):
        answer = red_team.changed(answer, answer, draw)
        assert all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in (item.box for item in answer))
        assert len(answer) <= 15


def test_the_page_shows_the_committed_results():
    results = json.loads((RESULTS / "red_team.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert pages.fill(page, "red_team", {"gaps": red_team.gaps_table(results["rewards"])}) == page
    assert "<!-- red_team: gaps -->" in page
    assert all(found["num_answers"] >= 10_000 for found in results["rewards"].values())
