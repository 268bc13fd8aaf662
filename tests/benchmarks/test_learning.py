"""The study: its plan, its worlds, its measures, and that its page says what its runs say."""

import json
import math
import random
import sys
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import ttest_1samp

from perception_r1.cli import main as perception_r1
from perception_r1.data.synthetic.worlds import World
from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

learning, trainings, worlds, run, report = (
    program(f"study.{name}") for name in ("plan", "trainings", "worlds", "run", "report")
)


def scenes(world: World, count: int):
    return [world.draw(random.Random(seed)) for seed in range(count)]


def result(training, seed, value, *, task="grounding", labels=0):
    levels = {level: {report.PRIMARY[task][0]: value} for level in report.LEVELS}
    return {"task": task, "training": training, "seed": seed, "labels": labels, "levels": levels}


def test_every_training_of_a_task_is_planned_once_on_every_seed_after_its_base():
    main = [name for name, training in trainings.TRAININGS.items() if training.part == "main"]
    jobs = learning.plan(trainings.TASKS, main, learning.LABELS, range(5))
    assert len({(job.task, job.name) for job in jobs}) == len(jobs) == 5 * (4 + 5 * 4 + 2 * 2 + 4 * 3 * 3)
    assert [job.training for job in jobs[:20]] == ["base"] * 20
    for training in ("sequential", "box"):
        assert {job.task for job in jobs if job.training == training} == {"counting", "detection"}


def test_trainings_cost_the_same_with_the_best_settings_of_the_search(tmp_path):
    study = learning.Study(results=tmp_path)
    (tmp_path / "ocr").mkdir()
    seconds = {("grpo", False): 2.0, ("grpo", True): 1.0, ("sft", False): 0.5, ("sft", True): 0.25}
    best = {"grpo": learning.Choice(6e-5, True), "sft": learning.Choice(1.5e-4, False)}
    for (kind, is_frozen), cost in seconds.items():
        job = learning.cost_job("ocr", kind, is_frozen)
        assert [steps for _, steps in study.phases(job)] == [learning.CALIBRATION_STEPS]
        study.path(job).write_text(json.dumps({"cpu_seconds_per_step": cost}))
    for kind in trainings.KINDS:
        for job in learning.trial_jobs("ocr", kind):
            ((options, steps),) = study.phases(job)
            assert steps * seconds[kind, job.choice.is_vision_frozen] == pytest.approx(learning.BUDGET, rel=0.01)
            assert options == trainings.KINDS[kind] + job.choice.options
            study.path(job).write_text(json.dumps({"best_validation": float(job.choice == best[kind])}))
        assert study.best_choice("ocr", kind) == best[kind]
    assert len({len(learning.trial_jobs("ocr", kind)) for kind in trainings.KINDS}) == 1
    few = learning.Job(task="ocr", training="sft", seed=0, labels=64)
    assert [steps * seconds["sft", False] for _, steps in study.phases(few)] == [learning.FEW_BUDGET]
    for training, kinds in {"grpo": ["grpo"], "sft": ["sft"], "sft-grpo": ["sft", "grpo"], "batch": ["grpo"]}.items():
        found = study.phases(learning.Job(task="ocr", training=training, seed=3))
        assert ["sft" if "sft" in options else "grpo" for options, _ in found] == kinds
        used = sum(
            steps * seconds[kind, best[kind].is_vision_frozen] for (_, steps), kind in zip(found, kinds, strict=True)
        )
        assert used == pytest.approx(learning.BUDGET, rel=0.01)
        assert ("batch" in found[-1][0]) is (training == "batch")
        assert all(best[kind].options[1] in options for (options, _), kind in zip(found, kinds, strict=True))


