import logging
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from perception_r1.data.samples import load as load_source
from perception_r1.data.sources import DataError, JsonLines
from perception_r1.errors import UserError


def load(path, task, **options):
    return load_source(JsonLines(path), task, **options)


def test_rows_become_samples_in_order(task, write_rows, tmp_path):
    path = write_rows(
        [
            {"image": "0.png", "text": "a", "width": 40, "height": 30},
            "",
            {"image": "1.png", "text": "b", "id": "x7"},
            {"image": str(tmp_path / "0.png"), "text": "c", "id": 12},
        ]
    )
    samples = load(path, task)
    assert [(s.id, s.target, s.width, s.height) for s in samples] == [
        ("1", "a", 40, 30),
        ("x7", "b", 41, 30),
        ("12", "c", 40, 30),
    ]
    assert samples[0].image == tmp_path / "0.png"


GOOD = {"image": "0.png", "text": "a"}
BAD_ROWS = [
    ("{", r"data\.jsonl:2: the line must be a JSON object \("),
    ("[1]", r"data\.jsonl:2: the line must be a JSON object in braces"),
    ("[" * 100_000, r"data\.jsonl:2: the line must be a JSON object"),
    ('{"image": ' + "9" * 5000 + "}", r"data\.jsonl:2: the line must be a JSON object"),
    ({"text": "a"}, r"data\.jsonl:2: image: is missing, the row needs a text here"),
    ({"image": "9.png", "text": "a"}, r"data\.jsonl:2: image: no such file: .*9\.png"),
    ({"image": "0\0.png", "text": "a"}, r"data\.jsonl:2: image: cannot read"),
    ({"image": "data.jsonl", "text": "a"}, r"data\.jsonl:2: image: cannot read"),
    ({"image": "0.png"}, r"data\.jsonl:2: text: is missing"),
    ({"image": "0.png", "text": 3}, r"data\.jsonl:2: text: must be a text, got 3"),
    (
        {**GOOD, "width": 41},
        r"data\.jsonl:2: width: must be that of the upright image, which has 40 x 30 pixels, got 41",
    ),
    ({**GOOD, "height": "30"}, r"data\.jsonl:2: height: must be a whole number"),
    ({**GOOD, "id": "1"}, r"data\.jsonl:2: id: must be unique, but '1' is also that of .*data\.jsonl:1"),
    ({**GOOD, "id": [1]}, r"data\.jsonl:2: id: must be a text or a whole number"),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_file_line_and_key(task, write_rows, bad, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        load(write_rows([GOOD, bad, GOOD]), task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bad", "sentence"), BAD_ROWS)
def test_a_bad_row_is_left_out_and_reported_when_asked_for(task, write_rows, bad, sentence, caplog):
    with caplog.at_level(logging.WARNING):
        samples = load(write_rows([GOOD, bad, GOOD]), task, on_bad_row="skip")
    assert [sample.id for sample in samples] == ["1", "3"]
    assert "1 of 3 rows cannot be used and are left out" in caplog.text
    assert re.search(sentence, caplog.text)


def test_what_the_model_cannot_take_is_a_bad_row_like_any_other(task, write_rows, caplog):
    def check_sample(sample):
        if sample.width == 41:
            raise UserError(f"no image of\n{sample.width} x {sample.height} and the text {sample.target}")

    path = write_rows([GOOD, {"image": "1.png", "text": "b"}, {"image": "2.png", "text": "c"}])
    with pytest.raises(DataError, match=r"data\.jsonl:2: no image of 41 x 30 and the text b$"):
        load(path, task, check_sample=check_sample)
    with caplog.at_level(logging.WARNING):
        samples = load(path, task, on_bad_row="skip", check_sample=check_sample)
    assert [sample.id for sample in samples] == ["1", "3"]
    assert "data.jsonl:2: no image of 41 x 30" in caplog.text
    assert "1 of 3 rows cannot be used and are left out" in caplog.text


def test_a_truncated_picture_is_found_before_training(task, write_rows, tmp_path):
    path = write_rows([GOOD, {"image": "cut.jpg", "text": "a"}])
    Image.effect_noise((200, 200), 50).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"data\.jsonl:2: image: cannot read .*truncated"):
        load(path, task)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_error(task, write_rows, text):
    path = write_rows([])
    path.write_text(text)
    with pytest.raises(DataError, match="is empty"):
        load(path, task)


def test_a_file_without_one_good_row_is_an_error_even_when_skipping(task, write_rows):
    with pytest.raises(DataError, match=r"none of its 2 rows can be used, the first because: .*:1: text"):
        load(write_rows([{"image": "0.png"}, {"image": "1.png"}]), task, on_bad_row="skip")


def test_a_missing_file_and_a_wrong_option_are_errors(task, tmp_path, write_rows):
    with pytest.raises(DataError, match=r"nope\.jsonl: cannot be read \(No such file"):
        load(tmp_path / "nope.jsonl", task)
    with pytest.raises(ValueError, match="on_bad_row must be one of error, skip"):
        load(write_rows([GOOD]), task, on_bad_row="ignore")


def test_bytes_that_are_no_utf8_are_an_error(task, write_rows):
    path = write_rows([GOOD])
    path.write_bytes(path.read_bytes() + b'{"image": "0.png", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r":2: the line must be UTF-8 text"):
        load(path, task)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(task, write_rows):
    path = write_rows([GOOD])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(load(path, task)) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_raises_anything_but_a_data_error(task, tmp_path, text):
    path = tmp_path / "any.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError):
        load(path, task, on_bad_row="skip")
