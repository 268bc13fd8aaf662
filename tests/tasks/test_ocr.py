import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize
from perception_r1.rows import Row, RowError
from perception_r1.tasks.ocr import Ocr, OcrTarget
from tests.tasks import golden

FRAME = ImageSize(width=100, height=50, resized_width=84, resized_height=56)


def naive_distance(first: str, second: str) -> int:
    """Levenshtein's distance by its table."""
    above = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        row = [i]
        for j, b in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


@pytest.mark.parametrize("values", golden.read("ocr"), ids=str)
def test_golden_vectors(values):
    found = golden.flat(golden.score(Ocr(), "qwen2_vl", values))
    assert {name: found[name] for name in values["expect"]} == pytest.approx(values["expect"], abs=1e-6)


@given(first=st.text("ab \n", max_size=12), second=st.text("ab \n", max_size=12))
def test_similarity_agrees_with_a_naive_table(first, second):
    share = naive_distance(first, second) / max(len(first), len(second), 1)
    found = Ocr().score(first, OcrTarget(text=second))
    assert found.reward == found.components["similarity"] == pytest.approx(1 - share)
    assert found.metrics == {"edit_distance": pytest.approx(share), "exact_match": float(first == second)}


def test_spaces_at_the_ends_are_characters():
    prediction = Ocr().parse_completion(" ab<|im_end|>", CODECS["qwen2_vl"], FRAME)
    assert Ocr().score(prediction, OcrTarget(text="ab")).reward == pytest.approx(2 / 3)


def test_no_answer_is_unlike_even_an_empty_page():
    assert Ocr().score(None, OcrTarget(text="")).reward == 0
    assert Ocr().score("", OcrTarget(text="")).reward == 1


def test_rows_marks_and_description():
    assert Ocr().read_row(Row({"text": "a\nb"}, width=100, height=50)) == ("", OcrTarget(text="a\nb"))
    assert Ocr().read_row(Row({"text": ""}, width=100, height=50)) == ("", OcrTarget(text=""))
    with pytest.raises(RowError, match="text"):
        Ocr().read_row(Row({}, width=100, height=50))
    assert list(Ocr().overlays("a")) == []
    assert Ocr().describe(OcrTarget(text="on\nquick")) == Ocr().describe("on\nquick") == "on\nquick"
    assert Ocr().describe(OcrTarget(text="")) == Ocr().describe(" \n") == "no text"
    assert Ocr().serialize_prediction("a", FRAME) == {"text": "a"}
    assert Ocr().serialize_prediction(None, FRAME) is None
    assert Ocr().prompt("") == "OCR this image."
