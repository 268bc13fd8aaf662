"""Hostile texts for the tests of parsers: random ones made of the grammar's own pieces, and worst cases by hand."""

from hypothesis import strategies as st

from perception_r1.task import MAX_TEXT

PIECES = [
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|im_end|>", "<|endoftext|>", "<|",
    "<think>", "</think>", "<answer>", "</answer>", "```json", "```", "dog",
    "<|object_ref_start|>dog<|object_ref_end|>", "<|box_start|>(1,2),(300,400)<|box_end|>", "(1,2),(3,4)", "(", ")",
    ",", " ", "\n", ".", "-", "1", "1000", "9" * 400, "1.5",
    "1e999", "NaN", "-Infinity", "[", "]", "{", "}", ":", '"', "\\", '"label"', '"bbox_2d"', '"label": "dog"',
    '{"bbox_2d": [1, 2, 300, 400], "label": "dog"}', '{"bbox_2d": [1, 2, NaN, 1e999], "label": "\\ud800"}', "true",
    "<ref>", "</ref>", "<box>[", "]</box>", "<ref>dog</ref>", "<box>[[1, 2, 300, 400]]</box>", "[1, 2, 300, 400]",
    '{"box_2d": [2, 1, 400, 300], "label": "dog"}',
    "null", "[[[[", "\u0661\u0662", "\x00", "\u200b", "\u2028", "\ud800", "\U0001f600", "__import__('os')",
]  # fmt: skip
BOX = "<|box_start|>(1,2),(300,400)<|box_end|>"

texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=60).map("".join)


def filled(piece: str, end: str = "") -> str:
    """A text as long as is read, of one piece over and over."""
    return (piece * (MAX_TEXT // len(piece) + 1))[: MAX_TEXT - len(end)] + end


WORST = {
    "digits": filled("9"),
    "digits in a box": "<|box_start|>(" + filled("9", ",1),(2,3)<|box_end|>")[14:],
    "digits in JSON": "[" + filled("9", "]")[1:],
    "numbers in JSON": "[" + filled("99,", "9]")[1:],
    "brackets": filled("["),
    "braces": filled('{"a":'),
    "closed brackets": "[" * (MAX_TEXT // 2) + "]" * (MAX_TEXT // 2),
    "boxes": filled(BOX),
    "labels": filled("<|object_ref_start|>a<|object_ref_end|>"),
    "open labels": filled("<|object_ref_start|>"),
    "open label and brackets": "<|object_ref_start|>" + filled("<")[20:],
    "open boxes": filled("<|box_start|>(1,"),
    "spaces in boxes": filled("<|box_start|>(" + " " * 1000),
    "spaces": filled(" ", "x"),
    "fences": filled("```json"),
    "items": "[" + filled('{"bbox_2d":[1,2,3,4],"label":"a"},', "0]")[1:],
    "strings": filled('"\\ud800'),
    "fractions": filled("1.1."),
    "end tokens": filled("<|im_end|>", "x"),
    "end of thought": "<think>" + filled("</think><answer>", "x")[7:],
    "line breaks": filled("\n"),
    "open references": filled("<ref>a"),
    "open reference and brackets": "<ref>" + filled("<")[5:],
    "lists of boxes": filled("<box>[[1,2,3,4]]</box>"),
    "a list of boxes without an end": "<box>[" + filled("[1,2,3,4], ")[6:],
    "open lists": filled("<box>[[1,"),
    "spaces in lists": filled("<box>[" + " " * 1000),
}
"""Texts that make naive patterns take quadratic or exponential time, deep recursion or long lists, by name."""
