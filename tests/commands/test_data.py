"""`perception-r1 data`: inspecting data with the configuration of a run."""

import http.server
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from hashlib import sha256
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from perception_r1.cli import main
from perception_r1.commands import data as command
from perception_r1.commands.statistics import DatasetStatistics, collect_statistics, log10_mean_factorial, share_over
from perception_r1.data.convert import convert
from perception_r1.data.samples import load
from perception_r1.data.sources import Coco, Download, Hub, JsonLines, PixMoCount
from perception_r1.errors import UserError
from perception_r1.policy.families import CODECS, QWEN_FAMILIES
from perception_r1.policy.load import load_processor
from perception_r1.records import ImageBytes, Sample
from perception_r1.tasks.counting import Counting, CountingTarget
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr
from tests.policy.oracle import noise
from tests.public_data import coco_file, coco_image, hub_refcoco, instance, picture, write_json

GOOD = {"question": "cup", "box": [10, 20, 50, 80]}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a verb on a task; returns exit status, what it writes, and its errors."""
    monkeypatch.chdir(tmp_path)

    def call(verb: str, *more: object, task: str = "grounding") -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["data", verb, "--task", task, *map(str, more)])
        return status, *capsys.readouterr()

    return call


def write_rows(folder: Path, rows: list, name: str = "rows.jsonl", num_images: int = 3) -> Path:
    for number in range(num_images):
        picture(folder / f"{number}.png", number)
    rows = [{"image": f"{place % num_images}.png"} | row for place, row in enumerate(rows)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_check_shows_what_the_model_is_to_answer(run, tmp_path):
    status, text, _ = run("check", "--data.train_file", write_rows(tmp_path, [GOOD] * 4))
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == "4 rows, 0 of them bad"
    form = (
        r"\d: <\|object_ref_start\|>cup<\|object_ref_end\|><\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>"
    )
    answers = [re.fullmatch(form, line) for line in lines[1:4]]
    assert [[int(number) for number in found.groups()] for found in answers] == [[50, 200, 250, 800]] * 3
    assert lines[4:] == ["drawn in logs/data/grounding.png"]
    with Image.open(tmp_path / "logs" / "data" / "grounding.png") as card:
        assert card.height > 3 * 200


def test_what_is_drawn_was_read_back_from_the_answer(run, tmp_path, monkeypatch, model_folders):
    drawn = []

    def draw_card(image, *, target_overlays, predicted_overlays, fields, **options):
        drawn.append((image.size, list(target_overlays), list(predicted_overlays), fields))
        return Image.new("RGB", (10, 10))

    monkeypatch.setattr(command, "draw_card", draw_card)
    row = {"objects": [{"box": [11, 20, 50, 80], "label": "dog"}, {"box": [0, 0, 200, 100], "label": "cat"}]}
    path = write_rows(tmp_path, [row, {"objects": []}])
    family = f"--model.policy.name={model_folders['qwen2_5_vl']}"
    assert run("check", family, "--data.train_file", path, "--to", "there", task="detection")[0] == 0
    (size, target, predicted, fields), (_, *nothing, empty) = drawn
    assert size == (200, 100)
    assert nothing == [[], []]
    assert [overlay.caption for overlay in predicted] == ["dog", "cat"]
    for one, other in zip(target, predicted, strict=True):
        assert one.shape != other.shape or one.caption == "cat"  # the answer has whole pixels of the resized image
        assert one.shape == pytest.approx(other.shape, abs=1 / 84)
    assert json.loads(fields["answer"])[0]["label"] == "dog"
    assert (fields["target"], empty["target"]) == ("2 boxes: cat, dog", "no objects")
    assert (tmp_path / "there" / "detection.png").is_file()


@pytest.mark.parametrize("to", ["taken", "taken/below", "a" * 300, "a\0b"])
def test_a_place_that_cannot_be_written_to_is_said_before_any_row_is_read(run, tmp_path, to):
    (tmp_path / "taken").write_text("mine")
    rows = write_rows(tmp_path, [{"question": "cup"}])
    status, text, error = run("check", "--data.train_file", rows, "--to", to)
    assert (status, text) == (2, "")
    assert "cannot be written" in error
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("value", ["\\ud800x", "a\\u001b[2J", "a\\nb"])
def test_ids_that_a_terminal_would_obey_are_bad_rows(run, tmp_path, value):
    rows = write_rows(tmp_path, [GOOD])
    rows.write_text(rows.read_text().replace('"image"', f'"id": "{value}", "image"'))
    status, text, _ = run("check", "--data.train_file", rows)
    assert status == 1
    assert "id: must be a text without control characters" in text
    assert "\x1b" not in text


def test_check_names_every_bad_row_and_fails(run, tmp_path):
    rows = [GOOD, GOOD | {"box": [10, 20, 5, 80]}, {"question": "cup"}, GOOD, GOOD | {"image": "none.png"}]
    path = write_rows(tmp_path, rows)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    path.write_text(path.read_text() + json.dumps(GOOD | {"image": "cut.png"}) + "\n{\n")
    status, text, _ = run("check", "--data.train_file", path)
    assert status == 1
    lines = text.splitlines()
    for line, number, word in zip(lines, (2, 3, 5, 6, 7), ("x1 < x2", "box", "none.png", "cut.png", ""), strict=False):
        assert line.startswith(f"{path}:{number}: ")
        assert word in line
    assert lines[5] == "7 rows, 5 of them bad"
    assert [line[:2] for line in lines[6:8]] == ["1:", "4:"]  # the good ones are shown all the same


def test_check_goes_through_all_sources_of_a_split(run, tmp_path):
    files = [write_rows(tmp_path, [GOOD], "a.jsonl"), write_rows(tmp_path, [GOOD, {}], "b.jsonl")]
    sources = {str(n): {"class_path": "JsonLines", "init_args": {"file": str(file)}} for n, file in enumerate(files)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"test": sources}}}))
    status, text, _ = run("check", "-c", "data.yaml", "--split", "test")
    assert status == 1
    assert f"{files[1]}:2: " in text
    assert "3 rows, 1 of them bad" in text


def test_a_row_without_an_answer_to_learn_from_is_told_and_is_not_bad(run, tmp_path):
    path = write_rows(tmp_path, [{"label": "cup", "count": 2}, {"label": "cup", "points": [[10, 20]]}])
    status, text, _ = run("check", "--data.train_file", path, task="counting")
    assert status == 0
    assert "1: has no answer to learn from (sample 1: an answer to learn from needs points or boxes" in text
    assert "2: <|object_ref_start|>cup" in text


def test_check_tells_what_the_model_cannot_take(run, tmp_path):
    long = GOOD | {"question": "cup " * 100}
    path = write_rows(tmp_path, [GOOD, GOOD | {"image": "thin.png", "box": [10, 2, 50, 8]}, long])
    picture(tmp_path / "thin.png", size=(4100, 20))
    status, text, _ = run("check", "--data.train_file", path, "--model.policy.max_prompt_length", 300)
    assert status == 1
    lines = text.splitlines()
    assert lines[0].startswith(f"{path}:2: A picture has 4100 x 20 pixels")
    assert re.match(rf"{path}:3: A prompt has \d+ tokens but max_prompt_length is 300", lines[1])
    assert lines[2] == "3 rows, 2 of them bad"


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_in_which_features_would_be_put_is_a_bad_row(run, tmp_path, token):
    path = write_rows(tmp_path, [GOOD, GOOD | {"question": f"cup {token}"}])
    status, text, _ = run("check", "--data.train_file", path)
    assert status == 1
    assert text.startswith(f"{path}:2: A prompt has {token} in its text, which stands for what the model sees")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: verb"),
        (["count"], "invalid choice: 'count' (choose from 'check', 'stats', 'convert', 'fetch')"),
        (["check"], "--task is needed, one of all, counting, detection, grounding, ocr; or -c with"),
    ],
)
def test_an_unknown_verb_is_one_sentence(capsys, words, message):
    assert main(["data", *words]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("perception-r1 data: error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_help_tells_the_verbs(capsys):
    assert main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: perception-r1 data {check,stats,convert,fetch}" in text
    assert all(f" {verb}: " in text for verb in ("check", "stats", "convert", "fetch"))
    assert main(["data", "check", "--help"]) == 0
    text = capsys.readouterr().out
    words = ("perception-r1 data check --task NAME", "--split", "--to", "--data.help")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("check", [], "synthetic scenes need no check and no conversion"),
        ("convert", [], "convert needs --to FOLDER"),
        ("convert", ["--to", "x"], "synthetic scenes need no check"),
        ("fetch", [], "synthetic scenes need no check"),
        (
            "fetch",
            ["--data.train_file", "rows.jsonl"],
            "rows.jsonl names no images by URL, there is nothing",
        ),
        ("check", ["--data.train_file", "none.jsonl"], "none.jsonl: cannot be read"),
        ("check", ["--data.test_file", "rows.jsonl"], "the configuration has no train rows; give --split test"),
        ("stats", ["--data.test_file", "rows.jsonl"], "the configuration has no train rows; give --split test"),
        ("convert", ["--data.train_file", "bad.jsonl", "--to", "x"], "bad.jsonl:1: box: is missing"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(run, tmp_path, verb, options, message):
    write_rows(tmp_path, [GOOD])
    write_rows(tmp_path, [{"question": "cup"}], "bad.jsonl")
    status, out, errors = run(verb, *options)
    assert (status, out) == (2, "")
    assert message in errors
    assert errors.startswith("perception-r1 data: error: ")
    assert errors.count("\n") == 1


# ------------------------------------------------------------------------------------------------- stats


def table_of(text: str) -> dict[str, str]:
    rows = [line.strip("│ ").split(" │ ") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


def test_stats_are_those_worked_out_by_hand(run, tmp_path, folder):
    rows = [{"label": "cup", "points": [[10 * k, 5] for k in range(1, n + 1)]} for n in (3, 4, 5)]
    path = write_rows(tmp_path, [*rows, {"label": "cup", "count": 200}], num_images=2)
    picture(tmp_path / "0.png", size=(100, 60))
    picture(tmp_path / "thin.png", size=(1000, 4))
    thin = {"image": "thin.png", "label": "cup", "points": []}
    path.write_text(path.read_text() + json.dumps(thin) + "\n" + json.dumps({"image": "0.png"}) + "\n")
    options = [f"--model.policy.name={folder}", "--model.max_new_tokens=20", "--model.policy.max_prompt_length=1"]
    status, text, _ = run("stats", "--data.train_file", path, *options, task="counting")
    found = table_of(text)
    assert status == 0
    assert text.startswith("train")
    # a bad row is no sample; pictures: 100 x 60 twice, 200 x 100 twice, 1000 x 4
    assert found["samples"] == "5"
    assert found["different images"] == "3"
    assert found["image width (least, median, most)"] == "100, 200, 1000"
    assert found["image height"] == "4, 60, 100"
    assert found["images the model cannot take"] == "1"
    assert found["samples without an answer to learn from"] == "1"
    assert found["objects"] == "0, 4, 200"
    assert found["objects, mean"] == "42.40"
    expected = math.log10((6 + 24 + 120 + math.factorial(200) + 1) // 5)
    assert found["log10 of the mean n!"] == f"{expected:.2f}"
    processor, task = load_processor(folder), Counting()
    samples = [sample for sample in load(JsonLines(path), task, on_bad_row="skip")]
    answers = [
        len(
            processor.encode_targets(
                [task.target_text(s, CODECS["qwen2_vl"], processor.image_size(s.width, s.height))], 0
            )[0]
        )
        for s in samples[:3]
    ]
    over = sum(answer > 20 for answer in answers) / 3
    assert found["answer tokens"] == f"{min(answers)}, {sorted(answers)[1]}, {max(answers)}; {over:.2%} over 20"
    assert found["prompt tokens"].endswith("; 100.00% over 1")


@pytest.mark.slow
def test_stats_of_synthetic_scenes_count_each_scene_once(run):
    status, text, _ = run("stats", "--data.num_val=30", "--split", "val", "--data.eval_split", "train")
    found = table_of(text)
    assert status == 0
    assert found["samples"] == found["different images"] == "30"
    assert found["image height"] == "140, 140, 140"
    assert found["log10 of the mean n!"] == "0.00"
    assert "over 48" in found["answer tokens"]


def test_stats_have_a_table_for_each_source(run, tmp_path):
    files = [write_rows(tmp_path, [GOOD], "a.jsonl"), write_rows(tmp_path, [GOOD, GOOD], "b.jsonl")]
    named = zip(("one", "two"), files, strict=True)
    sources = {name: {"class_path": "JsonLines", "init_args": {"file": str(file)}} for name, file in named}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"val": sources}}}))
    status, text, _ = run("stats", "-c", "data.yaml", "--split", "val")
    assert status == 0
    first, second = re.split(r"^two *$", text, flags=re.MULTILINE)
    assert first.startswith("one ")
    assert (table_of(first)["samples"], table_of(second)["samples"]) == ("1", "2")


def test_stats_count_the_images_that_are_trained_and_tested_on(run, tmp_path):
    images = {"a": "01", "b": "2", "c": "1312", "d": "3"}
    files = {
        name: write_rows(tmp_path, [{**GOOD, "image": f"{number}.png"} for number in numbers], f"{name}.jsonl", 4)
        for name, numbers in images.items()
    }
    sources = {name: {"class_path": "JsonLines", "init_args": {"file": str(file)}} for name, file in files.items()}
    config = {split: {name: sources[name] for name in names} for split, names in (("train", "ab"), ("test", "cd"))}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"init_args": config}}))
    status, text, _ = run("stats", "-c", "data.yaml")
    assert status == 0
    assert [line for line in text.splitlines() if line.endswith(" too")] == [
        "1 of the 3 images of c (test) are in a (train) too",
        "1 of the 3 images of c (test) are in b (train) too",
    ]


SIZES = [(640, 480), (333, 1000), (5000, 200), (28, 28)]


@pytest.mark.parametrize("bounds", [{}, {"max_pixels": 200_000}, {"min_pixels": 400_000}], ids=["own", "max", "min"])
@pytest.mark.parametrize("family", [name for name in CODECS if name in QWEN_FAMILIES])
def test_prompts_are_as_long_as_the_real_ones(model_folders, family, bounds):
    processor, task = load_processor(model_folders[family], **bounds), Grounding()
    samples = [
        Sample(id="", image=noise(*size), width=size[0], height=size[1], query="red, red cup", target=None)
        for size in SIZES
    ]
    chats = [task.messages(sample) for sample in samples]
    encoded = processor.encode(chats, [[sample.image] for sample in samples], max_tokens=None)
    found = [
        processor.num_prompt_tokens(chat, processor.image_size(sample.width, sample.height))
        for chat, sample in zip(chats, samples, strict=True)
    ]
    assert tuple(found) == tuple(encoded.lengths)
    assert tuple(processor.image_size(sample.width, sample.height) for sample in samples) == encoded.image_sizes


def test_the_mean_factorial_of_hundreds_of_objects_does_not_overflow():
    assert log10_mean_factorial([3, 4]) == pytest.approx(math.log10(15))
    assert log10_mean_factorial([200]) == pytest.approx(math.log10(math.factorial(200)))
    assert log10_mean_factorial([1, 1, 2000]) == pytest.approx(math.log10(math.factorial(2000) // 3))
    assert log10_mean_factorial([0, 1]) == 0


def test_shares_over_a_limit():
    assert share_over([1, 2, 3, 4], 4) == 0
    assert share_over([1, 2, 3, 4], 0) == 1
    assert share_over([1], None) is None
    assert share_over([], 3) is None


def test_statistics_open_no_picture(folder):
    target = CountingTarget(count=2, points=((0.5, 0.5), (0.1, 0.1)))
    names = ["a", "b", "a"]
    samples = [
        Sample(id=str(n), image=Path(name), width=56, height=28, query="cup", target=target)
        for n, name in enumerate(names)
    ]
    found = collect_statistics(samples, Counting(), CODECS["qwen2_vl"], load_processor(folder))
    assert isinstance(found, DatasetStatistics)
    assert (found.widths, found.heights, found.num_objects) == ([56] * 3, [28] * 3, [2] * 3)
    assert found.images == {"a", "b"}
    assert len(set(found.prompt_tokens)) == len(set(found.answer_tokens)) == 1


# ----------------------------------------------------------------------------------------------- convert


def make_json_lines(root: Path):
    rows = [GOOD | {"id": "a"}, GOOD | {"box": [0.1, 0.2, 0.5, 0.8], "unit": "fractions", "extra": [1, None, "é"]}]
    return JsonLines(write_rows(root, rows)), Grounding()


def make_coco(root: Path):
    for number in (1, 2):
        picture(root / "pictures" / f"{number}.jpg", number)
    boxes = [instance(5, 1, 18, (20.4, 10, 180, 40.7), area=77.5), instance(6, 1, 1, (0, 0, 30, 30), iscrowd=1)]
    path = write_json(root / "i.json", coco_file([coco_image(1, "1.jpg"), coco_image(2, "2.jpg")], boxes))
    source = Coco(path, root / "pictures")
    return source, Detection(categories=source.labels())


def make_hub(root: Path):
    hub_refcoco(root / "raw").to_parquet(root / "r.parquet")
    columns = {"image": "image", "question": "answer", "box": "bbox", "id": "question_id"}
    return Hub(str(root / "r.parquet"), columns, corners=False), Grounding()


def make_text(root: Path):
    rows = [{"text": "first\nsecond \u2028 \ud83d\ude00", "id": 7}, {"text": ""}]
    return JsonLines(write_rows(root, rows)), Ocr()


@pytest.mark.parametrize("make", [make_json_lines, make_coco, make_hub, make_text])
def test_what_is_converted_reads_back_to_the_same_samples(tmp_path, monkeypatch, make):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "source").mkdir()
    source, task = make(tmp_path / "source")
    samples = list(load(source, task))
    folder = tmp_path / "a" / "b"
    assert convert(load(source, task), folder) == len(samples) > 1
    found = list(load(JsonLines(folder / "data.jsonl"), task))
    rows = {row["id"]: row["image"] for row in map(json.loads, (folder / "data.jsonl").read_text().splitlines())}
    for one, other in zip(found, samples, strict=True):
        names = ("id", "width", "height", "query", "target")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
        if isinstance(other.image, ImageBytes):
            assert one.image.read_bytes() == other.image.read()
            assert one.image.parent == folder / "images"
        else:
            assert one.image.resolve() == other.image.resolve()
            assert not Path(rows[one.id]).is_absolute()  # the folders may be moved together
    blobs = {str(sample.image) for sample in samples if isinstance(sample.image, ImageBytes)}
    assert len(list(folder.glob("images/*"))) == len(blobs)
    assert sorted(path.name for path in folder.iterdir()) == ["data.jsonl"] + (["images"] if blobs else [])
    assert convert(load(JsonLines(folder / "data.jsonl"), task), tmp_path / "again") == len(samples)
    again = list(load(JsonLines(tmp_path / "again" / "data.jsonl"), task))
    assert [sample.target for sample in again] == [sample.target for sample in samples]


def test_convert_writes_each_source_into_a_folder_of_its_name(run, tmp_path):
    files = [write_rows(tmp_path, [GOOD], "a.jsonl"), write_rows(tmp_path, [GOOD, GOOD], "b.jsonl")]
    named = zip(("one", "two"), files, strict=True)
    sources = {name: {"class_path": "JsonLines", "init_args": {"file": str(file)}} for name, file in named}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"train": sources}}}))
    status, text, _ = run("convert", "-c", "data.yaml", "--to", "out")
    assert (status, text) == (0, "1 rows in out/one/data.jsonl\n2 rows in out/two/data.jsonl\n")
    assert run("check", "--data.train_file", "out/two/data.jsonl")[0] == 0
    status, _, errors = run("convert", "-c", "data.yaml", "--to", "out")
    assert status == 2
    assert "out/one/data.jsonl exists; move it away, or choose another folder." in errors


def test_bad_rows_are_left_out_where_that_is_asked_for(run, tmp_path):
    path = write_rows(tmp_path, [GOOD, {}, GOOD])
    status, text, _ = run("convert", "--data.train_file", path, "--data.on_bad_row", "skip", "--to", "out")
    assert (status, text) == (0, "2 rows in out/data.jsonl\n")
    assert [json.loads(line)["id"] for line in Path("out/data.jsonl").read_text().splitlines()] == ["1", "3"]


def test_a_conversion_that_stops_leaves_no_file_of_rows_and_can_be_repeated(tmp_path):
    source, task = make_json_lines(tmp_path)
    samples = list(load(source, task))

    def stops():
        yield samples[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        convert(stops(), tmp_path / "out")
    assert not (tmp_path / "out" / "data.jsonl").exists()
    assert convert(samples, tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.jsonl"]
    with pytest.raises(UserError, match=r"data\.jsonl exists"):
        convert(samples, tmp_path / "out")


SLOW = """
import sys, time
from pathlib import Path
from perception_r1.data.convert import convert
from perception_r1.records import Sample

