import contextlib
import json
import logging
import os
import resource
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perception_r1.data.samples import load
from perception_r1.data.sources import Conversations, DataError, JsonLines, MsSwift, PerceptionR1, VlmR1
from perception_r1.records import LabelledBox
from perception_r1.tasks import TASKS
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr
from tests.public_data import picture

BOX = (0.1, 0.1, 0.35, 0.5)
"""[20, 10, 70, 50] in a picture of 200 x 100 pixels."""


@pytest.fixture
def write(tmp_path):
    """Writes rows as a list (.json) or one a line, beside a picture `a.png`; a text is written as it is."""

    def write(rows, name="rows.jsonl"):
        picture(tmp_path / "a.png")
        rows = rows if isinstance(rows, str) else [{"image": "a.png", **row} for row in rows]
        if isinstance(rows, str):
            text = rows
        else:
            text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


# ------------------------------------------------------------------------------------------------- own form


@pytest.mark.parametrize(
    ("unit", "box"),
    [
        ({}, [20, 10, 70, 50]),
        ({"unit": "pixels"}, [20, 10, 70, 50]),
        ({"unit": "thousandths"}, [100, 100, 350, 500]),
        ({"unit": "percent"}, [10, 10, 35, 50]),
        ({"unit": "fractions"}, BOX),
    ],
)
def test_units_are_those_of_the_row(write, unit, box):
    (sample,) = load(JsonLines(write([{"question": "dog", "box": box, **unit}])), Grounding())
    assert sample.target.box == pytest.approx(BOX, abs=1e-12)
    points = [box[:2], box[2:]]
    (sample,) = load(JsonLines(write([{"label": "dog", "points": points, **unit}])), Counting())
    assert sample.target.points == (pytest.approx(BOX[:2]), pytest.approx(BOX[2:]))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"unit": "inches"}, "unit: must be one of pixels, fractions, percent, thousandths, got 'inches'"),
        ({"unit": 3}, "unit: must be one of pixels"),
        ({"unit": "fractions"}, "box: must lie inside the image of 1 x 1 fractions"),
        ({"unit": "percent", "box": [0, 0, 101, 5]}, "box: must lie inside the image of 100 x 100 percent"),
        ({"box": [20, 10, 200.5, 50]}, "box: must lie inside the image of 200 x 100 pixels"),
        ({"tolerance": 1.5}, "tolerance: must be a number of pixels from 0 to 1, got 1.5"),
        ({"tolerance": "1"}, "tolerance: must be a number"),
        ({"tolerance": float("nan")}, "tolerance: must be a number"),
        ({"tolerance": 1, "box": [20, 10, 201.5, 50]}, "box: must lie inside"),
        ({"tolerance": 1, "unit": "fractions", "box": [0.1, 0.1, 1.006, 0.5]}, "box: must lie inside"),
        ({"tolerance": 1, "unit": "fractions", "box": [0.1, 0.1, 1.0, 1.011]}, "box: must lie inside"),
    ],
)
def test_a_wrong_unit_slack_or_frame_is_named(write, row, sentence):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: {sentence}"):
        load(JsonLines(write([{"question": "dog", "box": [20, 10, 70, 50], **row}])), Grounding())


@pytest.mark.parametrize(
    ("unit", "box"),
    [("pixels", [20, -1, 201, 50]), ("fractions", [0.1, -0.01, 1.005, 0.5]), ("percent", [10, -1, 100.5, 50])],
)
def test_slack_is_in_pixels_whatever_the_unit(write, unit, box):
    row = {"question": "dog", "box": box, "unit": unit, "tolerance": 1}
    (sample,) = load(JsonLines(write([row])), Grounding())
    assert sample.target.box == pytest.approx((0.1, 0.0, 1.0, 0.5))


def test_a_json_list_is_read_like_lines(write):
    rows = [{"text": "one"}, {"text": "two", "id": "x"}]
    lines, items = JsonLines(write(rows)), JsonLines(write(rows, "rows.json"))
    assert [row.values for row in lines] == [row.values for row in items]
    assert [sample.id for sample in load(items, Ocr())] == ["1", "x"]
    with pytest.raises(DataError, match=r"rows\.json:2: text: is missing"):
        load(JsonLines(write([{"text": "a"}, {}], "rows.json")), Ocr())


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '"a"', "3", "[1", "NaN", "[" * 100_000, "[" + "9" * 5000 + "]", "[] []"]
)
def test_a_json_file_that_is_no_list_is_an_error_of_one_sentence(write, text):
    with pytest.raises(DataError, match=r"rows\.json: must be a JSON list of objects") as caught:
        load(JsonLines(write(text, "rows.json")), Ocr())
    assert "\n" not in str(caught.value)


