import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.records import Annotation, LabelledBox
from perception_r1.rows import Row, RowError

CUP = {"box": [1, 1, 2, 2], "label": "cup"}
METHODS = ("text", "integer", "box", "boxes", "points", "objects")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["box", "label", "area", "crowd"]), inner, max_size=4)
    ),
    max_leaves=20,
)
pixels = st.floats(-1, 120) | st.integers(-1, 120)


def row(**values: object) -> Row:
    return Row(values, width=200, height=100)


def test_pixels_become_fractions_of_width_and_height():
    values = row(
        box=[20, 10, 200, 100],
        points=[[100, 25], [0, 100.0]],
        boxes=[[0, 0, 100, 50]],
        objects=[
            {"box": [0, 0, 50, 50], "label": "cup"},
            {"box": [0, 0, 50, 50], "label": "cup", "area": 12.5, "crowd": True},
            {"box": [0, 0, 50, 50], "label": "cup", "area": 0, "crowd": False},
        ],
        count=3,
        text="mug",
    )
    assert values.box("box") == (0.1, 0.1, 1.0, 1.0)
    assert values.points("points") == ((0.5, 0.25), (0.0, 1.0))
    assert values.boxes("boxes") == ((0.0, 0.0, 0.5, 0.5),)
    cup = LabelledBox(label="cup", box=(0.0, 0.0, 0.25, 0.5))
    assert values.objects("objects") == (
        Annotation(item=cup, area=None, is_crowd=False),
        Annotation(item=cup, area=12.5, is_crowd=True),
        Annotation(item=cup, area=0.0, is_crowd=False),
    )
    assert values.integer("count") == 3
    assert values.text("text") == "mug"


def test_empty_lists_and_texts_that_may_be_empty_are_fine():
    values = row(objects=[], boxes=[], points=[], text="")
    assert values.objects("objects") == values.boxes("boxes") == values.points("points") == ()
    assert values.text("text", may_be_empty=True) == ""


def test_null_counts_as_missing():
    assert "count" not in row(count=None)
    assert "count" in row(count=0)


