"""Which samples tell most of a run, where not all can be shown."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


def most_telling(before: Mapping[KeyT, float], after: Mapping[KeyT, float], count: int) -> list[KeyT]:
    """The samples that gained and lost most, those that are worst, and some at even distances, in turn.

    Args:
        before: Reward of each sample before; those that are missing neither gained nor lost.
        after: Reward of each sample after, in the order of the data.
        count: How many are chosen at most.

    >>> most_telling({"a": 0.0, "b": 1.0, "c": 0.5}, {"a": 1.0, "b": 0.2, "c": 0.5, "d": 0.9}, 3)
    ['a', 'b', 'c']
    """
    keys = list(after)
    count = min(count, len(keys))
    gains = {key: after[key] - before[key] for key in keys if key in before}
    changed = sorted((key for key in gains if gains[key] != 0), key=gains.__getitem__)
    rankings: list[Sequence[KeyT]] = [
        [key for key in reversed(changed) if gains[key] > 0],
        [key for key in changed if gains[key] < 0],
        sorted(keys, key=after.__getitem__),
        [keys[index * len(keys) // count] for index in range(count)],
    ]
    in_turn = [ranking[place] for place in range(len(keys)) for ranking in rankings if place < len(ranking)]
    return list(dict.fromkeys(in_turn))[:count]
