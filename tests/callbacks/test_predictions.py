"""The lines of predictions.jsonl."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from perception_r1.callbacks.predictions import prediction_row, read_rows, rescore, row_key, row_line, write_rows
from perception_r1.errors import UserError
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, Sample, Score
from perception_r1.rows import Row
from perception_r1.scoring import parse_completions, score_completions
from perception_r1.tasks import TASKS
from tests.callbacks.toy import ToyTask, toy_samples, toy_scored
from tests.hostile import texts

ROWS = {
    "grounding": {"question": "red cup", "box": [10, 20, 60, 80]},
    "counting": {"label": "cup", "points": [[10, 20], [60, 80]], "unit": "pixels"},
    "detection": {"objects": [{"box": [10.5, 20, 60, 80], "label": "dog"}], "tolerance": 1.0},
    "ocr": {"text": "first line\nsecond \u2028 line"},
}
FRAME = ImageSize(width=100, height=90, resized_width=112, resized_height=84)


def sample_of(name: str) -> Sample:
    query, target = TASKS[name]().read_row(Row(ROWS[name], width=100, height=90))
    return Sample(
        id="7", image=Path("a.png"), width=100, height=90, query=query, target=target, source="s", row=ROWS[name]
    )


def scored_completion_of(name: str, codec: str, completion: str, **options: str):
    task = TASKS[name](**options)
    parsed = parse_completions(
        task,
        CODECS[codec],
        samples=[sample_of(name)],
        image_sizes=[FRAME],
        completions=[completion],
        lengths=[17],
        truncated=[True],
    )
    return score_completions(task, parsed, is_evaluation=True)[0]


def test_a_row_is_the_data_row_with_all_that_is_known_about_its_answer():
    assert prediction_row(ToyTask(), replace(toy_scored(toy_samples(1)[0]), prediction=None)) == {
        "id": "toy-0",
        "source": "",
        "width": 64,
        "height": 48,
        "resized_width": 64,
        "resized_height": 48,
        "query": "thing",
        "completion": "there",
        "prediction": None,
        "reward": 1.0,
        "components": {"format": 1.0},
        "metrics": {"accuracy": 1.0},
        "num_tokens": 5,
        "is_truncated": False,
        "target_in_words": "1 box: thing",
        "prediction_in_words": None,
        "target_overlays": [{"shape": [0.25, 0.25, 0.75, 0.75], "caption": "thing"}],
        "predicted_overlays": [],
    }
    row = prediction_row(TASKS["counting"](), scored_completion_of("counting", "qwen2_vl", ""))
    assert {key: row[key] for key in ROWS["counting"]} == ROWS["counting"]
    assert row_key(row) == ("s", "7")
    # a key without a value is left out: `score` would take it for one
    bare = replace(toy_samples(1)[0], row={"count": None, "label": "cup"})
    assert prediction_row(ToyTask(), toy_scored(bare)).keys() & {"count", "label"} == {"label"}


@pytest.mark.parametrize("completion", ["two\nlines", "\u2028\x85\x00", "\ud800", "中文", "\r", ""])
def test_no_completion_breaks_its_line(completion: str, tmp_path: Path):
    line = row_line(prediction_row(ToyTask(), toy_scored(toy_samples(1)[0], completion)))
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert line.isascii()
    (tmp_path / "rows.jsonl").write_text(line)
    assert [row["completion"] for row in read_rows(tmp_path / "rows.jsonl")] == [completion]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", TASKS)
@given(text=texts)
def test_a_row_is_read_back_to_the_same_scored_completion_whatever_was_answered(name: str, codec: str, text: str):
    for completion in (text, TASKS[name]().target_text(sample_of(name), CODECS[codec], FRAME) + text):
        scored = scored_completion_of(name, codec, completion)
        row = json.loads(row_line(prediction_row(TASKS[name](), scored)))
        assert rescore(TASKS[name](), CODECS[codec], sample_of(name), row) == scored


def test_metrics_of_evaluation_alone_are_read_back_too():
    scored = scored_completion_of("ocr", "qwen2_vl", "first line\nthird", word_metrics="stems")
    row = json.loads(row_line(prediction_row(TASKS["ocr"](), scored)))
    assert 0 < row["metrics"]["word_f1"] < 1
    assert rescore(TASKS["ocr"](word_metrics="stems"), CODECS["qwen2_vl"], sample_of("ocr"), row) == scored


def test_what_is_not_a_number_is_null():
    score = Score(reward=1.0, components={"format": math.nan}, metrics={"accuracy": -math.inf})
    line = row_line(prediction_row(ToyTask(), replace(toy_scored(toy_samples(1)[0]), score=score)))
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row["components"], row["metrics"]) == ({"format": None}, {"accuracy": None})


@pytest.mark.parametrize("size", [1, 20, 100])
def test_a_line_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path, size: int):
    line = row_line(prediction_row(ToyTask(), toy_scored(toy_samples(1)[0])))
    path = tmp_path / "rows.jsonl"
    path.write_text(line + line[:size])
    assert list(read_rows(path)) == [json.loads(line)]
    path.write_text(line + line[:-1])  # all but the end of the line: it may be torn for all that one knows
    assert len(list(read_rows(path))) == 1
    path.write_text("")
    assert list(read_rows(path)) == []


@pytest.mark.parametrize("content", [b'{"id": "1",\n{"id": "2"}\n', b"\xff\xfe\n"])
def test_a_file_of_another_kind_is_an_error_of_one_sentence(tmp_path: Path, content: bytes):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl cannot be read as predictions \(.*\); remove it"):
        list(read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="No such file"):
        list(read_rows(tmp_path / "none.jsonl"))


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"id": 1}, {"id": 2}])

    def breaks():
        yield {"id": 3}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_rows(path, breaks())
    assert list(read_rows(path)) == [{"id": 1}, {"id": 2}]
