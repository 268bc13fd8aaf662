import json
import time
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.codecs import MAX_OBJECTS, ParsedBox, ParsedBoxes
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, LabelledBox
from tests.hostile import WORST, texts

FRAME = ImageSize(width=2000, height=1000, resized_width=700, resized_height=350)
NOTHING = ParsedBoxes(items=(), is_exact=False)
REF = "<|object_ref_start|>cat<|object_ref_end|>"
BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"
ITEM = ParsedBox(label="cat", box=(0.1, 0.2, 0.3, 0.4))


def qwen2(text: str) -> ParsedBoxes:
    return CODECS["qwen2_vl"].parse_boxes(text, FRAME)


def qwen3(text: str) -> ParsedBoxes:
    return CODECS["qwen3_vl"].parse_boxes(text, FRAME)


def internvl(text: str) -> ParsedBoxes:
    return CODECS["internvl"].parse_boxes(text, FRAME)


def test_codecs_go_by_their_names():
    assert list(CODECS) == ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "glm4v"]
    assert all(codec.name == name for name, codec in CODECS.items())


def test_each_family_writes_its_own_units():
    objects = [LabelledBox(label="cat", box=(0.1, 0.2, 0.3, 0.4)), LabelledBox(label="cat", box=(0.5, 0.0, 1.0, 1.0))]
    assert CODECS["qwen2_vl"].format_boxes(objects, FRAME) == REF + BOX + "<|box_start|>(500,0),(1000,1000)<|box_end|>"
    assert json.loads(CODECS["qwen2_5_vl"].format_boxes(objects, FRAME)) == [
        {"bbox_2d": [70, 70, 210, 140], "label": "cat"},
        {"bbox_2d": [350, 0, 700, 350], "label": "cat"},
    ]
    assert json.loads(CODECS["qwen3_vl"].format_boxes(objects, FRAME)) == [
        {"bbox_2d": [100, 200, 300, 400], "label": "cat"},
        {"bbox_2d": [500, 0, 1000, 1000], "label": "cat"},
    ]
    assert json.loads(CODECS["gemma3"].format_boxes(objects, FRAME)) == [
        {"box_2d": [200, 100, 400, 300], "label": "cat"},
        {"box_2d": [0, 500, 1000, 1000], "label": "cat"},
    ]
    assert CODECS["glm4v"].format_boxes(objects, FRAME) == (
        '<|begin_of_box|>[{"label": "cat", "bbox_2d": [100, 200, 300, 400]}, '
        '{"label": "cat", "bbox_2d": [500, 0, 1000, 1000]}]<|end_of_box|>'
    )
    internvl = CODECS["internvl"].format_boxes([*objects, LabelledBox(label="dog", box=(0.0, 0.0, 1.0, 1.0))], FRAME)
    assert internvl == (
        "<ref>cat</ref><box>[[100, 200, 300, 400], [500, 0, 1000, 1000]]</box>"
        "<ref>dog</ref><box>[[0, 0, 1000, 1000]]</box>"
    )


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_an_empty_list_reads_back_as_an_exact_empty_list(codec):
    assert codec.parse_boxes(codec.format_boxes([], FRAME), FRAME) == ParsedBoxes(items=(), is_exact=True)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@given(data=st.data(), side=st.integers(28, 3000))
def test_every_valid_box_reads_back_within_a_unit(codec, data, side):
    image_size = ImageSize(width=900, height=900, resized_width=side, resized_height=side)
    unit = 1 / (side if codec.name == "qwen2_5_vl" else 1000)
    edge = st.floats(0, 1)
    interval = st.tuples(edge, edge).filter(lambda ends: ends[0] < ends[1])
    boxes = data.draw(st.lists(st.tuples(interval, interval), max_size=6))
    objects = [LabelledBox(label=f"l{k % 2}", box=(x[0], y[0], x[1], y[1])) for k, (x, y) in enumerate(boxes)]
    parsed = codec.parse_boxes(codec.format_boxes(objects, image_size), image_size)
    assert parsed.is_exact
    assert [item.label for item in parsed.items] == [item.label for item in objects]
    for item, wanted in zip(parsed.items, objects, strict=True):
        assert item.box is not None
        assert item.box == pytest.approx(wanted.box, abs=unit * 1.000001)