def samples():
    for n in range(10**6):
        yield Sample(id=str(n), image=Path("a.png"), width=1, height=1, query="", target=None, row={"text": "x" * 9999})

convert(samples(), Path(sys.argv[1]))
"""


def test_a_conversion_that_is_killed_leaves_no_file_of_rows(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "out")])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "data.jsonl.tmp"]


# ------------------------------------------------------------------------------------------------- fetch


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path):
    """Serves the folder `web`."""
    (tmp_path / "web").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web")) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_fetch_puts_the_pictures_where_the_rows_expect_them(run, tmp_path, monkeypatch, server):
    data = io.BytesIO()
    Image.new("RGB", (200, 100)).save(data, "PNG")
    (tmp_path / "web" / "a").write_bytes(data.getvalue())
    digest = sha256(data.getvalue()).hexdigest()
    wanted = [Download(url=f"{server}/a", sha256=digest, path=tmp_path / "images" / digest)]
    monkeypatch.setattr(PixMoCount, "downloads", lambda source: iter(wanted))
    source = {"class_path": "PixMoCount", "init_args": {"images": str(tmp_path / "images"), "split": "train"}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"train": {"p": source}}}}))
    words = ("fetch", "-c", "data.yaml", "--num_threads", 2)
    assert run(*words, task="counting")[:2] == (0, "1 fetched, 0 already there, 0 failed\n")
    assert (tmp_path / "images" / digest).read_bytes() == data.getvalue()
    assert run(*words, task="counting")[:2] == (0, "0 fetched, 1 already there, 0 failed\n")
    wanted.append(Download(url=f"{server}/none", sha256="0" * 64, path=tmp_path / "images" / ("0" * 64)))
    status, text, _ = run(*words, task="counting")
    assert (status, text) == (1, "0 fetched, 1 already there, 1 failed (failures.jsonl says why)\n")
    assert "404" in (tmp_path / "images" / "failures.jsonl").read_text()
    status, _, errors = run("fetch", "-c", "data.yaml", "--num_threads", 0, task="counting")
    assert status == 2
    assert "num_threads must be at least 1, got 0" in errors
