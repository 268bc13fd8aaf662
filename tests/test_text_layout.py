"""Text that fits, whatever the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_r1.text_layout import MAX_CHARACTERS, font_for, shorten, visible, wrap

HOSTILE = [
    "",
    "\x00\x07\x1b[2J\r\n\t",
    "a\u200bb\u200f\u202ec\u2066d\ufeff",
    "\ud800 lone surrogate",
    "e" + "\u0301" * 5000,
    "مرحبا بالعالم",
    "中文字符没有空格" * 50,
    "\U0001f600" * 300,
    "x" * 100_000,
    "\u2028\u2029\x85",
    "\n" * 500,
    " " * 5_000,
    "<|box_start|>" * 3_000,
    "<" * 3_000,
]
anything = st.text(st.characters(exclude_categories=()), max_size=200)
"""Any code points, lone surrogates included."""


@pytest.mark.parametrize("text", HOSTILE)
def test_every_line_of_hostile_text_fits(text: str):
    font = font_for(text, 15)
    lines = wrap(text, font=font, width=200, max_lines=6)
    assert 1 <= len(lines) <= 6
    assert all(font.getlength(line) <= 200 for line in lines)


@settings(max_examples=40)
@given(text=anything, width=st.integers(40, 300))
def test_every_line_of_any_text_fits(text: str, width: int):
    font = font_for(text, 12)
    lines = wrap(text, font=font, width=width, max_lines=4)
    assert len(lines) <= 4
    assert all(font.getlength(line) <= width for line in [*lines, shorten(text, font=font, width=width)])


@settings(max_examples=40)
@given(text=anything)
def test_visible_text_has_no_control_and_no_format_characters(text: str):
    shown = visible(text).replace("\n", "")
    assert shown.isprintable() or all(character.isprintable() or character.isspace() for character in shown)
    assert len(shown) <= MAX_CHARACTERS + len("...")


def test_what_has_no_glyph_is_written_as_an_escape():
    assert visible("\u202eab\x00\ud800") == "\\u202eab\\x00\\ud800"


def test_wrapping_breaks_between_words_and_loses_nothing():
    text = "the quick brown fox jumps over the lazy dog " * 3
    lines = wrap(text, font=font_for(text, 15), width=150, max_lines=50)
    assert len(lines) > 3
    assert " ".join(line.strip() for line in lines).split() == text.split()


def test_wrapping_breaks_between_special_tokens():
    text = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    lines = wrap(text, font=font_for(text, 15), width=150, max_lines=50)
    assert "".join(lines) == text
    assert all(line.count("<|") == line.count("|>") for line in lines)


def test_text_beyond_the_last_line_is_cut_with_dots():
    font = font_for("", 15)
    lines = wrap("word " * 200, font=font, width=150, max_lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("...")


def test_a_line_that_fits_is_not_shortened():
    font = font_for("", 15)
    assert shorten("cup", font=font, width=100) == "cup"
    assert shorten("a cup of something", font=font, width=70).endswith("...")
    assert shorten("cup", font=font, width=3) == ""