def test_a_training_whose_steps_cost_something_else_is_measured_by_itself(tmp_path):
    study = learning.Study(results=tmp_path)
    (tmp_path / "ocr").mkdir()
    for kind in trainings.KINDS:
        for job in learning.trial_jobs("ocr", kind):
            study.path(job).write_text(json.dumps({"best_validation": float(job.choice.lr == 6e-5)}))
    jobs = learning.plan(["ocr"], ["grpo", "twice", "sapo", "batch", "generalist"], [], [0, 1])
    costs = {(job.task, job.name) for job in study.costs(jobs)}
    own = {("ocr", f"cost-{name}-frozen") for name in ("grpo", "twice", "sapo")}
    assert costs == own | {("all", "cost-grpo-whole")}
    for seconds, job in enumerate(study.costs(jobs), 1):
        study.path(job).parent.mkdir(exist_ok=True)
        assert ("--model.num_iterations" in study.phases(job)[0][0]) is (job.training in ("cost-twice", "cost-sapo"))
        study.path(job).write_text(json.dumps({"cpu_seconds_per_step": seconds}))
    steps = {job.training: study.phases(job)[0][1] for job in jobs if job.training != "base"}
    budget = learning.BUDGET
    assert steps == {
        "grpo": budget,
        "twice": budget / 2,
        "sapo": budget / 3,
        "batch": budget,
        "generalist": 4 * budget / 4,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", trainings.TRAININGS)
def test_the_command_line_takes_the_options_of_every_training(name, capsys):
    training = trainings.TRAININGS[name]
    for task in training.tasks:
        for kind in training.kinds:
            command = ["fit", "--task", task, *trainings.KINDS[kind], *training.on(task), "--print_config"]
            assert perception_r1(command) == 0, capsys.readouterr().err


def test_other_parts_are_compared_with_grpo_in_one_table():
    results = [result("base", 0, 0.5), result("grpo", 0, 0.6), result("rloo", 0, 0.75)]
    for each in results:
        each["levels"]["training"]["reward/iou"] = 0.25
    lines = report.part_table(results, "estimators").splitlines()
    assert lines[2].startswith("| GRPO | +0.100 (1 of 1) | +0.000 (0 of 1) | - |")
    assert lines[3].startswith("| RLOO | +0.250 (1 of 1) |")
    assert len(lines) == 4  # what has not been done has no row


def test_a_run_on_all_tasks_is_read_as_one_of_each(tmp_path):
    (tmp_path / "all").mkdir()
    levels = {"training": {"accuracy_50": 0.5}}
    run_on_all = {"task": "all", "training": "generalist", "seed": 0, "labels": 0}
    by_task = {"by_task": {task: {"levels": levels} for task in trainings.TASKS}}
    (tmp_path / "all" / "generalist-seed-0.json").write_text(json.dumps(run_on_all | by_task))
    (tmp_path / "all" / "cost-grpo-whole.json").write_text(json.dumps(run_on_all))
    found = report.read(tmp_path)
    assert [each["task"] for each in found] == list(trainings.TASKS)
    assert all(each["levels"] == levels and each["training"] == "generalist" for each in found)


def test_trials_have_names_of_their_own():
    jobs = [job for kind in trainings.KINDS for job in learning.trial_jobs("ocr", kind)]
    assert len({job.name for job in jobs}) == len(jobs)
    assert jobs[0].name == "trial-grpo-3e-05-frozen"


def test_a_search_that_was_not_done_is_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="search"):
        learning.Study(results=tmp_path).phases(learning.Job(task="ocr", training="grpo", seed=0))


@pytest.mark.parametrize("task", ["grounding", "counting", "detection", "ocr"])
def test_levels_go_from_easy_to_more_than_ever_seen(task):
    counts = {name: [len(scene.things) for scene in scenes(world, 60)] for name, world in worlds.levels(task).items()}
    assert tuple(counts) == report.LEVELS
    assert np.mean(counts["pretraining"]) < np.mean(counts["training"]) < np.mean(counts["crowded"])
    if task == "counting":
        assert min(scene.values["count"] for scene in scenes(worlds.levels(task)["crowded"], 60)) > 8
    if task == "detection":
        assert max(counts["training"]) <= 10 < min(counts["crowded"])


def test_objects_on_photographs_are_those_of_the_plain_world_in_number():
    plain, photographed = (worlds.levels("counting")[level] for level in ("pretraining", "photographs"))
    for first, again in zip(scenes(photographed, 5), scenes(photographed, 5), strict=True):
        assert first.image.tobytes() == again.image.tobytes()
        assert first.image.size == (plain.image_size, plain.image_size)
    assert len({scene.image.tobytes() for scene in scenes(photographed, 20)}) == 20


