"""Small and large damage to texts, to lines of bytes and to JSON values, drawn by chance."""

import random
from typing import Any

ODD_TEXTS = (
    *("", " ", "\n", "\x00", "\u200b", "\u2028", "\ud800", "\U0001f600", "\u0661\u0662", "null", "true", "NaN", "0"),
    *("-1", "1e999", "9" * 400, "[1, 2, 3, 4]", "{}", "[]", "../../x", "a" * 5000, "{query}", "<image>", "%s%n", "'"),
    *("<answer>[1, 2, 3, 4]</answer>", "```json\n[]\n```", "__import__('os')", "(" * 300, "[" * 300, "<|im_end|>"),
)
ODD_NUMBERS = (
    *(0, -0.0, -1, 1, 2, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], {"": None}, [None] * 4, [True] * 4, [1, 2], [1, 2, 3, 4], [4, 3, 2, 1]),
    *(["1", "2", "3", "4"], [float("nan")] * 4, [1, 2, 3, 4, 5], [[1, 2, 3, 4]], {"x": [1], "y": [2]}, [[1], [2, 3]]),
)
_DEPTH = 200


def damaged_text(text: str, draw: random.Random, pieces: tuple[str, ...], others: tuple[str, ...] = ()) -> str:
    """A text with a few changes; pieces are put in, and it may go on as another text does."""
    for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
        size = len(text)
        at = draw.randrange(size + 1)
        end = min(size, at + draw.choice((0, 1, 1, 2, 5, 20)))
        kind = draw.randrange(7)
        if kind == 0:
            text = text[:at] + text[end:]
        elif kind == 1:
            text = text[:at] + draw.choice(pieces) + text[end:]
        elif kind == 2:
            text = text[:end] + text[at:]
        elif kind == 3:
            text = text[:at] + chr(draw.choice((draw.randrange(128), draw.randrange(0x110000)))) + text[end:]
        elif kind == 4:
            text = text[:at]
        elif kind == 5:
            text = text[:at] + text[at:end] * draw.choice((2, 3, 40)) + text[end:]
        elif others:
            other = draw.choice(others)
            text = text[:at] + other[draw.randrange(len(other) + 1) :]
    return text


def damaged_line(line: bytes, draw: random.Random) -> bytes:
    """A line of a file with bytes cut off, changed or put in."""
    at = draw.randrange(len(line) + 1)
    end = min(len(line), at + draw.choice((1, 1, 4, 30)))
    junk = draw.choice(
        (b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xc3", b"9" * 5000, b"[" * 20000, b'{"a":' * 3000, b"\r", b"\t")
    )
    return draw.choice((line[:at], line[:at] + line[end:], line[:at] + junk + line[end:], junk + line, junk))


def damaged_value(value: Any, draw: random.Random) -> Any:
    """A JSON value that is another at one place, at any depth."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        others = {name: item for name, item in value.items() if name != key}
        kind = draw.random()
        if kind < 0.12:
            return others
        if kind < 0.2:
            return others | {key + draw.choice((" ", "s", "\x00")): value[key]}
        return value | {key: damaged_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at, items = draw.randrange(len(value)), list(value)
        kind = draw.randrange(5)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items.insert(at, draw.choice(items))
        elif kind == 2:
            draw.shuffle(items)
        else:
            items[at] = damaged_value(items[at], draw)
        return items
    if isinstance(value, str) and draw.random() < 0.4:
        return damaged_text(value, draw, ODD_TEXTS)
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.4:
        return draw.choice((-value, value + 0.5, value * 1000, str(value), [value], value + draw.uniform(-5, 5)))
    return odd_value(draw)


def odd_value(draw: random.Random) -> Any:
    """Any JSON value where another one is expected."""
    kind = draw.randrange(4)
    if kind == 3 and draw.random() < 0.2:
        value: Any = draw.choice(ODD_NUMBERS)
        for _ in range(_DEPTH):
            value = [value] if draw.random() < 0.5 else {"a": value}
        return value
    return draw.choice((ODD_TEXTS, ODD_NUMBERS, ODD_VALUES)[kind % 3])
