"""What an evaluation leaves behind, whatever happened to it on the way."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1.callbacks.files import image_name
from perception_r1.cli import main
from perception_r1.commands import score
from perception_r1.data.sources import JsonLines
from perception_r1.evaluation.callback import Evaluation
from perception_r1.geometry import iou
from perception_r1.modules.base import PolicyModule
from perception_r1.published import first_box
from perception_r1.reporting.document import make_document
from perception_r1.reporting.folder import read_record
from perception_r1.tasks.grounding import GroundingData
from tests.callbacks.toy import ToyData, ToyModule, toy_trainer
from tests.evaluation.evaluating import (
    DATA,
    answer_by_lot,
    answers_of,
    arguments,
    evaluate,
    left_behind,
    results,
    rows_of,
    write_sources,
)
from tests.modules.toy import make_data, make_module, make_trainer

ROOT = Path(__file__).parents[2]
SIZES = {"one": 14, "two": 5, "three": 1}
NUM_SAMPLES = sum(SIZES.values())
BATCH = 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The embedded model, evaluated on three sources without any trouble."""
    folder = tmp_path_factory.mktemp("evaluation")
    files = write_sources(folder, "grounding", SIZES)
    words = arguments(
        *("grounding", folder, files, "--model.max_new_tokens=24", f"--data.eval_batch_size={BATCH}"),
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        answered = evaluate(folder / "whole", words, monkeypatch)
    found = results(folder / "whole")
    return SimpleNamespace(
        folder=folder, files=files, words=words, answered=answered, name=found.name, left=left_behind(found)
    )


def lines(undisturbed) -> list[str]:
    return undisturbed.left["predictions.jsonl"].decode().splitlines(keepends=True)


def seed(place: Path, undisturbed, **files: str) -> Path:
    """A folder of the evaluation with files that an earlier try left there."""
    found = place / "logs" / "grounding" / undisturbed.name
    found.mkdir(parents=True)
    for name, text in files.items():
        (found / name.replace("__", ".")).write_text(text)
    return found


def test_an_evaluation_answers_every_sample_once_in_the_order_of_the_data(undisturbed):
    expected = [(name, str(index)) for name, size in SIZES.items() for index in range(size)]
    assert undisturbed.answered == expected
    rows = [json.loads(line) for line in lines(undisturbed)]
    assert [(row["source"], row["id"]) for row in rows] == expected
    assert len({row["completion"] for row in rows}) > 5
    assert 0 < sum(row["reward"] > 1 for row in rows) < NUM_SAMPLES  # there is something to get wrong


def test_an_evaluation_keeps_small_pictures_and_has_a_page(undisturbed):
    found = results(undisturbed.folder / "whole")
    rows = [json.loads(line) for line in lines(undisturbed)]
    names = {image_name(row["source"], row["id"]) for row in rows}
    assert {path.name for path in (found / "images").iterdir()} == names
    record = read_record(found)
    metrics = json.loads(undisturbed.left["metrics.json"])
    assert record.metrics("after")["grounding", "two/reward"] == metrics["two"]["reward"]
    page = make_document([record], num_cards=NUM_SAMPLES)
    assert f"{NUM_SAMPLES} of {NUM_SAMPLES} answered samples of the test split." in page
    assert page.count("data:image/jpeg;base64") == NUM_SAMPLES


def test_an_evaluation_says_how_it_was_made(undisturbed):
    record = read_record(results(undisturbed.folder / "whole"))
    card = record.card
    assert card["versions"]["torch"] == torch.__version__
    assert card["hardware"]["cores"] > 0
    assert card["git"] is None or len(card["git"]["commit"]) == 40
    assert card["checkpoint"] is None
    splits = card["data"]["splits"]
    assert splits["test"]["num_samples"] == NUM_SAMPLES
    assert len(card["data"]["fingerprint"]) >= 16
    assert card["task"]["class_path"].endswith("Grounding")
    words = re.sub(r"<[^>]*>", " ", make_document([record], num_cards=1))
    assert card["versions"]["torch"] in words
    assert "All of evaluation.json" in words


def fractions(row) -> tuple[float, ...]:
    x1, y1, x2, y2 = row["box"]
    return x1 / row["width"], y1 / row["height"], x2 / row["width"], y2 / row["height"]


def test_metrics_are_the_means_of_each_source(undisturbed):
    metrics = json.loads(undisturbed.left["metrics.json"])
    assert list(metrics) == list(SIZES)
    for name, values in metrics.items():
        rows = [row for row in map(json.loads, lines(undisturbed)) if row["source"] == name]
        components = [{f"reward/{key}": value for key, value in row["components"].items()} for row in rows]
        found = [
            {"reward": row["reward"], **more, **row["metrics"]} for row, more in zip(rows, components, strict=True)
        ]
        expected = {key: pytest.approx(math.fsum(row[key] for row in found) / len(rows)) for key in found[0]}
        margin = json.loads(undisturbed.left["margins_of_error.json"])[name]["reward"]
        if len(rows) > 1:
            error = scipy.stats.sem([row["reward"] for row in rows])
            assert margin == pytest.approx(error * scipy.stats.t.ppf(0.975, len(rows) - 1))
        else:
            assert margin is None
        boxes = [first_box(row["completion"]) for row in rows]
        overlaps = [iou([side / 1000 for side in box], fractions(row)) for box, row in zip(boxes, rows, strict=True)]
        expected |= {
            f"published/accuracy_{percent}": pytest.approx(
                sum(overlap >= percent / 100 for overlap in overlaps) / len(rows)
            )
            for percent in (50, 75, 95)
        }
        expected["published/reward/iou"] = pytest.approx(math.fsum(overlaps) / len(rows))
        accuracies = [values[f"published/accuracy_{name}"] for name in (50, 75, 95)]
        expected["published/accuracy_mean"] = pytest.approx(sum(accuracies) / 3)
        expected["published/center_accuracy"] = values["published/center_accuracy"]
        assert values == expected


def wait_for_rows(process: subprocess.Popen, part: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not part.is_file() or part.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_and_ends_as_if_nothing_had_been(undisturbed, tmp_path, monkeypatch):
    folder, done = tmp_path / "logs" / "grounding" / undisturbed.name, []
    for count in (2, 3):
        process = subprocess.Popen(
            [sys.executable, "-m", "perception_r1", *undisturbed.words, "--data.eval_batch_size=1"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_for_rows(process, folder / "answers.rank0.jsonl", count)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done += [
            line for line in (folder / "answers.rank0.jsonl").read_text().splitlines(keepends=True) if "\n" in line
        ]
        assert len(done) == len(set(done)) >= count  # nothing that was there has been answered again
        assert done[: len(done)] == lines(undisturbed)[: len(done)]
    answered = evaluate(tmp_path, undisturbed.words, monkeypatch)
    assert answered == undisturbed.answered[len(done) :]
    assert left_behind(results(tmp_path)) == undisturbed.left
    assert evaluate(tmp_path, undisturbed.words, monkeypatch) == []
    assert left_behind(results(tmp_path)) == undisturbed.left


LEFT_OVER = {
    # what lies there -> indices of the samples that are still to be answered
    "parts": (lambda rows: {"answers__rank0__jsonl": rows[:7], "answers__rank1__jsonl": rows[9:]}, range(7, 9)),
    "a line torn at its end": (lambda rows: {"answers__rank0__jsonl": [*rows[:7], rows[7][:-1]]}, range(7, 20)),
    "a line torn at its start": (lambda rows: {"answers__rank0__jsonl": [*rows[:7], rows[7][:1]]}, range(7, 20)),
    "a part of a device that is gone": (lambda rows: {"answers__rank31__jsonl": rows[4:]}, range(4)),
    "answers, and parts that were to be removed": (
        lambda rows: {
            "answers__jsonl": rows[:9],
            "answers__rank0__jsonl": rows[3:9],
            "answers__rank1__jsonl": rows[:2],
        },
        range(9, 20),
    ),
    "half of a draft": (
        lambda rows: {"answers__rank0__jsonl": rows[:7], "answers__jsonl__tmp": rows[:2]},
        range(7, 20),
    ),
    "predictions, and parts that were to be removed": (
        lambda rows: {"predictions__jsonl": rows, "answers__jsonl": rows[:6], "answers__rank0__jsonl": rows[6:]},
        [],
    ),
    "metrics that are old": (lambda rows: {"predictions__jsonl": rows, "metrics__json": ["{"]}, []),
    "predictions that lack some": (lambda rows: {"predictions__jsonl": rows[::2]}, range(1, 20, 2)),
    "rows in disorder": (lambda rows: {"answers__rank0__jsonl": rows[::-1]}, []),
    "rows of samples that are none": (
        lambda rows: {"answers__rank0__jsonl": [*rows[:7], rows[7].replace('"id": "7"', '"id": "700"')]},
        range(7, 20),
    ),
    "all but one": (lambda rows: {"answers__rank0__jsonl": rows[:19]}, [19]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEFT_OVER)
def test_what_is_there_is_not_answered_again_and_nothing_is_lost(undisturbed, tmp_path, monkeypatch, kind):
    leave, expected = LEFT_OVER[kind]
    folder = seed(tmp_path, undisturbed, **{name: "".join(rows) for name, rows in leave(lines(undisturbed)).items()})
    # the model need not run: what it would say is known, and that it is asked for no more is seen
    monkeypatch.setattr(PolicyModule, "score_greedy", answers_of(map(json.loads, lines(undisturbed))))
    assert evaluate(tmp_path, undisturbed.words, monkeypatch) == [undisturbed.answered[index] for index in expected]
    assert left_behind(folder) == undisturbed.left


@pytest.fixture(scope="module")
def detection(undisturbed):
    """An evaluation of detection whose second source is seen by one of two devices alone."""
    folder = undisturbed.folder / "detection"
    files = write_sources(folder, "detection", {"one": 2, "two": 1})
    words = arguments("detection", folder, files, "--model.max_new_tokens=8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        evaluate(folder / "whole", words, monkeypatch)
    return SimpleNamespace(words=words, left=left_behind(results(folder / "whole")))


@pytest.fixture(scope="module")
def on_two(undisturbed, detection, tmp_path_factory):
    """Evaluations on two devices: from the start, and with some, with one and with no sample left; and of detection."""
    folder, rows = tmp_path_factory.mktemp("two"), lines(undisturbed)
    jobs = []
    for name, done in {"fresh": 0, "some": 12, "one": NUM_SAMPLES - 1, "none": NUM_SAMPLES}.items():
        seed(folder / name, undisturbed, **({"answers__rank0__jsonl": "".join(rows[:done])} if done else {}))
        jobs.append((str(folder / name), undisturbed.words))
    (folder / "detection").mkdir()
    jobs.append((str(folder / "detection"), detection.words))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.evaluation.evaluate_on_two", str(folder / "jobs.json")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fresh", "some", "one", "none"])
def test_other_devices_go_on_and_end_with_the_same(undisturbed, on_two, name):
    assert left_behind(results(on_two / name)) == undisturbed.left


@pytest.mark.slow
def test_a_source_that_only_one_device_has_seen_gets_its_metrics(detection, on_two):
    assert json.loads(detection.left["metrics.json"])["two"]["ap"] == 0
    assert left_behind(results(on_two / "detection")) == detection.left


@pytest.fixture
def by_lot(folder, tmp_path, monkeypatch):
    """Evaluates sources of a task with answers that are known beforehand; gives the evaluation's folder."""
    monkeypatch.setattr(PolicyModule, "score_greedy", answer_by_lot)

    def run(task: str, files: dict[str, Path], *more: str, split: str = "test") -> Path:
        more = (f"--model.policy.name={folder}", "--data.eval_batch_size=4", *more)
        evaluate(tmp_path / split, arguments(task, tmp_path, files, *more, split=split), monkeypatch)
        return results(tmp_path / split)

    return run


def summary_of(text: str) -> dict[str, dict[str, str]]:
    """What `score` says: source -> metric -> number."""
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if head := re.fullmatch(r"\w+ of (\w+): \d+ completions", line):
            found[head[1]] = {}
        else:
            name, value = line.split()
            found[list(found)[-1]][name] = value
    return found


@pytest.mark.parametrize("task", DATA)
def test_each_source_has_metrics_and_they_are_those_that_score_gives(by_lot, tmp_path, capsys, task):
    found = by_lot(task, write_sources(tmp_path, task, {"one": 9, "two": 6}))
    metrics = json.loads((found / "metrics.json").read_text())
    assert list(metrics) == ["one", "two"]
    assert metrics["one"] != metrics["two"]
    assert 0 < metrics["one"]["reward"] < 3
    events = EventAccumulator(str(found))
    events.Reload()
    components = {f"reward/{name}" for name in DATA[task]().task.component_names}
    for source, values in metrics.items():
        assert components <= values.keys()
        for name, value in values.items():
            logged = events.Scalars(f"test/{source}/{name}")[0].value
            assert logged == pytest.approx(value, rel=1e-6) if value is not None else math.isnan(logged)
    capsys.readouterr()
    options = ["--categories", json.dumps(module_categories(tmp_path))] if task == "detection" else []
    assert score.main([str(found / "predictions.jsonl"), "--task", task, "--codec", "qwen2_vl", *options]) == 0
    told = summary_of(capsys.readouterr().err)
    assert told == {
        source: {name: f"{math.nan if value is None else value:.6g}" for name, value in values.items()}
        for source, values in metrics.items()
    }


def module_categories(folder: Path) -> list[str]:
    """What detection knows in these files."""
    rows = [row for file in folder.glob("*/rows.jsonl") for row in rows_of(file)]
    return sorted({item["label"] for row in rows for item in row["objects"]})


def test_one_source_alone_needs_no_name_in_its_tags(by_lot, tmp_path):
    found = by_lot("grounding", write_sources(tmp_path, "grounding", {"only": 3}))
    assert list(json.loads((found / "metrics.json").read_text())) == ["only"]
    events = EventAccumulator(str(found))
    events.Reload()
    assert {"test/accuracy_50", "test/reward", "test/reward/iou"} <= set(events.Tags()["scalars"])


def test_an_evaluation_of_the_training_rows_makes_a_curriculum(by_lot, tmp_path):
    files = write_sources(tmp_path, "grounding", {"one": 14, "two": 6})
    found = by_lot("grounding", files, "--data.eval_split=train", split="train")
    rows = rows_of(found / "predictions.jsonl")
    data = GroundingData(
        train={name: JsonLines(file) for name, file in files.items()},
        batch_size=2,
        curriculum=found / "predictions.jsonl",
    )
    data.setup("fit")
    training = [(sample.source, sample.id) for sample in data.samples("train")]
    # the split is that of training: what is held out there is not answered
    assert [(row["source"], row["id"]) for row in rows] == training
    assert 10 < len(training) < 20
    rewards = {(row["source"], row["id"]): row["reward"] for row in rows}
    shown = [(sample.source, sample.id) for batch in data.train_dataloader() for sample in batch]
    assert shown == sorted(training, key=lambda name: -rewards[name])[: len(shown)]
    assert len({rewards[name] for name in shown}) > 2


@pytest.mark.parametrize(("limit", "count"), [(1, 3), (2, 6), (0.5, 3), (1.0, 10)])  # ten in three batches: 3, 3, 4
def test_a_limited_evaluation_begins_anew_and_answers_the_same_each_time(folder, tmp_path, monkeypatch, limit, count):
    monkeypatch.setattr(PolicyModule, "score_greedy", answer_by_lot)
    module = make_module(folder, task=DATA["grounding"]().task)
    for _ in range(2):
        data = make_data(module.task, num_test=10, eval_batch_size=4)
        logger = TensorBoardLogger(tmp_path, name="", version="eval-x")
        make_trainer(tmp_path, [Evaluation()], logger=logger, limit_test_batches=limit).test(module, data)
        rows = rows_of(tmp_path / "eval-x" / "predictions.jsonl")
        assert [row["id"] for row in rows] == [f"test-{index}" for index in range(count)]


def test_a_folder_of_another_name_is_not_taken_for_the_same_question(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicyModule, "score_greedy", answer_by_lot)
    files = write_sources(tmp_path, "grounding", {"only": 4})
    more = (f"--model.policy.name={folder}", "--trainer.logger.version=mine")
    for _ in range(2):
        assert len(evaluate(tmp_path, arguments("grounding", tmp_path, files, *more), monkeypatch)) == 4
    assert len(rows_of(tmp_path / "logs" / "grounding" / "mine" / "predictions.jsonl")) == 4


def test_without_a_logger_nothing_is_kept(by_lot, tmp_path):
    files = write_sources(tmp_path, "grounding", {"only": 4})
    with pytest.raises(ValueError, match="not enough values"):  # there is no folder of an evaluation
        by_lot("grounding", files, "--trainer.logger=false")
    assert [path.name for path in (tmp_path / "test").rglob("*") if path.is_file()] == ["config.yaml"]  # Lightning's


def test_after_an_evaluation_the_data_is_whole_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicyModule, "score_greedy", answer_by_lot)
    module = make_module(folder, task=DATA["grounding"]().task)
    for size in (2, 3):  # of the second evaluation two are known; then all three are there for whoever asks
        data = make_data(module.task, num_test=3)
        logger = TensorBoardLogger(tmp_path, name="", version="eval-x")
        make_trainer(tmp_path, [Evaluation()], logger=logger, limit_test_batches=1.0).test(module, data)
        assert sum(len(batch) for batch in data.test_dataloader()) == 3
        path = tmp_path / "eval-x" / "predictions.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:size]))


def test_an_evaluation_that_breaks_keeps_what_it_has(folder, tmp_path, monkeypatch):
    def breaks(module, batch):
        if batch.samples[0].id == "test-2":
            raise RuntimeError("the toy broke")
        return answer_by_lot(module, batch)

    monkeypatch.setattr(PolicyModule, "score_greedy", breaks)
    module = make_module(folder, task=DATA["grounding"]().task)
    logger = TensorBoardLogger(tmp_path, name="", version="eval-x")
    trainer = make_trainer(tmp_path, [Evaluation()], logger=logger)
    with pytest.raises(RuntimeError, match="the toy broke"):
        trainer.test(module, make_data(module.task, num_test=6), verbose=False)
    assert [row["id"] for row in rows_of(tmp_path / "eval-x" / "answers.rank0.jsonl")] == ["test-0", "test-1"]
    assert not (tmp_path / "eval-x" / "predictions.jsonl").exists()


def test_a_broken_file_of_answers_is_one_sentence(undisturbed, tmp_path, monkeypatch, capsys):
    seed(tmp_path, undisturbed, answers__jsonl="{\n")
    monkeypatch.chdir(tmp_path)
    assert main(undisturbed.words) == 2
    text = capsys.readouterr().err
    assert "answers.jsonl cannot be read as predictions" in text
    assert "remove it to answer again" in text


def test_data_of_another_kind_is_tested_without_files(tmp_path):
    toy_trainer(tmp_path, [Evaluation()]).test(ToyModule(), datamodule=ToyData(), verbose=False)
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