def test_handwritten_digits_are_read_as_their_labels():
    from sklearn.datasets import load_digits

    known = load_digits()
    averages = {str(label): known.images[known.target == label].mean(0) for label in range(10)}
    num_right = num_digits = 0
    for scene in scenes(worlds.HandwrittenNumbers(), 40):
        assert scene.values["text"] == "".join(thing.name for thing in scene.things)
        assert all(side % 28 == 0 for side in scene.image.size)
        for thing in scene.things:
            ink = 235 - np.asarray(scene.image.crop(thing.box).convert("L").resize((8, 8)), float)
            nearest = min(averages, key=lambda name: np.linalg.norm(averages[name] * 12.5 - ink))
            num_right, num_digits = num_right + (nearest == thing.name), num_digits + 1
    assert num_right > 0.8 * num_digits


@pytest.mark.parametrize("task", ["counting", "detection"])
def test_boxes_are_paired_for_the_highest_overlap(task):
    def holding(boxes):
        if task == "counting":
            return SimpleNamespace(boxes=boxes)
        return SimpleNamespace(objects=[SimpleNamespace(box=box) for box in boxes])

    def answer(boxes, targets):
        prediction = None if boxes is None else holding(boxes)
        return SimpleNamespace(prediction=prediction, sample=SimpleNamespace(target=holding(targets)))

    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    half_of_left = (0.0, 0.0, 0.25, 1.0)
    answers = [answer((right, half_of_left), (left, right)), answer(None, (left,)), answer((left,), ())]
    assert run.box_metrics(answers) == {  # one object without a box, one box without an object
        "mean_iou": pytest.approx(1.5 / 4),
        "box_recall": pytest.approx(2 / 3),
        "box_precision": pytest.approx(2 / 3),
    }
    assert run.box_metrics(answers[1:2]) == {"mean_iou": 0.0, "box_recall": 0.0, "box_precision": 0.0}


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    pairs = [(0.5, 1.0), (0.5, 0.0), (1.0, 0.0), (1.0, 1.0)]
    assert run.calibration_error(pairs) == pytest.approx((2 * 0.0 + 2 * 0.5) / 4)


def test_gains_are_paired_by_seed_and_their_interval_is_that_of_a_t_test():
    results = [result("base", seed, 0.1 * seed) for seed in range(4)]
    results += [result("grpo", seed, 0.1 * seed + gain) for seed, gain in enumerate((0.1, 0.2, 0.3))]
    found = report.gains(results, "grounding", "grpo", 0, report.at_level("training", "accuracy_50"))
    assert found == pytest.approx([0.1, 0.2, 0.3])
    center, half = report.interval(found)
    oracle = ttest_1samp(found, 0.0).confidence_interval(0.95)
    assert (center - half, center + half) == pytest.approx((oracle.low, oracle.high))
    assert "+0.200 ± 0.248 (3 of 3)" in report.main_table(results)
    assert math.isnan(report.interval([1.0])[1])
    results += [result("grpo", 0, 0.5, labels=64)]
    assert report.label_table(results).splitlines()[2:] == [
        f"| grounding | {level} | GRPO | +0.500 (1 of 1) |" for level in report.LEVELS[1:]
    ]


def test_grpo_is_compared_with_others_seed_by_seed_and_by_number_of_images():
    results = [result("base", 0, 0.5), result("sft", 3, 0.9), result("grpo", 2, 0.1, labels=64)]
    results += [result("grpo", seed, 0.75) for seed in (0, 1)]
    results += [result("sft", seed, 0.5 + 0.25 * seed) for seed in (0, 1)]
    results += [result(name, 0, 0.7 + 0.1 * (name == "grpo"), labels=64) for name in ("grpo", "sft", "sft-short")]
    lines = report.difference_table(results).splitlines()
    assert lines[0] == "| task | metric | difference | ever new images | 64 images |"
    shown = "| grounding | accuracy at IoU 0.5 | GRPO - "
    half = 12.706 * 0.125  # quantile of Student's t with one degree of freedom, times the standard error of 0 and 0.25
    assert lines[2:] == [
        f"{shown}SFT | +0.125 ± {half:.3f} (1 of 2) | +0.100 (1 of 1) |",
        f"{shown}SFT, an eighth of the budget | - | +0.100 (1 of 1) |",
    ]


def test_a_metric_with_a_minus_is_better_where_it_is_less():
    read = report.at_level("training", "-absolute_error")
    assert read({"levels": {"training": {"absolute_error": 0.25}}}) == -0.25


