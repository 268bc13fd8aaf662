import random

import pytest

from perception_r1.data.sources import DataError, JsonLines, Source, SourceRow
from perception_r1.data.sources.base import resolve_take
from perception_r1.errors import UserError


class Numbers(Source):
    """Ten rows, or as many as told."""

    def __init__(self, *, size: int = 10, **options) -> None:
        super().__init__(**options)
        self.size = size

    def read(self):
        return [SourceRow(location=f"n:{k}", number=k, values={"n": k}) for k in range(self.size)]

    def contents(self):
        return [str(self.size)]

    def __str__(self) -> str:
        return "numbers"


def numbers(**options) -> list[int]:
    return [row.number for row in Numbers(**options)]


@pytest.mark.parametrize(
    ("take", "found"),
    [
        ("all", range(10)),
        ("first:3", [0, 1, 2]),
        ("last:3", [7, 8, 9]),
        ("first:20%", [0, 1]),
        ("last:25%", [8, 9]),  # 2.5, to even
        ("first:1%", [0]),  # one at least
        ("random:100%", range(10)),
        ("last:10", range(10)),
    ],
)
def test_rows_are_taken_as_told(take, found):
    assert numbers(take=take) == list(found)
    assert [Numbers(take=take)[k].number for k in range(len(found))] == list(found)
    assert len(Numbers(take=take)) == len(found)


def test_random_rows_keep_their_order_and_depend_on_the_seed_alone():
    chosen = numbers(take="random:4", seed=7)
    assert chosen == numbers(take="random:40%", seed=7) == sorted(random.Random(7).sample(range(10), 4))
    assert len({tuple(numbers(take="random:4", seed=seed)) for seed in range(9)}) > 3


@pytest.mark.parametrize(
    "take",
    ["", "none", "first", "first:", "first:0", "first:-1", "first:x", "first:2.5", "first:0%", "last:101%", "all:3",
     "random:nan%", "random:1e999%", "5", "first:5:5", "first:" + "9" * 5000, "ALL"],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_at_once(take):
    with pytest.raises(UserError, match=r'^take must be "all", "first:N", "last:N" or "random:N"') as caught:
        Numbers(take=take)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("take", ["first:11", "last:11", "random:11"])
def test_more_rows_than_there_are_name_the_source(take):
    with pytest.raises(DataError, match=f"^numbers: take: '{take}' asks for 11 rows, but there are only 10$"):
        len(Numbers(take=take))
    with pytest.raises(ValueError, match="only 0"):
        resolve_take("first:50%", 0, 0)


def test_fingerprint_tells_contents_and_choices_apart_but_not_places(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}\n")
    (tmp_path / "c.jsonl").write_text("{} \n")
    here = JsonLines(tmp_path / "a" / "x.jsonl").fingerprint()
    assert here == JsonLines(tmp_path / "b" / "x.jsonl").fingerprint()
    others = [
        JsonLines(tmp_path / "c.jsonl"),
        JsonLines(tmp_path / "a" / "x.jsonl", take="first:1"),
        JsonLines(tmp_path / "a" / "x.jsonl", seed=1),
        Numbers(),
        Numbers(size=9),
    ]
    assert len({here, *(source.fingerprint() for source in others)}) == 6
    with pytest.raises(DataError, match=r"nope\.jsonl: cannot be read \("):
        JsonLines(tmp_path / "nope.jsonl").fingerprint()


def test_a_data_error_is_one_line():
    assert str(DataError("a\nb\r\nc")) == "a b c"


def test_labels_are_those_in_use_and_no_rubbish():
    class Labels(Numbers):
        def read(self):
            labels = ["dog", "cat", "dog", " ", "\ud800", 3, None]
            rows = [{"objects": [{"label": label}, "x"]} for label in labels] + [{"objects": "x"}, {}]
            return [SourceRow(location="l", number=1, values=values) for values in rows]

    assert Labels().labels() == ("cat", "dog")
