"""What a report reads of a folder."""

import json
import shutil

import pytest

from perception_r1.errors import UserError
from perception_r1.reporting.folder import Metric, read_record
from tests.reporting.runs import AFTER, BEFORE, COUNTING, OCR, make_evaluation, make_run, row, write_rows


def test_a_run_tells_what_it_was_and_what_came_of_it(tmp_path):
    record = read_record(make_run(tmp_path / "run"))
    assert (record.training, record.status, record.model, record.split) == ("GRPO", "finished", "tiny", "test")
    assert dict(record.task_names) == {"": "counting"}
    assert record.prompt("counting", "red cups") == "Count the red cups"
    assert record.metrics("after")[Metric("counting", "reward")] == 0.625
    assert record.margins("before") == {Metric("counting", "reward"): 0.125}  # the other one is not known
    assert record.primary_metrics == {Metric("counting", "count_accuracy")}
    rewards = {when: [answer.reward for answer in answers.values()] for when, answers in record.answers.items()}
    assert rewards == {"before": list(BEFORE), "after": list(AFTER)}
    answer = next(iter(record.answers["after"].values()))
    assert answer.scores == {"reward": 1.0, "reward/format": 1.0, "count_accuracy": 1.0}
    assert record.image(answer).is_file()


def test_a_prompt_names_the_categories_that_the_task_has(tmp_path):
    options = {"prompt_template": "Find {labels}.", "categories": ["cup", "plate"]}
    task = {"class_path": "perception_r1.tasks.detection.Detection", "init_args": options}
    record = read_record(make_run(tmp_path / "run", task=task))
    assert record.prompt("detection", "") == "Find cup, plate."
    assert record.prompt("another", "spoon") == "spoon"


def test_an_evaluation_has_metrics_and_answers_after_alone(tmp_path):
    record = read_record(make_evaluation(tmp_path / "eval-1"))
    assert (record.is_evaluation, record.training, record.model) == (True, "Evaluation", "tiny")
    assert record.metrics("before") == {}
    assert record.metrics("after")[Metric("counting", "reward")] == 0.625
    assert record.margins("after") == {Metric("counting", "reward"): 0.25}
    assert len(record.answers["after"]) == 4
    assert record.image(next(iter(record.answers["after"].values()))).is_file()


def test_of_a_run_that_goes_on_the_samples_of_validation_are_shown(tmp_path):
    folder = make_run(tmp_path / "run", after=None, status="running")
    write_rows(folder / "predictions" / "val" / "before.jsonl", [row(0, 0.25, id="val-0")])
    record = read_record(folder)
    assert record.split == "val"
    assert [key.id for key in record.answers["before"]] == ["val-0"]
    assert record.answers["after"] == {}


def test_metrics_and_samples_of_several_tasks_belong_to_their_tasks(tmp_path):
    folder = make_run(
        tmp_path / "run",
        task=None,
        tasks={"many": COUNTING, "ocr": OCR},
        after=(1.0, 0.5),
        rows=[row(0, 1.0, source="many"), row(1, 0.5, source="ocr/fox")],
        primary_metrics=["many/count_accuracy", "ocr/edit_distance"],
    )
    card = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(card | {"after": {"many/reward": 1.0, "ocr/reward": 0.5}}))
    record = read_record(folder)
    assert record.metrics("after") == {Metric("counting", "reward"): 1.0, Metric("ocr", "reward"): 0.5}
    assert [(key.task, key.source) for key in record.answers["after"]] == [("counting", ""), ("ocr", "fox")]
    assert record.prompt("ocr", "cups") == "OCR this image."
    assert Metric("ocr", "edit_distance") in record.primary_metrics


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    folder = make_run(tmp_path / "run")
    path = folder / "predictions" / "test" / "after.jsonl"
    good = row(7, 0.5, target_overlays=[{"shape": [0.1, "x"]}, {"shape": [0.1, 0.2]}, 3], width=None)
    nested = "[" * 100_000
    lines = [
        "{",
        "3",
        "null",
        '{"id": 1}',
        '{"id": "1", "reward": NaN}',
        nested,
        json.dumps(good),
        json.dumps(good)[:-9],
    ]
    path.write_bytes("\n".join(lines).encode() + b"\xff\xfe")
    ((key, answer),) = read_record(folder).answers["after"].items()
    assert (key.id, answer.reward, answer.size) == ("test-7", 0.5, (1, 1))
    assert [overlay["shape"] for overlay in answer.target_overlays] == [[0.1, 0.2]]


def test_a_run_without_anything_but_its_card_is_read(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    record = read_record(tmp_path)
    assert (record.status, record.training, record.model) == ("unknown", "Training", "unknown")
    assert record.metrics("after") == record.answers["after"] == {}


@pytest.mark.parametrize(
    "card",
    [
        {"task": 3, "tasks": [], "before": [1], "after": "x", "margins_of_error": 7, "primary_metrics": {"a": 1}},
        {"tasks": {"a": None}, "policy": [], "after": {"a/reward": "high", "b": True, "c": float("nan")}, "status": {}},
    ],
)
def test_values_of_wrong_types_are_left_out(card, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | card))
    record = read_record(folder)
    assert record.metrics("after") == {}
    assert record.primary_metrics <= {Metric("counting", "count_accuracy"), Metric("", "count_accuracy")}
    assert isinstance(record.status, str)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", "{", "run.json cannot be read"),
        ("run.json", "[]", "run.json cannot be read: it must hold names"),
        ("config.yaml", "model: [", "config.yaml cannot be read"),
        ("config.yaml", "a: !!python/object/apply:os.system ['true']", "config.yaml cannot be read"),
    ],
)
def test_a_damaged_file_is_one_sentence(name, text, words, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_record(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_neither_is_one_sentence(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "run.json").unlink()
    for path in (folder, tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"is no run, which has a run\.json"):
            read_record(path)
    shutil.rmtree(folder)
