"""Cards and annotated pictures, pixel by pixel where it matters."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perception_r1.drawing import PREDICTION, TARGET, annotate, contact_sheet, draw_card, fit
from perception_r1.records import Overlay

GREY = (128, 128, 128)


def grey(width: int = 200, height: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == colour).all(-1).sum())


def test_edges_of_a_target_have_its_colour_and_its_inside_is_untouched():
    drawn = annotate(grey(201, 101), [Overlay(shape=(0.25, 0.2, 0.75, 0.8))], [])
    for point in ((50, 50), (150, 50), (100, 20), (100, 80)):
        assert drawn.getpixel(point) == TARGET
    assert drawn.getpixel((100, 50)) == GREY
    assert count(drawn, PREDICTION) == 0


def test_the_corners_of_a_prediction_are_inked_and_its_edges_have_gaps():
    drawn = annotate(grey(201, 101), [], [Overlay(shape=(0.25, 0.2, 0.75, 0.8))])
    assert drawn.getpixel((51, 21)) == PREDICTION
    assert drawn.getpixel((149, 79)) == PREDICTION
    edge = {drawn.getpixel((x, 21)) for x in range(51, 150)}
    assert edge == {PREDICTION, GREY}


def test_both_colours_are_seen_where_boxes_coincide():
    overlays = [Overlay(shape=(0.25, 0.2, 0.75, 0.8))]
    drawn = annotate(grey(), overlays, overlays)
    assert count(drawn, TARGET) > 200
    assert count(drawn, PREDICTION) > 200


def test_points_are_drawn_where_they_are():
    drawn = annotate(grey(201, 101), [Overlay(shape=(0.25, 0.5))], [Overlay(shape=(0.75, 0.5))])
    assert drawn.getpixel((50, 50)) == TARGET
    assert drawn.getpixel((150, 50)) == PREDICTION


def test_marks_at_the_border_and_without_extent_stay_inside():
    overlays = [
        Overlay(shape=(0.0, 0.0, 1.0, 1.0)),
        Overlay(shape=(1.0, 1.0, 1.0, 1.0)),
        Overlay(shape=(0.5, 0.0, 0.5, 1.0)),
    ]
    drawn = annotate(grey(), overlays, [*overlays, Overlay(shape=(0.0, 1.0), caption="corner")])
    assert drawn.size == (200, 100)
    assert drawn.getpixel((0, 50)) == drawn.getpixel((199, 50)) == TARGET


def test_annotating_leaves_the_picture_alone():
    picture = grey()
    annotate(picture, [Overlay(shape=(0.1, 0.1, 0.9, 0.9), caption="x")], [])
    assert count(picture, GREY) == 200 * 100


def test_a_caption_is_a_tag_inside_the_picture():
    box = Overlay(shape=(0.9, 0.0, 1.0, 0.1), caption="a very long caption indeed, longer than the picture is wide")
    plain = annotate(grey(), [Overlay(shape=box.shape)], [])
    assert count(annotate(grey(), [box], []), TARGET) > count(plain, TARGET) + 500


def test_captions_do_not_cover_each_other():
    boxes = [Overlay(shape=(0.4, 0.4, 0.6, 0.6), caption=name) for name in ("one", "two")]
    first, second = (annotate(grey(400, 400), boxes[:n], []) for n in (1, 2))
    tag = (np.asarray(first) != np.asarray(second)).any(-1)
    assert tag.any()
    assert not (np.asarray(first)[tag] == TARGET).all(-1).any()


def test_captions_hide_targets_only_where_there_is_no_other_place():
    def rows_of_tag(other: Overlay) -> list[int]:
        box = Overlay(shape=(0.4, 0.5, 0.6, 0.7))
        bare, named = (annotate(grey(400, 400), [other, replace(box, caption=name)], []) for name in ("", "cup"))
        return np.nonzero((np.asarray(bare) != np.asarray(named)).any((1, 2)))[0].tolist()

    assert max(rows_of_tag(Overlay(shape=(0.0, 0.9, 0.1, 1.0)))) < 0.5 * 399  # above its box as a rule
    assert min(rows_of_tag(Overlay(shape=(0.4, 0.3, 0.6, 0.49)))) > 0.7 * 399  # below it where another is above
    assert rows_of_tag(Overlay(shape=(0.0, 0.0, 1.0, 1.0)))


def test_many_equal_captions_are_written_once():
    boxes = [Overlay(shape=(0.1 * i, 0.4, 0.1 * i + 0.05, 0.6)) for i in range(9)]
    named = [Overlay(shape=box.shape, caption="cup") for box in boxes]
    size = (900, 200)
    extra = count(annotate(grey(*size), named, []), TARGET) - count(annotate(grey(*size), boxes, []), TARGET)
    once = [named[0], *boxes[1:]]
    assert extra == count(annotate(grey(*size), once, []), TARGET) - count(annotate(grey(*size), boxes, []), TARGET)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((112, 112), (448, 448)),
        ((100, 50), (448, 224)),
        ((28, 56), (224, 448)),
        ((300, 200), (448, 299)),
        ((4000, 3000), (448, 336)),
    ],
)
def test_pictures_are_scaled_into_the_panel(size: tuple[int, int], expected: tuple[int, int]):
    assert fit(grey(*size), 448).size == expected


def test_small_pictures_are_enlarged_smoothly():
    edge = np.asarray(fit(Image.fromarray(np.repeat([[0, 0, 200, 200]], 4, 0).astype(np.uint8)), 448), np.int16)[
        200, :, 0
    ]
    assert np.abs(np.diff(edge)).max() <= 4  # a brick has a step of 200 at its side
    assert edge[0] == 0
    assert edge[-1] == 200


def test_an_enlarged_picture_is_the_same_picture():
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 196, (28, 28, 3), dtype=np.uint8))
    blocks = np.asarray(fit(picture, 448), np.float64).reshape(28, 16, 28, 16, 3)
    assert np.corrcoef(blocks.mean((1, 3)).ravel(), np.asarray(picture).ravel())[0, 1] > 0.95
    assert blocks.mean() == pytest.approx(np.asarray(picture).mean(), abs=1)
    assert set(fit(grey(28, 28), 448).getdata()) == {GREY}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode_of_picture_gives_a_card(mode: str):
    card = draw_card(
        Image.new(mode, (50, 40)), title="t", fields={"prompt": "p"}, target_overlays=[Overlay(shape=(0, 0, 1, 1))]
    )
    assert card.mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 900)])
def test_odd_sizes_of_picture_give_a_card(size: tuple[int, int]):
    overlays = [Overlay(shape=(0.2, 0.2, 0.4, 0.4), caption="thing"), Overlay(shape=(0.5, 0.5), caption="point")]
    card = draw_card(grey(*size), title="t", fields={}, target_overlays=overlays, predicted_overlays=overlays)
    assert card.width == 960


def test_the_legend_is_there_only_with_marks():
    plain = draw_card(grey(), title="t", fields={"prompt": "p"})
    marked = draw_card(
        grey(), title="t", fields={"prompt": "p"}, predicted_overlays=[Overlay(shape=(0.1, 0.1, 0.2, 0.2))]
    )
    assert count(plain, TARGET) == count(plain, PREDICTION) == 0
    assert count(marked, TARGET) > 0  # the legend names targets too


def test_long_text_makes_a_card_no_higher_than_eight_lines_a_field():
    fields = {name: "word " * 5_000 for name in ("prompt", "target", "completion", "reward")}
    card = draw_card(grey(), title="t" * 1_000, fields=fields)
    assert card.width == 960
    assert card.height < 900


@settings(max_examples=25)
@given(text=st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_text_gives_a_card_with_clean_margins(text: str):
    overlays = [Overlay(shape=(0.1, 0.1, 0.6, 0.6), caption=text)]
    fields = {"prompt": text, "completion": text, text: text}
    card = draw_card(
        grey(), title=text, fields=fields, target_overlays=overlays, predicted_overlays=overlays, panel_width=120
    )
    assert card.width == 304
    right_margin = np.asarray(card)[1:-1, -10:-1]
    assert (right_margin == right_margin[0, 0]).all()


def test_a_contact_sheet_holds_every_card():
    cards = [Image.new("RGB", (30, 20 + index), (index, 0, 255)) for index in range(5)]
    sheet = contact_sheet(cards, num_columns=2)
    for index, card in enumerate(cards):
        assert count(sheet, (index, 0, 255)) == card.width * card.height


def test_a_contact_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one card"):
        contact_sheet([])
