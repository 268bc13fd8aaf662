"""Phrases that name exactly one object of a scene, from simple ones to those that need a neighbour."""

from collections.abc import Callable, Iterator, Sequence

from perception_r1.data.synthetic.worlds import Thing

_SMALL, _LARGE = 0.18, 0.25
"""Longer side of an object, as a share of the image's: below the first it is small, above the second large."""
_SIZE_MARGIN = 0.02
_NEAR_EDGE = 0.4
"""Centers within this share of the image's side from an edge are at that edge."""
_MARGIN = 0.04
"""What lies closer to a limit than these shares of the image's side neither fits a word nor clearly misses it."""

Fit = Callable[[Thing], bool | None]
"""Whether a word fits an object; None where people would disagree."""


def refer(thing: Thing, things: Sequence[Thing], *, side: int) -> list[str]:
    """Phrases that name one object among others, from easy to hard; no phrase holds a word that is not needed.

    Args:
        thing: The object to name.
        things: All objects, that one included.
        side: Width and height of the image in pixels.
    """
    phrases = []
    names: list[tuple[str, Fit]] = [
        (f"{thing.colour} {thing.name}", lambda other: (other.colour, other.name) == (thing.colour, thing.name)),
        (thing.name, lambda other: other.name == thing.name),
    ]
    for name, is_named in names:
        if _singles_out([is_named], thing, things):
            phrases.append(name)
            continue
        for words, fits in _qualifiers(thing, things, side):
            if _singles_out([is_named, fits], thing, things):
                phrases.append(words.format(name))
    if phrases:
        return phrases
    name, is_named = names[0]  # two qualifiers, where one is not enough
    qualifiers = list(_qualifiers(thing, things, side))
    sizes = [qualifier for qualifier in qualifiers if qualifier[0] in _SIZES]
    for size, is_of_size in sizes:
        for words, fits in qualifiers:
            if words not in _SIZES and _singles_out([is_named, is_of_size, fits], thing, things):
                phrases.append(words.format(size.format(name)))
    return phrases


_SIZES = ("small {}", "large {}")


def _singles_out(fits: Sequence[Fit], thing: Thing, things: Sequence[Thing]) -> bool:
    """Whether all words fit the object, and for every other object one of them clearly does not."""
    return all(fit(thing) is True for fit in fits) and all(
        any(fit(other) is False for fit in fits) for other in things if other is not thing
    )


def _qualifiers(thing: Thing, things: Sequence[Thing], side: int) -> Iterator[tuple[str, Fit]]:
    """Words that may go with a name: size, place in the image, place beside an object that is easy to name."""
    yield "small {}", lambda other: _below(_length(other) / side, _SMALL, _SIZE_MARGIN)
    yield "large {}", lambda other: _below(-_length(other) / side, -_LARGE, _SIZE_MARGIN)
    yield "{} on the left", lambda other: _below(_center(other)[0] / side, _NEAR_EDGE)
    yield "{} on the right", lambda other: _below(1 - _center(other)[0] / side, _NEAR_EDGE)
    yield "{} at the top", lambda other: _below(_center(other)[1] / side, _NEAR_EDGE)
    yield "{} at the bottom", lambda other: _below(1 - _center(other)[1] / side, _NEAR_EDGE)
    for anchor in things:
        is_like = [other for other in things if (other.colour, other.name) == (anchor.colour, anchor.name)]
        if anchor.name == thing.name or len(is_like) > 1:
            continue
        where = f"the {anchor.colour} {anchor.name}"
        yield "{} left of " + where, _beside(anchor, side, axis=0, sign=-1)
        yield "{} right of " + where, _beside(anchor, side, axis=0, sign=1)
        yield "{} above " + where, _beside(anchor, side, axis=1, sign=-1)
        yield "{} below " + where, _beside(anchor, side, axis=1, sign=1)


def _beside(anchor: Thing, side: int, *, axis: int, sign: int) -> Fit:
    """Whether the center of an object lies further from the anchor's in one direction than across it."""

    def fit(other: Thing) -> bool | None:
        offset = [(here - there) / side for here, there in zip(_center(other), _center(anchor), strict=True)]
        return _below(abs(offset[1 - axis]) - sign * offset[axis], 0.0)

    return fit


def _below(value: float, limit: float, margin: float = _MARGIN) -> bool | None:
    """Whether a value is below a limit; None where it is too close to tell."""
    return None if abs(value - limit) < margin else value < limit


def _length(thing: Thing) -> int:
    x1, y1, x2, y2 = thing.box
    return max(x2 - x1, y2 - y1)


def _center(thing: Thing) -> tuple[float, float]:
    x1, y1, x2, y2 = thing.box
    return (x1 + x2) / 2, (y1 + y2) / 2