@pytest.mark.parametrize("label", ["", "a<|box_start|>", "<|im_end|>", "<|"])
def test_qwen2_refuses_labels_that_would_break_its_form(label):
    with pytest.raises(ValueError, match="label"):
        CODECS["qwen2_vl"].format_boxes([LabelledBox(label=label, box=(0.0, 0.0, 1.0, 1.0))], FRAME)


@pytest.mark.parametrize("label", ["a < b", "<b>", "a|b", "最左边的猫", 'say "hi"', "two\nlines", "```json", "[]"])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_odd_labels_survive(codec, label):
    item = LabelledBox(label=label, box=(0.1, 0.2, 0.5, 0.4))
    assert codec.parse_boxes(codec.format_boxes([item], FRAME), FRAME).items[0].label == label


@pytest.mark.parametrize(
    ("text", "is_exact"),
    [
        (REF + BOX, True),
        (f"  {REF}{BOX}\n", True),
        (REF + "<|box_start|>( 100.0 , 200 ),(300 ,400.000)<|box_end|>", True),
        (f"I see {REF}{BOX}", False),
        (f"{REF}{BOX}.", False),
        (f"{REF} {BOX}", False),
        (f"{REF}{BOX}{REF}", False),
        (f"{REF}{REF}{BOX}", False),
        (f"{REF}{BOX}<|box_start|>(1,2),(3,4)", False),
        (f"{REF}<|box_start|>(a,b),(c,d)<|box_end|>{BOX}", False),
    ],
)
def test_qwen2_finds_complete_boxes_and_knows_exact_text(text, is_exact):
    assert qwen2(text) == ParsedBoxes(items=(ITEM,), is_exact=is_exact)


TAG, LIST = "<ref>cat</ref>", "<box>[[100, 200, 300, 400]]</box>"


@pytest.mark.parametrize(
    ("text", "is_exact"),
    [
        (TAG + LIST, True),
        (f"  {TAG}{LIST}\n", True),
        (TAG + "<box>[ [100.0,200 , 300,400.000] ]</box>", True),
        (f"I see {TAG}{LIST}", False),
        (f"{TAG}{LIST}.", False),
        (f"{TAG} {LIST}", False),
        (f"{TAG}{LIST}{TAG}", False),
        (f"{TAG}{TAG}{LIST}", False),
        (f"{TAG}{LIST}<box>[[1, 2, 3, 4]", False),
        (f"{TAG}<box>[[1, 2]]</box>{LIST}", False),
    ],
)
def test_internvl_finds_complete_lists_and_knows_exact_text(text, is_exact):
    assert internvl(text) == ParsedBoxes(items=(ITEM,), is_exact=is_exact)


def test_internvl_s_lists_take_the_label_before_them():
    two = "<box>[[100, 200, 300, 400], [100, 200, 300, 400]]</box>"
    assert [item.label for item in internvl(LIST + TAG + two + "<ref>dog</ref>" + LIST).items] == [
        *(None, "cat", "cat", "dog")
    ]
    assert internvl(TAG + two + "<ref>dog</ref>" + LIST + TAG + LIST).is_exact
    assert not internvl(LIST).is_exact
    assert not internvl(TAG + LIST + LIST).is_exact, "a label has one list"
    assert not internvl(TAG + LIST + TAG + LIST).is_exact, "and stands once before it"


@pytest.mark.parametrize("label", ["", "a<box>", "</ref>", "<ref>b</ref>"])
def test_internvl_refuses_labels_that_would_break_its_form(label):
    with pytest.raises(ValueError, match="label"):
        CODECS["internvl"].format_boxes([LabelledBox(label=label, box=(0.0, 0.0, 1.0, 1.0))], FRAME)


def test_gemma3_writes_rows_before_columns_and_reads_no_other_key():
    found = CODECS["gemma3"].parse_boxes('[{"box_2d": [200, 100, 400, 300], "label": "cat"}]', FRAME)
    assert found == ParsedBoxes(items=(ITEM,), is_exact=True)
    other = CODECS["gemma3"].parse_boxes(f"[{GOOD}]", FRAME)
    assert other == ParsedBoxes(items=(ParsedBox(label="cat", box=None),), is_exact=True)