def test_a_json_list_that_is_empty_or_no_utf8_is_an_error(write):
    with pytest.raises(DataError, match="is empty"):
        load(JsonLines(write("[]", "rows.json")), Ocr())
    path = write("[]", "rows.json")
    path.write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(DataError, match="must be a JSON list"):
        load(JsonLines(path), Ocr())
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.json: cannot be read \(No such file"):
        load(JsonLines(path), Ocr())
    path.mkdir()
    with pytest.raises(DataError, match=r"rows\.json: cannot be read \(Is a directory"):
        load(JsonLines(path), Ocr())
    os.mkfifo(path.with_name("pipe"))  # opened, it would wait for somebody to write
    for odd in (path.with_name("pipe"), Path("/dev/zero")):
        with pytest.raises(DataError, match=f"^{odd}: must be a file, not a pipe or a device$"):
            load(JsonLines(odd), Ocr())


def test_pictures_may_lie_in_another_folder(write, tmp_path):
    picture(tmp_path / "elsewhere" / "b.png")
    (sample,) = load(JsonLines(write([{"image": "b.png", "text": "x"}]), images=tmp_path / "elsewhere"), Ocr())
    assert sample.image == tmp_path / "elsewhere" / "b.png"


def test_a_name_with_line_breaks_makes_no_message_of_several_lines(write, caplog):
    path = write([{"text": "x"}, {"image": "a\nb\u2028c.png", "text": "x"}])
    with pytest.raises(DataError, match="no such file") as caught:
        load(JsonLines(path), Ocr())
    assert len(str(caught.value).splitlines()) == 1
    with caplog.at_level(logging.WARNING):
        load(JsonLines(path), Ocr(), on_bad_row="skip")
    assert len(caplog.records[0].getMessage().splitlines()) == 1


# ------------------------------------------------------------------------------------------------- pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one byte of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "has none of the known forms"),
        (b"GIF89a", "cannot read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "has none of the known forms"),
        (png_header(20_000, 20_000), "has more than .* pixels, make it smaller"),
        (png_header(2**31 - 1, 2**31 - 1), "cannot read|has more than"),
        (png_header(0, 5), "cannot read"),
        (png_header(64, 64), "truncated"),
    ],
)
@pytest.mark.parametrize("check", ["decode", "header"])
def test_a_hostile_picture_costs_nothing_and_spoils_its_row_only(write, tmp_path, data, sentence, check):
    (tmp_path / "bad.png").write_bytes(data)
    path = write([{"text": "fine"}, {"text": "bad", "image": "bad.png"}])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: image: .*({sentence})"):
        load(JsonLines(path), Ocr(), image_check=check)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; 20,000 x 20,000 are a million
    assert len(load(JsonLines(path), Ocr(), on_bad_row="skip", image_check=check)) == 1


# ------------------------------------------------------------------------------------------------- conversations

FOX = {
    "image": "a.png",
    "len": 826,
    "conversations": [
        {"from": "human", "value": "<image>\nOCR this image."},
        {"from": "gpt", "value": " First line\nsecond line"},
    ],
}


@pytest.mark.parametrize("name", ["fox.json", "pages.jsonl"])
def test_the_last_answer_of_a_conversation_is_the_text_of_the_page(write, name):
    turns = [*FOX["conversations"], {"from": "human", "value": "again"}, {"from": "assistant", "value": "last"}]
    samples = load(Conversations(write([FOX, {**FOX, "conversations": turns, "id": "two"}], name)), Ocr())
    assert [(sample.id, sample.target.text) for sample in samples] == [
        ("1", " First line\nsecond line"),
        ("two", "last"),
    ]


@pytest.mark.parametrize(
    ("conversations", "sentence"),
    [
        (None, 'conversations: must have a turn from "gpt"'),
        ([], 'conversations: must have a turn from "gpt"'),
        ("gpt", 'conversations: must have a turn from "gpt"'),
        ([3, None, {"from": "human", "value": "x"}], 'conversations: must have a turn from "gpt"'),
        ([{"from": ["gpt"], "value": "x"}], 'conversations: must have a turn from "gpt"'),
        ([{"from": "gpt"}], "text: is missing"),
        ([{"from": "gpt", "value": 5}], "text: must be a text, got 5"),
    ],
)
def test_a_conversation_without_an_answer_is_named(write, conversations, sentence):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: {sentence}"):
        load(Conversations(write([{"conversations": conversations}])), Ocr())


# ------------------------------------------------------------------------------------------------- Perception-R1


def read_one(path, task, **options):
    (sample,) = load(PerceptionR1(path, **options), task)
    return sample.query, sample.target


@pytest.mark.parametrize("name", ["rec.json", "rec.jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        {"solution": [100, 100, 350, 500]},
        {"solution": "[100, 100, 350, 500]"},
        {"solution": " (100.0, 100, 350, 500) "},
        {"solution": [20, 10, 70, 50], "normalized_solution": [100, 100, 350, 500]},
        {"solution": "[20, 10, 70, 50]", "normalized_solution": "[100, 100, 350, 500]"},
    ],
)
def test_a_box_is_one_in_thousandths(write, name, row):
    query, target = read_one(write([{"problem": "the dog", **row}], name), Grounding())
    assert (query, target.box) == ("the dog", BOX)


