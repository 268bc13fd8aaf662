"""Damaged rows in the form of every source, and the check that they go through before a training.

A row is damaged where it is JSON, or as a line of bytes. Whatever is in a file, reading it ends in samples and in
problems of one line each, or in one line about the whole file.
"""

import base64
import json
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet

from campaigns.mutations import damaged_line, damaged_text, damaged_value
from campaigns.scenarios import SIZE, picture
from perception_r1.data.samples import check
from perception_r1.data.sources import (
    Coco,
    Conversations,
    Hub,
    JsonLines,
    MsSwift,
    PerceptionR1,
    RefCoco,
    RexOmni,
    Source,
    VlmR1,
)
from perception_r1.errors import UserError
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize
from perception_r1.task import Task
from perception_r1.tasks import TASKS

Values: TypeAlias = dict[str, Any]
_NUM_PICTURES = 5
_ROWS_OF_A_FILE = 10
"""Where one bad entry spoils a whole file, files are short."""
_LINE_SHARE = 0.15
"""Lines that are damaged as bytes."""
_MOST_CHARACTERS = 12_000
"""Of a sentence about a row: a path of 5,000 is named in full."""
_ANSWER = '[{"bbox_2d": [10, 20, 50, 80], "label": "cup"}]'
_IMAGE_SIZE = ImageSize(width=SIZE[0], height=SIZE[1], resized_width=SIZE[0], resized_height=SIZE[1])


@dataclass(kw_only=True)
class Read:
    """What came of damaged rows.

    Attributes:
        num_rows: That were written.
        num_refused: Of them, rows that no task can use, alone or with their file.
        faults: What went wrong.
    """

    num_rows: int = 0
    num_refused: int = 0
    faults: list[str]