GLM = '<|begin_of_box|>[{"label": "cat", "bbox_2d": [100, 200, 300, 400]}]<|end_of_box|>'


@pytest.mark.parametrize(
    ("text", "is_exact"),
    [
        (GLM, True),
        (f" {GLM}\n", True),
        (GLM.replace("[{", " [ {"), True),
        (GLM.replace("<|begin_of_box|>", "<|begin_of_box|>```json\n").replace("<|end", "\n```<|end"), True),
        (f"The list in the required format is {GLM}", False),
        (f"{GLM}.", False),
        (GLM + GLM, False),
    ],
)
def test_glm4v_reads_the_json_between_its_tokens_and_knows_exact_text(text, is_exact):
    assert CODECS["glm4v"].parse_boxes(text, FRAME) == ParsedBoxes(items=(ITEM,), is_exact=is_exact)


def test_glm4v_reads_boxes_alone_as_its_documentation_has_them():
    text = "<|begin_of_box|>[[94,598,177,991], [100, 200, 300, 400], [1, 2], 7]<|end_of_box|>"
    found = CODECS["glm4v"].parse_boxes(text, FRAME)
    boxes = ((0.094, 0.598, 0.177, 0.991), (0.1, 0.2, 0.3, 0.4), None, None)
    assert found == ParsedBoxes(items=tuple(ParsedBox(label=None, box=box) for box in boxes), is_exact=True)
    assert [item for _, item in CODECS["glm4v"].parse_prefixes(text, FRAME)] == list(found.items[:3])
    other = CODECS["qwen3_vl"].parse_boxes("[[94, 598, 177, 991]]", FRAME)
    assert other.items == (ParsedBox(label=None, box=None),), "other families have no boxes alone"


@pytest.mark.parametrize(
    "text", ["", "[[1,2,3,4]]", GLM.removesuffix("<|end_of_box|>"), GLM.removeprefix("<|begin_of_box|>"), GLM[:40]]
)
def test_glm4v_reads_nothing_where_a_token_is_missing(text):
    assert CODECS["glm4v"].parse_boxes(text, FRAME) == NOTHING


@pytest.mark.parametrize("label", ["<|end_of_box|>", "a<|user|>", "<|"])
def test_glm4v_refuses_labels_that_would_break_its_form(label):
    with pytest.raises(ValueError, match="label"):
        CODECS["glm4v"].format_boxes([LabelledBox(label=label, box=(0.0, 0.0, 1.0, 1.0))], FRAME)


def test_qwen2_boxes_take_the_label_before_them():
    other = "<|object_ref_start|>dog<|object_ref_end|>"
    assert [item.label for item in qwen2(BOX + REF + BOX + BOX + other + BOX).items] == [None, "cat", "cat", "dog"]
    assert qwen2(REF + BOX + BOX + other + BOX).is_exact
    assert not qwen2(BOX).is_exact
    assert not qwen2(REF + BOX + REF + BOX).is_exact, "boxes of one label follow it directly"
    assert qwen2(REF + BOX + other + BOX + REF + BOX).is_exact


@pytest.mark.parametrize(
    "text",
    ["<|box_start|>(1,2,3,4)<|box_end|>", "(1,2),(3,4)", "<|box_start|>", "<box_start>(1,2),(3,4)<box_end>", "im_end",
     "box_start", "<|box_start|>(1,2),(3,4)|box_end|>", "<|box_start|>(٣,2),(4,5)<|box_end|>",
     "<|box_start|>(1e0,2),(4,5)<|box_end|>", "<|box_start|>(nan,2),(4,5)<|box_end|>"],
)  # fmt: skip
def test_qwen2_is_not_fooled_by_what_only_looks_like_a_box(text):
    assert qwen2(text) == NOTHING


