"""The cards of a report: samples with their pictures and the answers of all runs, as data for the page's script."""

import base64
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perception_r1.callbacks.selection import most_telling
from perception_r1.reporting.answers import Answer, Answers, SampleKey
from perception_r1.reporting.folder import TIMES, Record

MAX_IMAGE_BYTES = 12 * 2**20
"""Of all pictures on a page together."""
_MAX_ONE_IMAGE = 2**20
"""Of one: those of this package have a tenth of it."""
_MAX_TEXT = 2000
"""Characters of a completion or a target."""
_MAX_OVERLAYS = 200
_MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Answers that can be compared with others: those of a run before or after training.

    Attributes:
        run: Index of the run.
        when: "before" or "after".
        answers: By sample.
    """

    run: int
    when: str
    answers: Answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Cards:
    """What the page's script shows.

    Attributes:
        columns: Whose answers there are.
        cards: One for each sample.
        images: Pictures as data URLs; cards name them by index.
        num_samples: Samples that have been answered.
    """

    columns: list[Column]
    cards: list[dict[str, Any]]
    images: list[str]
    num_samples: int


def make_cards(records: Sequence[Record], count: int) -> Cards:
    """The cards of the samples that tell most, at most `count`; those without a picture only where none has one."""
    columns = [
        Column(run=index, when=when, answers=record.answers[when])
        for index, record in enumerate(records)
        for when in TIMES
        if record.answers[when]
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column.answers))
    pictures = {key: path for key in keys if (path := _picture(records, columns, key)) is not None}
    cards, images, size = [], list[str](), 0
    for key in _chosen(columns, pictures or dict.fromkeys(keys), count):
        url = _data_url(pictures[key]) if key in pictures else None
        if size + len(url or "") > MAX_IMAGE_BYTES:
            break
        size += len(url or "")
        images += [url] if url else []
        cards.append(_card(records, columns, key, len(images) - 1 if url else None))
    order = {key: place for place, key in enumerate(keys)}
    cards.sort(key=lambda card: order[card.pop("key")])
    return Cards(columns=columns, cards=cards, images=images, num_samples=len(keys))


def _chosen(columns: Sequence[Column], candidates: Container[SampleKey], count: int) -> list[SampleKey]:
    """Samples in turn of each comparison: before and after of every run, and the others beside the first run."""
    chosen = []
    for before, after in _comparisons(columns):
        first, second = (_rewards(answers, candidates) for answers in (before, after))
        chosen.append(most_telling(first, second, count))
    longest = max(map(len, chosen), default=0)
    in_turn = [ranking[place] for place in range(longest) for ranking in chosen if place < len(ranking)]
    return list(dict.fromkeys(in_turn))[:count]


def _rewards(answers: Answers, candidates: Container[SampleKey]) -> dict[SampleKey, float]:
    return {key: answer.reward for key, answer in answers.items() if key in candidates}


def _comparisons(columns: Sequence[Column]) -> Iterator[tuple[Answers, Answers]]:
    found = {(column.run, column.when): column.answers for column in columns}
    last = {run: found.get((run, "after"), found.get((run, "before"), {})) for run, _ in found}
    for run, answers in last.items():
        yield found.get((run, "before"), {}) if (run, "after") in found else {}, answers
    for answers in list(last.values())[1:]:
        yield next(iter(last.values())), answers


def _picture(records: Sequence[Record], columns: Sequence[Column], key: SampleKey) -> Path | None:
    found = (records[column.run].image(column.answers[key]) for column in columns if key in column.answers)
    return next((path for path in found if path is not None), None)


def _data_url(path: Path) -> str | None:
    """A small picture as a data URL; None where it is too large or no picture."""
    if path.stat().st_size > _MAX_ONE_IMAGE:
        return None
    data = path.read_bytes()
    kind = next((kind for mark, kind in _MEDIA_TYPES.items() if data.startswith(mark)), None)
    return None if kind is None else f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _card(records: Sequence[Record], columns: Sequence[Column], key: SampleKey, image: int | None) -> dict[str, Any]:
    answers = [column.answers.get(key) for column in columns]
    place, first = next((place, answer) for place, answer in enumerate(answers) if answer is not None)
    width, height = first.size
    return {
        "key": key,
        "task": key.task,
        "id": f"{key.source}/{key.id}" if key.source else key.id,
        "prompt": _cut(records[columns[place].run].prompt(key.task, key.query)),
        "target": _cut(key.target),
        "overlays": first.target_overlays[:_MAX_OVERLAYS],
        "width": width,
        "height": height,
        "image": image,
        "answers": [None if answer is None else _answer(answer) for answer in answers],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    scores = {name: round(value, 4) for name, value in answer.scores.items() if name != "reward"}
    return {
        "completion": _cut(answer.completion),
        "words": None if answer.words is None else _cut(answer.words),
        "overlays": answer.overlays[:_MAX_OVERLAYS],
        "reward": answer.reward,
        "scores": scores,
        "isTruncated": answer.is_truncated,
    }


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … ({len(text):,} characters)"