def test_the_unit_may_be_told(write):
    row = {"problem": "the dog", "solution": [20, 10, 70, 50]}
    assert read_one(write([row]), Grounding(), unit="pixels")[1].box == BOX
    row = {"problem": "the dog", "solution": [20, 10, 70, 50], "normalized_solution": [100, 100, 350, 500]}
    assert read_one(write([row]), Grounding(), unit="pixels")[1].box == BOX
    prints = {PerceptionR1(write([row]), unit=unit).fingerprint() for unit in (None, "pixels", "thousandths")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"solution": [[100, 500], [500, 250]]},
        {"solution": "[[100, 500], [500, 250]]"},
        {"solution": "[(100, 500), (500, 250)]"},
        {"solution": [{"x": 100, "y": 500}, {"x": 500, "y": 250}]},
        {"clicks": [[100, 500], [500, 250]]},
        {"clicks": [{"x": 100, "y": 500}, {"x": 500, "y": 250}], "solution": 2},
    ],
)
def test_points_and_clicks_are_points_in_thousandths(write, row):
    query, target = read_one(write([{"problem": "dogs", **row}]), Counting())
    assert (query, target.count, target.points) == ("dogs", 2, ((0.1, 0.5), (0.5, 0.25)))


def test_a_number_is_a_count_and_any_other_text_a_text(write):
    assert read_one(write([{"problem": "dogs", "solution": 7}]), Counting())[1].count == 7
    for text in ("a page", "[see page 3]", "{'unfinished", "", "it's (fine)"):
        assert read_one(write([{"problem": "OCR", "solution": text}]), Ocr())[1].text == text


@pytest.mark.parametrize("unit", [{}, {"unit": "thousandths"}])
@pytest.mark.parametrize("as_text", [False, True])
def test_objects_are_in_pixels_under_cocos_numbers(write, unit, as_text):
    boxes = [[100, 100, 350, 500], [0, 0, 1000, 1000]] if unit else [[20, 10, 70, 50], [0, 0, 200.4, 100]]
    solution = {"target_id": [18, 90], "target_box": boxes}
    path = write([{"problem": "detect", "solution": str(solution) if as_text else solution}])
    _, target = read_one(path, Detection(), **unit)
    assert target.objects == (
        LabelledBox(label="dog", box=BOX),
        LabelledBox(label="toothbrush", box=(0.0, 0.0, 1.0, 1.0)),
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({}, "solution: must be a box, a list of points, a number, a text, or target_id"),
        ({"solution": None}, "solution: must be a box"),
        ({"solution": {"target_id": [18]}}, "solution: target_id and target_box must be lists of the same length"),
        ({"solution": {"target_id": [18], "target_box": []}}, "must be lists of the same length"),
        ({"solution": {"target_id": [12], "target_box": [[1, 1, 2, 2]]}}, "hold COCO's category numbers, got 12"),
        ({"solution": {"target_id": [True], "target_box": [[1, 1, 2, 2]]}}, "COCO's category numbers, got True"),
        ({"solution": {"target_id": [[18]], "target_box": [[1, 1, 2, 2]]}}, "COCO's category numbers"),
        ({"clicks": "many"}, "clicks: must be a list of points"),
        ({"clicks": {"x": 1}}, "clicks: must be a list of points"),
        ({"solution": [1, 2, 3, 4]}, "objects: is missing"),
    ],
)
def test_a_solution_that_says_nothing_is_named(write, row, sentence):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{sentence}"):
        load(PerceptionR1(write([row])), Detection())


@pytest.mark.parametrize("start", ["[", "(", "{", "[-", "[{", "{'a':", "[not ", "[1+", "[**"])
def test_a_hostile_solution_is_only_a_text(write, start):
    text = start * (100_000 // len(start))
    assert read_one(write([{"problem": "x", "solution": text}]), Ocr())[1].text == text


SOLUTIONS = ["problem", "messages", "objects", "ref", "bbox", "bbox_2d", "role", "content", "images",
             "solution", "normalized_solution", "clicks", "conversations", "id", "image", "target_id",
             "target_box", "x", "from", "value", "text", "box", "unit", "tolerance", "objects", "points"]  # fmt: skip
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([10**400, "\ud800", "a.png", "[1, 2, 3, 4]", "gpt", "{'target_id': [1]}", "[[[", "a\n"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(SOLUTIONS), inner, max_size=5),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(SOLUTIONS), values) | values, max_size=4),
    kind=st.sampled_from([JsonLines, Conversations, PerceptionR1, VlmR1, MsSwift]),
    name=st.sampled_from(["rows.json", "rows.jsonl"]),
    task=st.sampled_from(sorted(TASKS)),
)
def test_no_json_value_raises_anything_but_a_data_error(write, rows, kind, name, task):
    path = write(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)), name)
    with contextlib.suppress(DataError):
        kind(path).labels()
        load(kind(path), TASKS[task](), on_bad_row="skip")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("kind", [JsonLines, Conversations, PerceptionR1, VlmR1, MsSwift])
def test_no_bytes_raise_anything_but_a_data_error(tmp_path, kind, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load(kind(tmp_path / name), Ocr(), on_bad_row="skip")
    assert "\n" not in str(caught.value)