def test_a_report_draws_every_interval_that_its_tables_tell(tmp_path, monkeypatch, capsys):
    sampled = {"1": dict.fromkeys(report.SAMPLED, 0.5)}
    for training, gain in {"base": 0.0, "grpo": 0.2, "sft": -0.1}.items():
        for seed in range(3):
            found = result(training, seed, 0.3 + gain + 0.01 * seed * (training != "base"))
            found |= {"sampled": sampled}
            found["levels"]["training"] |= dict.fromkeys(report.OTHERS["grounding"], 0.1)
            path = tmp_path / "grounding" / f"{training}-seed-{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found))
    bars = []
    draw = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, y, **kw: bars.append((x, kw["xerr"])) or draw(self, x, y, **kw)
    )
    page = tmp_path / "results.md"
    page.write_text("Before.\n\n<!-- learning: levels -->\n\nOld.\n\n<!-- end -->\n\nAfter.\n")
    report.report(tmp_path, tmp_path)
    tables = page.read_text()
    assert tables.startswith("Before.\n\n<!-- learning: levels -->\n\n| task")
    assert tables.endswith("|\n\n<!-- end -->\n\nAfter.\n")
    assert "from 9 runs" in capsys.readouterr().out
    assert Image.open(tmp_path / "learning.png").width > 1000
    assert len(bars) == 2 * (1 + len(report.LEVELS))
    assert {f"{center:+.3f} ± {half:.3f}" for center, half in bars} == {"+0.210 ± 0.025", "-0.090 ± 0.025"}
    assert all(f"{center:+.3f} ± {half:.3f}" in tables for center, half in bars)


@pytest.mark.slow
def test_a_run_is_trained_and_measured_as_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GROUP_SIZE", 2)
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", 8)
    small = ["--data.num_val", "4", "--data.batch_size", "2", "--model.max_new_tokens", "8"]
    planned = run.Run(
        task="ocr",
        training="sft-grpo",
        seed=0,
        labels=0,
        phases=[(["--variant", "sft", *small], 2), (small, 1)],
        folder=str(tmp_path / "runs"),
        num_tested=8,
    )
    monkeypatch.setattr(sys, "argv", ["run.py", json.dumps(vars(planned)), str(tmp_path / "result.json")])
    assert run.main() == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["training"] == "sft-grpo"
    assert [len(json.loads(path.read_text())) for path in sorted(tmp_path.glob("runs/*/cpu.json"))] == [2, 1]
    assert len(found["cpu_seconds"]) == 2
    assert min(found["cpu_seconds"]) > 0
    assert set(found["levels"]) == set(report.LEVELS)
    (sampled,) = found["sampled"].values()
    assert sampled["best"] >= sampled["mean"]
    assert sampled["kl_per_token"] != 0  # it was trained
    base = run.Run(task="ocr", training="base", seed=0, labels=0, phases=[], folder="", num_tested=8)
    monkeypatch.setattr(sys, "argv", ["run.py", json.dumps(vars(base)), str(tmp_path / "base.json")])
    assert run.main() == 0
    assert json.loads((tmp_path / "base.json").read_text())["sampled"]["0.5"]["kl_per_token"] == 0
    few = replace(planned, labels=4, phases=[([*small, "--variant", "sft"], 1)], folder=str(tmp_path / "few"))
    monkeypatch.setattr(sys, "argv", ["run.py", json.dumps(vars(few)), str(tmp_path / "few.json")])
    assert run.main() == 0
    found = json.loads((tmp_path / "few.json").read_text())
    assert set(found["levels"]) == set(report.LEVELS) - {"pretraining"}
    assert "sampled" not in found


def test_the_committed_pages_say_what_the_committed_runs_say():
    results = report.read(RESULTS / "learning")
    assert {result["task"] for result in results} == set(report.PRIMARY)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert report.filled(page, results) == page
    assert "<!-- learning: base -->" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for task, (metric, name) in report.PRIMARY.items():
        bases = [result for result in results if (result["task"], result["training"]) == (task, "base")]
        means = [mean(base["levels"][level][metric] for base in bases) for level in report.LEVELS[:3]]
        ending = " | ".join([name, *(f"{mean:.3f}" for mean in means)])
        assert [line for line in readme if line.startswith(f"| {task} |") and line.endswith(f"| {ending} |")]