@pytest.mark.parametrize(
    ("numbers", "box"),
    [
        ((-5, 10, 2000, 20), (0.0, 0.01, 1.0, 0.02)),
        ((900, 900, 100, 100), None),
        ((10, 10, 10, 20), None),
        ((1200, 10, 1300, 20), None),
        ((-20, 10, -10, 20), None),
        ((10, 10, "9" * 400, 20), None),
    ],
)
def test_boxes_are_clamped_and_bad_ones_are_listed_as_none(numbers, box):
    x1, y1, x2, y2 = numbers
    assert qwen2(f"{REF}<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>") == ParsedBoxes(
        items=(ParsedBox(label="cat", box=box),), is_exact=True
    )
    assert qwen3(f'[{{"label": "cat", "bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}]') == ParsedBoxes(
        items=(ParsedBox(label="cat", box=box),), is_exact=True
    )


GOOD = '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}'


@pytest.mark.parametrize(
    ("entry", "item"),
    [
        (GOOD, ITEM),
        ('{"label": "cat", "score": [1, {}], "bbox_2d": [100.0, 200, 3e2, 400]}', ITEM),
        ('{"bbox_2d": [100, 200, 300, 400]}', ParsedBox(label=None, box=ITEM.box)),
        ('{"bbox_2d": [100, 200, 300, 400], "label": 3}', ParsedBox(label=None, box=ITEM.box)),
        ('{"bbox_2d": [100, 200, 300, 400], "label": "\\ud800"}', ParsedBox(label=None, box=ITEM.box)),
        ('{"label": "cat"}', ParsedBox(label="cat", box=None)),
        ('{"bbox_2d": [100, 200, 300], "label": "cat"}', ParsedBox(label="cat", box=None)),
        ('{"bbox_2d": [100, 200, 300, "400"], "label": "cat"}', ParsedBox(label="cat", box=None)),
        ('{"bbox_2d": [false, 0, true, 400], "label": "cat"}', ParsedBox(label="cat", box=None)),
        ('{"bbox_2d": [100, 200, Infinity, 400], "label": "cat"}', ParsedBox(label="cat", box=None)),
        ('{"bbox_2d": [NaN, 200, 300, 400], "label": "cat"}', ParsedBox(label="cat", box=None)),
        ('{"bbox_2d": "100, 200, 300, 400", "label": "cat"}', ParsedBox(label="cat", box=None)),
        ("[]", ParsedBox(label=None, box=None)),
        ("7", ParsedBox(label=None, box=None)),
    ],
)
def test_json_entries_are_judged_one_by_one(entry, item):
    assert qwen3(f"[{entry}, {GOOD}]") == ParsedBoxes(items=(item, ITEM), is_exact=True)


@pytest.mark.parametrize("text", [f"```json\n[{GOOD}]\n```", f"```json [{GOOD}]```", f"\n[{GOOD}] "])
def test_json_may_stand_in_a_fence(text):
    assert qwen3(text) == ParsedBoxes(items=(ITEM,), is_exact=True)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "null", "7", GOOD, f"[{GOOD}", f"[{GOOD}] done", f"Here: [{GOOD}]", f"```json\n[{GOOD}]", "```json```",
     f"```python\n[{GOOD}]\n```", f"[{GOOD},]", "[__import__('os')]"],
)  # fmt: skip
def test_what_is_no_json_list_lists_nothing(text):
    assert qwen3(text) == NOTHING


def test_more_objects_than_anyone_needs_are_no_answer():
    assert len(qwen2(REF + BOX * MAX_OBJECTS).items) == len(qwen3(f"[{','.join([GOOD] * MAX_OBJECTS)}]").items) == 512
    assert qwen2(REF + BOX * (MAX_OBJECTS + 1)) == NOTHING
    assert qwen3(f"[{','.join([GOOD] * (MAX_OBJECTS + 1))}]") == NOTHING
    boxes = ["[1, 2, 3, 4]"] * (MAX_OBJECTS + 1)
    assert len(internvl(f"{TAG}<box>[{','.join(boxes[1:])}]</box>").items) == MAX_OBJECTS
    assert internvl(f"{TAG}<box>[{','.join(boxes)}]</box>") == NOTHING


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@given(text=texts)
def test_hostile_text_never_raises(codec, text):
    parsed = codec.parse_boxes(text, FRAME)
    for item in parsed.items:
        assert item.box is None or (0 <= item.box[0] < item.box[2] <= 1 and 0 <= item.box[1] < item.box[3] <= 1)
        assert item.label is None or item.label in text or codec.name not in ("qwen2_vl", "internvl")


