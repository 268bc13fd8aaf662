"""Which samples tell most."""

import pytest

from perception_r1.callbacks.selection import most_telling


def test_gains_losses_the_worst_and_others_take_turns():
    before = {index: 0.5 for index in range(10)}
    after = {index: 0.5 + step for index, step in enumerate([0, 0.1, 0.4, -0.1, -0.3, 0, 0, 0, 0.2, 0])}
    assert most_telling(before, after, 4)[:2] == [2, 4]  # 0.9 gained most, 0.2 lost most and is the worst
    chosen = most_telling(before, after, 6)
    assert len(chosen) == len(set(chosen)) == 6
    assert {2, 8, 4, 3} <= set(chosen)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 50])
def test_as_many_are_chosen_as_there_are_at_most(count):
    after = {str(index): index / 7 for index in range(7)}
    for before in ({}, after, {"3": 1.0}):
        chosen = most_telling(before, after, count)
        assert len(chosen) == len(set(chosen)) == min(count, 7)
        assert set(chosen) <= set(after)


def test_without_answers_before_the_worst_and_others_at_even_distances_are_chosen():
    after = {index: 1.0 for index in range(100)} | {63: 0.0}
    assert most_telling({}, after, 4) == [63, 0, 25, 1]


def test_nothing_is_chosen_of_nothing():
    assert most_telling({}, {}, 5) == most_telling({"a": 1.0}, {}, 5) == []
