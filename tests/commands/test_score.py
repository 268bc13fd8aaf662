import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perception_r1.commands import score
from perception_r1.tasks import TASKS
from tests.tasks import golden

REF = "<|object_ref_start|>cup<|object_ref_end|>"
GROUNDING = {
    "question": "cup",
    "box": [0, 0, 50, 100],
    "width": 100,
    "height": 100,
    "completion": REF + "<|box_start|>(0,0),(500,1000)<|box_end|>",
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[list[dict[str, Any]], str]:
    """Output rows and summary of a run that succeeds."""
    assert score.main([str(arg) for arg in args]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def fail(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The sentence of a run that fails before it scores anything."""
    assert score.main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("perception-r1 score: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("name", "codec", "missing_weight"),
    [
        ("grounding", "qwen2_vl", None),
        ("counting", "qwen2_vl", None),
        ("detection", "qwen2_5_vl", 0.5),
        ("detection", "qwen2_5_vl", 0),
        ("ocr", "qwen2_vl", None),
        ("ocr", "qwen2_5_vl", None),
    ],
)
def test_golden_vectors(tmp_path, capsys, name, codec, missing_weight):
    rows = [row for row in golden.read(name) if row.get("missing_weight") == missing_weight]
    options = [] if missing_weight is None else ["--missing_weight", missing_weight]
    file = write(tmp_path / "rows.jsonl", rows)
    found, summary = run(capsys, "--task", name, "--codec", codec, file, *options)
    assert len(found) == len(rows) > 0
    for line, row in zip(found, rows, strict=True):
        flat = {"reward": line["reward"], **line["components"], **line["metrics"]}
        assert {key: flat[key] for key in row["expect"]} == pytest.approx(row["expect"], abs=1e-6)
    assert summary.startswith(f"{name}: {len(rows)} completions\n  reward ")
    metrics = dict(line.split() for line in summary.splitlines()[1:])
    assert float(metrics["reward"]) == pytest.approx(sum(line["reward"] for line in found) / len(found), rel=1e-5)
    assert list(metrics)[: 1 + len(TASKS[name].component_names)] == [
        "reward",
        *(f"reward/{part}" for part in TASKS[name].component_names),
    ]


def test_a_line_says_everything_about_its_completion(tmp_path, capsys):
    found, summary = run(
        capsys, "--task", "grounding", "--codec", "qwen2_vl", write(tmp_path / "a", [{**GROUNDING, "id": "x"}])
    )
    assert found == [
        {
            "id": "x",
            "reward": 2.0,
            "components": {"format": 1.0, "iou": 1.0},
            "metrics": {
                "accuracy_50": 1.0,
                "accuracy_75": 1.0,
                "accuracy_95": 1.0,
                "accuracy_mean": 1.0,
                "center_accuracy": 1.0,
                "false_positives": 0.0,
                "false_negatives": 0.0,
            },
            "prediction": {"boxes": [[0.0, 0.0, 50.0, 100.0]]},
            "published": {
                "accuracy_50": 1.0,
                "accuracy_75": 1.0,
                "accuracy_95": 1.0,
                "accuracy_mean": 1.0,
                "center_accuracy": 1.0,
            },
        }
    ]
    assert "accuracy_50" in summary


def test_a_bad_answer_is_a_score_and_not_an_error(tmp_path, capsys):
    rows = ["", {**GROUNDING, "completion": "\ud800"}, "  ", {**GROUNDING, "completion": ""}]
    found, _ = run(capsys, "--task", "grounding", "--codec", "qwen3_vl", write(tmp_path / "a", rows))
    assert [(line["reward"], line["prediction"]) for line in found] == [(0.0, None), (0.0, None)]


def test_options_of_the_task_count(tmp_path, capsys):
    command = ["--task", "grounding", "--codec", "qwen2_vl", write(tmp_path / "a", [GROUNDING])]
    assert run(capsys, *command, "--iou_weight", "3")[0][0]["reward"] == 4
    assert run(capsys, *command, "--think", "true")[0][0]["reward"] == 0
    thought = {**GROUNDING, "completion": f"<think>hm</think><answer>{GROUNDING['completion']}</answer>"}
    command[-1] = write(tmp_path / "b", [thought])
    assert run(capsys, *command, "--think", "true")[0][0]["reward"] == 2

    crossed = {
        "label": "cup", "points": [[750, 750], [250, 250]], "width": 1000, "height": 1000,
        "completion": REF + "<|box_start|>(200,200),(300,300)<|box_end|><|box_start|>(700,700),(800,800)<|box_end|>",
    }  # fmt: skip
    command = ["--task", "counting", "--codec", "qwen2_vl", write(tmp_path / "c", [crossed])]
    assert run(capsys, *command)[0][0]["reward"] == pytest.approx(1)
    assert run(capsys, *command, "--matching", "sequential")[0][0]["reward"] == pytest.approx(0.5)


def test_the_size_comes_from_the_upright_image_next_to_the_file(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    picture = Image.new("RGB", (200, 100))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "pictures" / "a.jpg", exif=exif)
    row = {**GROUNDING, "image": "pictures/a.jpg", "box": [0, 0, 50, 200]}
    del row["width"], row["height"]
    found, _ = run(capsys, "--task", "grounding", "--codec", "qwen2_vl", write(tmp_path / "a", [row]))
    assert found[0]["reward"] == 2
    assert found[0]["prediction"] == {"boxes": [[0.0, 0.0, 50.0, 200.0]]}


def test_qwen2_5_numbers_are_pixels_of_the_resized_image(tmp_path, capsys):
    # 2000 x 1000 pixels are more than 28 * 28 * 1280: 1416.7 x 708.4, down to 1400 x 700
    row = {"objects": [{"box": [0, 0, 1000, 500], "label": "cup"}], "width": 2000, "height": 1000}
    row |= {"completion": '[{"bbox_2d": [0, 0, 700, 350], "label": "cup"}]'}
    command = ["--task", "detection", "--codec", "qwen2_5_vl", write(tmp_path / "a", [row])]
    assert run(capsys, *command)[0][0]["components"]["iou"] == pytest.approx(1)
    # at most 200,000: 632.5 x 316.2, down to 616 x 308
    row["completion"] = '[{"bbox_2d": [0, 0, 308, 154], "label": "cup"}]'
    command[-1] = write(tmp_path / "b", [row])
    assert run(capsys, *command, "--max_pixels", "200000")[0][0]["components"]["iou"] == pytest.approx(1)


def test_detection_knows_the_labels_that_the_file_uses(tmp_path, capsys):
    row = {"objects": [{"box": [0, 0, 50, 50], "label": "unicorn"}], "width": 100, "height": 100}
    row |= {"completion": '[{"bbox_2d": [0, 0, 500, 500], "label": "unicorn"}]'}
    command = ["--task", "detection", "--codec", "qwen3_vl", write(tmp_path / "a", [row])]
    found, summary = run(capsys, *command)
    assert found[0]["reward"] == 3
    assert found[0]["prediction"] == {"objects": [{"box": [0.0, 0.0, 50.0, 50.0], "label": "unicorn"}]}
    assert dict(line.split() for line in summary.splitlines()[1:])["ap50"] == "1"
    assert "'unicorn'" in fail(capsys, *command, "--categories", '["cat"]')


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GROUNDING, "{"], [":2: ", "JSON"]),
        ([GROUNDING, "[1]"], [":2: ", "JSON object"]),
        ([GROUNDING, "[" * 100_000], [":2: ", "JSON"]),
        (['{"box": ' + "9" * 5000 + "}"], [":1: ", "JSON"]),
        ([{**GROUNDING, "completion": None}], [":1: ", "completion"]),
        ([{**GROUNDING, "completion": 3}], [":1: ", "completion"]),
        ([{key: value for key, value in GROUNDING.items() if key != "completion"}], [":1: ", "completion"]),
        ([{key: value for key, value in GROUNDING.items() if key != "box"}], [":1: ", "box"]),
        ([{key: value for key, value in GROUNDING.items() if key != "height"}], [":1: ", "height"]),
        ([{**GROUNDING, "width": None, "height": None}], [":1: ", "width", "image"]),
        ([{**GROUNDING, "width": None, "height": None, "image": "no.png"}], [":1: ", "no.png"]),
        ([GROUNDING, {**GROUNDING, "width": True}], [":2: ", "width"]),
        ([GROUNDING, {**GROUNDING, "box": [0, 0, 500, 100]}], [":2: ", "box", "inside"]),
        ([], ["empty"]),
        (["", " "], ["empty"]),
    ],
)
def test_a_bad_file_is_one_sentence_and_nothing_is_scored(tmp_path, capsys, rows, words):
    file = write(tmp_path / "rows.jsonl", rows)
    sentence = fail(capsys, "--task", "grounding", "--codec", "qwen2_vl", file)
    assert all(word in sentence for word in [str(file), *words])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["task"]),
        (["--task"], ["--task"]),
        (["--task", "ocr"], ["codec"]),
        (["--task", "poetry", "--codec", "qwen2_vl", "x"], ["--task", "'poetry'", "grounding"]),
        (["--task", "ocr", "--codec", "gpt", "x"], ["--codec", "'gpt'", "qwen2_vl"]),
        (["--task", "ocr", "--codec", "qwen2_vl", "none.jsonl"], ["none.jsonl", "No such file"]),
        (["--task", "ocr", "--codec", "qwen2_vl", "."], ["cannot be read"]),
        (["--task", "ocr", "--codec", "qwen2_vl", "x", "--missing_weight", "0"], ["--missing_weight"]),
        (["--task", "counting", "--codec", "qwen2_vl", "x", "--matching", "greedy"], ["--matching", "bipartite"]),
        (["--task", "grounding", "--codec", "qwen2_vl", "x", "--iou_weight", "much"], ["--iou_weight", "much"]),
    ],
)
def test_a_bad_command_line_is_one_sentence(capsys, args, words):
    sentence = fail(capsys, *args)
    assert all(word in sentence for word in words)


def test_bounds_of_pixels_that_contradict_each_other_are_one_sentence(tmp_path, capsys):
    bounds = "--min_pixels", "9", "--max_pixels", "3"
    sentence = fail(
        capsys, "--task", "grounding", "--codec", "qwen2_vl", write(tmp_path / "rows", [GROUNDING]), *bounds
    )
    assert "min_pixels must be from 1 to max_pixels, not 9 with 3" in sentence


def test_options_that_the_task_refuses(tmp_path, capsys):
    file = write(tmp_path / "a", [GROUNDING])
    assert "iou_weight" in fail(capsys, "--task", "grounding", "--codec", "qwen2_vl", file, "--iou_weight", "-1")


def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    assert "UTF-8" in fail(capsys, "--task", "ocr", "--codec", "qwen2_vl", tmp_path / "a")


def test_a_side_too_long_for_smart_resize(tmp_path, capsys):
    row = {**GROUNDING, "width": 30_000}
    assert ":1: width" in fail(capsys, "--task", "grounding", "--codec", "qwen2_5_vl", write(tmp_path / "a", [row]))


@pytest.mark.parametrize("name", TASKS)
def test_help_shows_the_options_of_the_task(capsys, name):
    assert score.main(["--task", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--think" in text
    assert ("--missing_weight" in text) == (name == "detection")
    assert ("--matching" in text) == (name in ("counting", "detection"))