@pytest.mark.parametrize("text", WORST.values(), ids=WORST)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_worst_cases_take_no_time(codec, text):
    assert len(codec.parse_boxes(text, FRAME).items) <= MAX_OBJECTS
    tries = timeit.repeat(lambda: codec.parse_prefixes(text, FRAME), timer=time.process_time, number=1, repeat=3)
    assert min(tries) < 0.05
    tries = timeit.repeat(lambda: codec.parse_boxes(text, FRAME), timer=time.process_time, number=1, repeat=3)
    assert min(tries) < 0.05  # measured: below 10 ms; the garbage collector is off


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_a_codec_says_whether_it_counts_in_pixels_of_the_resized_image(codec):
    objects = [LabelledBox(label="cup", box=(0.1, 0.2, 0.5, 1.0))]
    small, large = (ImageSize(width=640, height=480, resized_width=k * 320, resized_height=k * 240) for k in (1, 2))
    assert (codec.format_boxes(objects, small) != codec.format_boxes(objects, large)) == codec.uses_resized_size


@pytest.mark.parametrize("wrap", ["{}", " {}  ", "```json\n{}\n```"])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_an_answer_that_is_cut_behind_a_box_says_what_stands_before(codec, wrap):
    objects = [
        LabelledBox(label=label, box=(0.1, 0.2, 0.3, side)) for label, side in (("a], [b", 0.4), ("c", 0.5), ("c", 0.9))
    ]
    text = wrap.format(codec.format_boxes(objects, FRAME))
    items = codec.parse_boxes(text, FRAME).items
    ends = [end for end, _ in codec.parse_prefixes(text, FRAME)]
    assert tuple(item for _, item in codec.parse_prefixes(text, FRAME)) == items
    assert len(ends) == len(items) == 3
    for count, end in enumerate(ends, 1):
        assert codec.parse_prefixes(text[:end], FRAME) == codec.parse_prefixes(text, FRAME)[:count]
        closing = {"qwen2_vl": "", "internvl": "]</box>", "glm4v": "]<|end_of_box|>"}
        rest = closing.get(codec.name, "]")  # whatever has to close the form
        head = text[:end] if codec.name == "qwen2_vl" else text[:end].removeprefix("```json") + rest
        assert codec.parse_boxes(head, FRAME).items == items[:count]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nothing",
        "[{}, {}, {}",
        "[{}, 1, {}]",
        "[" * 40_000,
        "<|box_start|>(9,9),(1,1)<|box_end|>",
        "<box>[[9, 9, 1, 1]]</box>",
        "<ref>a</ref><box>[[9, 9, 11, 11], [1, 2, 3, 4], [5",
        "```json [{}, {}",
        "9" * 5000,
        *WORST.values(),
    ],
)
def test_boxes_before_a_place_depend_on_the_text_before_it_alone(codec, text):
    found = codec.parse_prefixes(text, FRAME)
    ends = [end for end, _ in found]
    assert ends == sorted(set(ends))
    assert len(ends) <= MAX_OBJECTS
    for count, end in list(enumerate(ends, 1))[:5]:
        for behind in ("", "[", "1", "}", "]</box>"):
            assert codec.parse_prefixes(text[:end] + behind, FRAME)[:count] == found[:count]


def test_a_fault_hides_no_box_before_it():
    for codec, text, expected in (
        ("qwen3_vl", '[{"bbox_2d": [0, 0, 500, 500], "label": "a"}, {"bbox_2d": [1, 1', [("a", (0.0, 0.0, 0.5, 0.5))]),
        ("qwen3_vl", '[{"bbox_2d": [0, 0, 500, 500], "label": "a"}] or so', [("a", (0.0, 0.0, 0.5, 0.5))]),
        ("internvl", "<ref>a</ref><box>[[0, 0, 500, 500], [1", [("a", (0.0, 0.0, 0.5, 0.5))]),
    ):
        assert [(item.label, item.box) for _, item in CODECS[codec].parse_prefixes(text, FRAME)] == expected
        assert CODECS[codec].parse_boxes(text, FRAME).items == ()