@pytest.mark.parametrize(
    ("method", "value", "sentence"),
    [
        ("text", None, "key: is missing, the row needs a text here"),
        ("text", 5, "key: must be a text, got 5"),
        ("text", "  ", "key: must not be blank, got '  '"),
        ("text", "a\ud800", "key: must be valid Unicode"),
        ("integer", True, "key: must be a whole number of at least 0, got True"),
        ("integer", 2.0, "key: must be a whole number of at least 0, got 2.0"),
        ("integer", -1, "key: must be a whole number of at least 0, got -1"),
        ("integer", 10**400, "key: must be a whole number"),
        ("box", [1, 2, 3], "key: must be [x1, y1, x2, y2] in pixels, got [1, 2, 3]"),
        ("box", {"x1": 1}, "key: must be [x1, y1, x2, y2] in pixels"),
        ("box", [1, 2, 3, True], "key: must be [x1, y1, x2, y2] in pixels, but y2 is True, not a number"),
        ("box", [1, "2", 3, 4], "but y1 is '2', not a number"),
        ("box", [math.nan, 2, 3, 4], "but x1 is not a finite number"),
        ("box", [1, 2, 3, 10**400], "but y2 is not a finite number"),
        ("box", [30, 2, 20, 4], "key: must have x1 < x2 and y1 < y2, got [30, 2, 20, 4]"),
        (
            "box",
            [150, 40, 30, 20],
            "got [150, 40, 30, 20]; of x, y, width and height make x, y, x + width and y + height",
        ),
        (
            "box",
            [0.25, 0.5, 0.75, 1],
            'key: lies within one pixel; fractions of the image need "unit": "fractions", got [0.25, 0.5, 0.75, 1]',
        ),
        ("box", [1, 4, 20, 4], "key: must have x1 < x2 and y1 < y2"),
        ("box", [1, 4, 20, 100.001], "key: must lie inside the image of 200 x 100 pixels, got [1, 4, 20, 100.001]"),
        ("box", [-0.001, 4, 20, 50], "key: must lie inside the image of 200 x 100 pixels"),
        ("boxes", [[1, 1, 2, 2], [1, 1, 1, 2]], "key[1]: must have x1 < x2 and y1 < y2"),
        ("boxes", "no", "key: must be a list of boxes, got 'no'"),
        ("points", [[1, 2], [201, 2]], "key[1]: must lie inside the image of 200 x 100 pixels, got [201, 2]"),
        ("points", [[1, 2, 3]], "key[0]: must be [x, y] in pixels, got [1, 2, 3]"),
        ("objects", [{"box": [1, 1, 2, 2]}], 'key[0].label: is missing, an object needs both "box" and "label"'),
        ("objects", [{"label": "a"}], "key[0].box: is missing"),
        ("objects", [{"box": [1, 1, 2, 2], "label": 3}], "key[0].label: must be a text, got 3"),
        ("objects", [{"box": [1, 1, 0, 2], "label": "a"}], "key[0].box: must have x1 < x2"),
        ("objects", [{**CUP, "area": -1}], "key[0].area: must be a number of pixels squared from 0 on, got -1"),
        ("objects", [{**CUP, "area": True}], "key[0].area: must be a number of pixels squared"),
        ("objects", [{**CUP, "area": math.inf}], "key[0].area: must be a number of pixels squared"),
        ("objects", [{**CUP, "area": 10**400}], "key[0].area: must be a number of pixels squared"),
        ("objects", [{**CUP, "area": "9"}], "key[0].area: must be a number of pixels squared from 0 on, got '9'"),
        ("objects", [CUP, {**CUP, "crowd": 1}], "key[1].crowd: must be true or false, got 1"),
        ("objects", [{**CUP, "crowd": "true"}], "key[0].crowd: must be true or false, got 'true'"),
        ("objects", [[1, 1, 2, 2]], 'key[0]: must be an object {"box": ..., "label": ...}, got [1, 1, 2, 2]'),
    ],
)
def test_what_is_wrong_is_named(method, value, sentence):
    with pytest.raises(RowError) as caught:
        getattr(row(key=value), method)("key")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("key")
    assert "\n" not in str(caught.value)


def test_a_box_of_the_first_pixel_is_one():
    assert row(box=[0, 0, 1, 1]).box("box") == (0.0, 0.0, 1 / 200, 1 / 100)
    assert row(box=[0.25, 0.5, 0.75, 1], unit="fractions").box("box") == (0.25, 0.5, 0.75, 1.0)


def test_rounding_errors_at_the_border_are_clamped_and_nothing_more():
    assert row(box=[-1e-7, 0, 200 + 1e-7, 100]).box("box") == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(RowError, match="inside"):
        row(box=[-1e-5, 0, 200, 100]).box("box")
    with pytest.raises(RowError, match="x1 < x2"):
        row(box=[200, 0, 200 + 1e-7, 100]).box("box")


@given(method=st.sampled_from(METHODS), value=json_values)
def test_no_json_value_raises_anything_but_a_row_error(method, value):
    with contextlib.suppress(RowError):
        getattr(row(key=value), method)("key")


@given(values=st.tuples(pixels, pixels, pixels, pixels))
def test_accepted_boxes_are_ordered_fractions(values):
    x1, y1, x2, y2 = values
    is_good = 0 <= x1 < x2 <= 200 and 0 <= y1 < y2 <= 100
    try:
        box = row(box=list(values)).box("box")
    except RowError:
        assert not is_good or min(x2 - x1, y2 - y1) < 1e-6
    else:
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1
        assert box == pytest.approx((x1 / 200, y1 / 100, x2 / 200, y2 / 100), abs=1e-7)