def read_many(draw: random.Random, kind: int, count: int, folder: Path) -> tuple[str, Read]:
    """Write damaged rows of one kind into a folder and check them; also the name of the kind."""
    for number in range(_NUM_PICTURES):
        picture(folder / f"{number}.png")
    name, write = KINDS[kind % len(KINDS)]
    found = Read(faults=[])
    size = _ROWS_OF_A_FILE if name in _FRAGILE else count
    for part in range(-(-count // size)):
        where = folder / str(part)
        where.mkdir()
        source = write(where, size, draw)
        numbers = []
        for task_name, task in TASKS.items():
            try:
                numbers.append(_num_refused(source, task(), where))
            except Exception as error:
                told = f"{name} read for {task_name}: {type(error).__name__}: {error}"
                found.faults.append(" ".join(told.split())[:500])
        found.num_rows += size
        found.num_refused += min([size, *numbers])
    return name, found


def _num_refused(source: Source, task: Task[Any, Any], folder: Path) -> int:
    """Read all rows as a training does, and use those that are good; how many are bad."""
    num_refused = 0
    try:
        task = task.with_labels(source.labels() or task.labels)
        rows = list(check(source, task))
    except UserError as error:  # of the whole file
        _is_sentence(str(error), str(folder))
        return sys.maxsize
    for row in rows:
        if row.sample is None:
            num_refused += 1
            _is_sentence(str(row.problem), str(folder))
            continue
        task.messages(row.sample), task.describe(row.sample.target), task.overlays(row.sample.target)
        json.dumps(row.sample.row)
        texts = [_ANSWER]
        with suppress(UserError):  # a count alone is not to be written down
            texts.append(task.target_text(row.sample, CODECS["qwen2_5_vl"], _IMAGE_SIZE))
        for text in texts:
            task.score(task.parse_completion(text, CODECS["qwen2_5_vl"], _IMAGE_SIZE), row.sample.target)
    return num_refused


def _is_sentence(text: str, words: str) -> None:
    if "\n" in text or words not in text or len(text) > _MOST_CHARACTERS or "Traceback" in text:
        raise AssertionError(f"is no sentence about its place: {text[:300]!r}")
    text.encode("utf-8")


# ------------------------------------------------------------------------------------------------------------ good rows


def _own(draw: random.Random, number: int) -> Values:
    kinds: list[Values] = [
        {"question": "red cup", "box": [10, 20, 50, 80]},
        {"label": "cup", "points": [[30, 50], [90, 50]], "count": 2},
        {"label": "cup", "count": 3},
        {"label": "cup", "boxes": [[10, 20, 50, 80], [1, 2, 3, 4]]},
        {"objects": [{"box": [10, 20, 50, 80], "label": "cup", "area": 30.5, "crowd": True}, _object(draw)]},
        {"text": "first line\nsecond line"},
    ]
    row = {"image": _image(draw), "id": f"row {number}", "width": SIZE[0], "height": SIZE[1]}
    every = row | kinds[0] | kinds[1] | kinds[4] | kinds[5]
    return draw.choice([every, row | draw.choice(kinds)]) | draw.choice(({}, {"unit": "percent", "tolerance": 1}))


def _trainer(draw: random.Random, number: int) -> Values:
    solutions: list[Any] = [
        *([10, 20, 50, 80], [[1, 2], [3, 4]], 3, "<answer> 3 </answer>", "some text", {"x": [1, 2], "y": [3, 4]}),
        *(
            {"target_id": [18, 1], "target_box": [[1, 2, 3, 4], [5, 6, 7, 8]]},
            "[{'bbox_2d': (1, 2, 3, 4), 'label': 'a'}]",
        ),
        *('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "dog"}]\n```', [{"point_2d": [1, 2], "label": "a"}], []),
    ]
    row = {
        "image": _image(draw),
        "problem": "<image>\nHow many cups?",
        "solution": draw.choice(solutions),
        "id": number,
    }
    clicks = {"clicks": [[100, 200], {"x": 1, "y": 2}]}
    return row | draw.choice(({}, {}, clicks, {"normalized_solution": [100, 200, 300, 400]}))


def _conversation(draw: random.Random, number: int) -> Values:
    answer = draw.choice(("page\n1", "[1, 2, 30, 40]", "None", '[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]', 3))
    turns = [{"from": "human", "value": "<image>\nWhere is the dog?"}, {"from": "gpt", "value": answer}]
    return {"image": draw.choice((_image(draw), [_image(draw)])), "id": number, "conversations": turns}


def _swift(draw: random.Random, number: int) -> Values:
    messages = [{"role": "user", "content": "<image>find dogs"}, {"role": "assistant", "content": "[1, 2, 3, 4]"}]
    boxes = draw.choice(([[1, 2, 30, 40], [3, 4, 50, 60]], [[1, 2], [3, 4]]))
    objects = {"ref": draw.choice((["dog"], ["dog", "cat"], [])), "bbox": boxes, "bbox_type": "real"}
    images = draw.choice(([_image(draw)], [{"path": _image(draw), "bytes": None}]))
    return {"messages": messages, "images": images} | draw.choice(({}, {"objects": objects}, {"solution": 3}))


def _rex(draw: random.Random, number: int) -> Values:
    boxes = [{"phrase": draw.choice(("cup", "red cup")), "bbox": [10, 20, 50, 80]} for _ in range(3)]
    points = [{"caption": "cup", "point": [10, 20]}]
    return draw.choice(({"boxes": boxes}, {"points": points}, {"boxes": []}))


def _object(draw: random.Random) -> Values:
    return {"box": [1, 2, draw.randrange(3, 90), 70], "label": draw.choice(("cup", "dog"))}


def _image(draw: random.Random) -> str:
    return f"../{draw.randrange(_NUM_PICTURES)}.png"


# ---------------------------------------------------------------------------------------------------------------- files


def _line(row: Values, draw: random.Random) -> bytes:
    """A damaged row as a line; Python writes no number of more than some thousand digits."""
    if draw.random() < _LINE_SHARE:
        return damaged_line(json.dumps(row).encode(), draw)
    value = damaged_value(row, draw)
    return json.dumps(value, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def _lines(make: Callable[[random.Random, int], Values], kind: Callable[..., Source], **options: Any) -> Any:
    """A file of JSON lines."""

    def write(folder: Path, count: int, draw: random.Random) -> Source:
        lines = [_line(make(draw, number), draw).replace(b"\n", b" ") for number in range(count)]
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
        return kind(folder / "rows.jsonl", **options)

    return write


def _list(make: Callable[[random.Random, int], Values], kind: Callable[..., Source]) -> Any:
    """A file with one JSON list, now and then damaged as bytes."""

    def write(folder: Path, count: int, draw: random.Random) -> Source:
        rows = [damaged_value(make(draw, number), draw) for number in range(count)]
        data = json.dumps(rows).encode()
        (folder / "rows.json").write_bytes(damaged_line(data, draw) if draw.random() < 0.05 else data)
        return kind(folder / "rows.json")

    return write


def _coco_values(draw: random.Random, count: int) -> Values:
    images = [{"id": n, "file_name": _image(draw), "width": SIZE[0], "height": SIZE[1]} for n in range(count)]
    categories = [{"id": 1, "name": "dog"}, {"id": 7, "name": "cup"}]
    items = [
        {"id": n, "image_id": n, "category_id": 7, "bbox": [1, 2, 30, 40], "area": 9.5, "iscrowd": n % 2}
        for n in range(count)
    ]
    return {"images": images, "annotations": items, "categories": categories}


def _coco(folder: Path, count: int, draw: random.Random) -> Source:
    data = json.dumps(damaged_value(_coco_values(draw, count), draw)).encode()
    (folder / "instances.json").write_bytes(damaged_line(data, draw) if draw.random() < 0.1 else data)
    return Coco(folder / "instances.json", folder)


def _refcoco(folder: Path, count: int, draw: random.Random) -> Source:
    annotations = _coco_values(draw, count)
    if draw.random() < 0.2:
        annotations = damaged_value(annotations, draw)
    (folder / "instances.json").write_text(json.dumps(annotations))
    sentences = [{"sent": "the dog", "sent_id": 1}, {"sent": "a dog", "sent_id": 2}]
    references = damaged_value([{"split": "train", "ann_id": n, "sentences": sentences} for n in range(count)], draw)
    if draw.random() < 0.5:
        (folder / "refs.json").write_text(json.dumps(references))
        return RefCoco(folder / "refs.json", folder / "instances.json", folder, split="train")
    data = pickle.dumps(references, protocol=2)
    (folder / "refs(unc).p").write_bytes(damaged_line(data, draw) if draw.random() < 0.5 else data)
    return RefCoco(folder / "refs(unc).p", folder / "instances.json", folder, split="train")


def _tables(rows: str) -> Any:
    """Rex-Omni's two tables."""

    def write(folder: Path, count: int, draw: random.Random) -> Source:
        starts, lines = [], []
        for number in range(_NUM_PICTURES):
            starts.append(sum(map(len, lines)))
            data = base64.b64encode((folder / _image(draw)).read_bytes())
            lines.append(str(number).encode() + b"\t" + (damaged_line(data, draw) if number == 0 else data) + b"\n")
        (folder / "x.images.tsv").write_bytes(b"".join(lines))
        annotations = []
        for number in range(count):
            offset = str(draw.choice((*starts, *starts, *starts, 1, -1, 10**9, 10**30, "x"))).encode()
            annotations.append(offset + b"\t" + _line(_rex(draw, number), draw).replace(b"\n", b" "))
        (folder / "x.annotations.tsv").write_bytes(b"\n".join(annotations))
        return RexOmni(folder / "x.annotations.tsv", rows=rows)  # type: ignore[arg-type]

    return write


def _parquet(folder: Path, count: int, draw: random.Random) -> Source:
    """A table whose cells are texts: of a problem, and of a solution that is spelled out."""
    rows = [_trainer(draw, number) for number in range(count)]
    texts = [
        damaged_text(str(row["solution"]), draw, ("[", "(", "{", "'", "1e999", "nan", "\\", ",", "None", "lambda: 0"))
        for row in rows
    ]
    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    pictures = [
        str(row["image"]) if draw.random() < 0.9 else draw.choice((None, "", "none.png", "\x00")) for row in rows
    ]
    problems = [draw.choice((str(row["problem"]), None, "", " ")) for row in rows]
    table = pyarrow.table({"image": pictures, "problem": problems, "solution": clean})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    columns = {"image": "image", "problem": "problem", "solution": "solution"}
    return Hub(str(folder / "rows.parquet"), columns, images=folder)


KINDS: Sequence[tuple[str, Callable[[Path, int, random.Random], Source]]] = (
    ("own JSON lines", _lines(_own, JsonLines)),
    ("own JSON list", _list(_own, JsonLines)),
    ("Perception-R1", _lines(_trainer, PerceptionR1)),
    ("VLM-R1", _lines(_conversation, VlmR1)),
    ("ms-swift", _lines(_swift, MsSwift)),
    ("conversations", _list(_conversation, Conversations)),
    ("COCO", _coco),
    ("RefCOCO", _refcoco),
    ("Rex-Omni, images", _tables("images")),
    ("Rex-Omni, phrases", _tables("phrases")),
    ("a table of the hub", _parquet),
)
"""Every form of a source, by name, and how a file of it is written."""
_FRAGILE = ("COCO", "RefCOCO")
