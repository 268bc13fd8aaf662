"""Files of annotations with one thing wrong, by name, and whether a training can use them.

All but the damaged row are good, and so are the rows to validate on.
"""

import base64
import gzip
import json
import os
import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet

from campaigns.malformed_pictures import EITHER, PICTURES, REFUSED, USED
from campaigns.scenarios import SIZE, picture

Values: TypeAlias = Mapping[str, Any]
NUM_ROWS = 6
BAD = 3
"""Which of them is odd, from 0 on."""
GOOD: dict[str, dict[str, Any]] = {
    "grounding": {"question": "red cup", "box": [10, 20, 50, 80]},
    "counting": {"label": "cup", "points": [[30, 50], [90, 50]]},
    "detection": {"objects": [{"box": [10, 20, 50, 80], "label": "cup"}]},
    "ocr": {"text": "first line\nsecond line"},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something odd.

    Attributes:
        task: That reads it.
        expected: What becomes of it.
        write: Writes it into a folder; the source as the configuration names it.
        place: What the sentence names, if it is refused.
    """

    task: str
    expected: str
    write: Callable[[Path, random.Random], Values]
    place: str = f"rows.jsonl:{BAD + 1}"


def good_rows(folder: Path, task: str) -> list[dict[str, Any]]:
    """Rows and their pictures."""
    for number in range(NUM_ROWS):
        picture(folder / f"{number}.png")
    return [{"image": f"{number}.png", **GOOD[task]} for number in range(NUM_ROWS)]


def json_lines(path: Path) -> Values:
    """A file of JSON lines as a source."""
    return {"class_path": "JsonLines", "init_args": {"file": str(path)}}


def _dumped(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def _row(task: str, expected: str, **values: Any) -> Case:
    """One row with other values; a value of `...` is left out."""

    def write(folder: Path, draw: random.Random) -> Values:
        rows = good_rows(folder, task)
        rows[BAD] = {key: value for key, value in (rows[BAD] | values).items() if value is not ...}
        (folder / "rows.jsonl").write_bytes(b"\n".join(_dumped(rows)))
        return json_lines(folder / "rows.jsonl")

    return Case(task=task, expected=expected, write=write)


def _picture(name: str) -> Case:
    """One row with an odd picture; coordinates in percent suit a picture of any size."""
    make, expected = PICTURES[name]

    def write(folder: Path, draw: random.Random) -> Values:
        rows = good_rows(folder, "grounding")
        make(folder / "odd.png", draw)
        rows[BAD] |= {"image": "odd.png", "unit": "percent"}
        (folder / "rows.jsonl").write_bytes(b"\n".join(_dumped(rows)))
        return json_lines(folder / "rows.jsonl")

    return Case(task="grounding", expected=expected, write=write)


def _line(expected: str, change: Callable[[bytes], bytes]) -> Case:
    """One line with other bytes."""

    def write(folder: Path, draw: random.Random) -> Values:
        lines = _dumped(good_rows(folder, "grounding"))
        lines[BAD] = change(lines[BAD])
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
        return json_lines(folder / "rows.jsonl")

    return Case(task="grounding", expected=expected, write=write)


def _file(expected: str, change: Callable[[bytes], bytes], name: str = "rows.jsonl", place: str = "") -> Case:
    """A whole file with other bytes."""

    def write(folder: Path, draw: random.Random) -> Values:
        data = b"\n".join(_dumped(good_rows(folder, "grounding")))
        (folder / name).write_bytes(change(data))
        return json_lines(folder / name)

    return Case(task="grounding", expected=expected, write=write, place=place or name)


def _path(expected: str, make: Callable[[Path], object]) -> Case:
    """Something else where the file should be; its rows are in `kept.jsonl`."""

    def write(folder: Path, draw: random.Random) -> Values:
        (folder / "kept.jsonl").write_bytes(b"\n".join(_dumped(good_rows(folder, "grounding"))))
        make(folder / "rows.jsonl")
        return json_lines(folder / "rows.jsonl")

    return Case(task="grounding", expected=expected, write=write, place="rows.jsonl")


_COCO = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": SIZE[0], "height": SIZE[1]} for n in range(NUM_ROWS)],
    "annotations": [
        {"id": n, "image_id": n, "category_id": 7, "bbox": [1, 2, 30, 40], "area": 9.5} for n in range(NUM_ROWS)
    ],
    "categories": [{"id": 7, "name": "cup"}],
}


def _coco(expected: str, change: Callable[[dict[str, Any]], object], place: str = "instances.json") -> Case:
    """A file in COCO's form with a change, which may return other bytes."""

    def write(folder: Path, draw: random.Random) -> Values:
        good_rows(folder, "detection")
        values = json.loads(json.dumps(_COCO))
        changed = change(values)
        data = changed if isinstance(changed, bytes) else json.dumps(values).encode()
        (folder / "instances.json").write_bytes(data)
        paths = {"annotations": str(folder / "instances.json"), "images": str(folder)}
        return {"class_path": "Coco", "init_args": paths}

    return Case(task="detection", expected=expected, write=write, place=place)


def _refcoco(expected: str, make: Callable[[list[dict[str, Any]]], bytes]) -> Case:
    """A pickle of references."""

    def write(folder: Path, draw: random.Random) -> Values:
        good_rows(folder, "grounding")
        (folder / "instances.json").write_text(json.dumps(_COCO))
        sentences = [{"sent": "the cup", "sent_id": 1}]
        references = [
            {"split": "train", "ann_id": n, "sentences": [sentences[0] | {"sent_id": n}]} for n in range(NUM_ROWS)
        ]
        (folder / "refs.p").write_bytes(make(references))
        paths = {"references": str(folder / "refs.p"), "annotations": str(folder / "instances.json")}
        return {"class_path": "RefCoco", "init_args": {**paths, "images": str(folder), "split": "train"}}

    return Case(task="grounding", expected=expected, write=write, place="refs.p")


def _rex(expected: str, change: Callable[[list[bytes], list[bytes]], object], place: str = "x.annotations.tsv") -> Case:
    """Rex-Omni's two tables with a change."""

    def write(folder: Path, draw: random.Random) -> Values:
        good_rows(folder, "detection")
        images: list[bytes] = []
        annotations: list[bytes] = []
        for number in range(NUM_ROWS):
            offset = sum(len(line) + 1 for line in images)
            images.append(f"{number}\t".encode() + base64.b64encode((folder / f"{number}.png").read_bytes()))
            told = {"boxes": [{"phrase": "cup", "bbox": [1, 2, 30, 40]}]}
            annotations.append(f"{offset}\t{json.dumps(told)}".encode())
        change(images, annotations)
        (folder / "x.images.tsv").write_bytes(b"\n".join(images) + b"\n")
        (folder / "x.annotations.tsv").write_bytes(b"\n".join(annotations) + b"\n")
        return {"class_path": "RexOmni", "init_args": {"annotations": str(folder / "x.annotations.tsv")}}

    return Case(task="detection", expected=expected, write=write, place=place)


def _table(expected: str, change: Callable[[dict[str, list[Any]]], object], place: str = "rows.parquet") -> Case:
    """A parquet file with its pictures in it, and a change, which may return how to change its bytes."""

    def write(folder: Path, draw: random.Random) -> Values:
        good_rows(folder, "counting")
        pages = [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n in range(NUM_ROWS)]
        columns: dict[str, list[Any]] = {"image": pages, "label": ["cup"] * NUM_ROWS, "count": [2] * NUM_ROWS}
        changed = change(columns)
        path = folder / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        if callable(changed):
            path.write_bytes(changed(path.read_bytes()))
        names = {"image": "image", "label": "label", "count": "count"}
        return {"class_path": "Hub", "init_args": {"path": str(path), "columns": names}}

    return Case(task="counting", expected=expected, write=write, place=place)


def _trainer(kind: str, task: str, expected: str, good: Values, **values: Any) -> Case:
    """A row of another trainer with other values."""

    def write(folder: Path, draw: random.Random) -> Values:
        good_rows(folder, task)
        rows: list[dict[str, Any]] = [{"image": f"{number}.png", **good} for number in range(NUM_ROWS)]
        rows[BAD] |= values
        (folder / "rows.jsonl").write_bytes(b"\n".join(_dumped(rows)))
        return {"class_path": kind, "init_args": {"file": str(folder / "rows.jsonl")}}

    return Case(task=task, expected=expected, write=write)


class _Evil:
    """A pickle that ends the process which reads it: then no sentence comes, and the trial is faulty."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


_NAN, _INF = float("nan"), float("inf")
_BOXES: dict[str, tuple[Any, str]] = {
    "NaN": ([10, _NAN, 50, 80], REFUSED),
    "infinite": ([10, 20, _INF, 80], REFUSED),
    "negative": ([-10, 20, 50, 80], REFUSED),
    "swapped": ([50, 80, 10, 20], REFUSED),
    "x swapped": ([50, 20, 10, 80], REFUSED),
    "empty": ([10, 20, 10, 80], REFUSED),
    "of three numbers": ([10, 20, 50], REFUSED),
    "of five numbers": ([10, 20, 50, 80, 1], REFUSED),
    "of texts": (["10", "20", "50", "80"], REFUSED),
    "nested": ([[10, 20, 50, 80]], REFUSED),
    "of truths": ([False, False, True, True], REFUSED),
    "with null": ([10, None, 50, 80], REFUSED),
    "a number": (7, REFUSED),
    "a text": ("[10, 20, 50, 80]", REFUSED),
    "an object": ({"x1": 10}, REFUSED),
    "null": (None, REFUSED),
    "missing": (..., REFUSED),
    "outside": ([10, 20, 5000, 80], REFUSED),
    "of huge numbers": ([10, 20, 10**400, 80], REFUSED),
    "deep": ([[[[[[[[[[]]]]]]]]]], REFUSED),
    "of fractions of a pixel": ([0.25, 0.25, 0.5, 0.5], USED),
    "the whole picture": ([0, 0, *SIZE], USED),
}
_VLM = {"conversations": [{"from": "human", "value": "cup"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]}
_SWIFT = {"messages": [{"role": "user", "content": "cup"}], "objects": {"ref": ["cup"], "bbox": [[1, 2, 30, 40]]}}
CASES: dict[str, Case] = {
    **{f"picture: {name}": _picture(name) for name in PICTURES},
    **{f"box: {name}": _row("grounding", expected, box=box) for name, (box, expected) in _BOXES.items()},
    "question: empty": _row("grounding", REFUSED, question=""),
    "question: blank": _row("grounding", REFUSED, question=" \n"),
    "question: a number": _row("grounding", REFUSED, question=3),
    "question: half a character": _row("grounding", REFUSED, question="cup \ud800"),
    "question: control characters": _row("grounding", USED, question="cup\x00\x07\u202e"),
    "question: a picture's token": _row("grounding", REFUSED, question="cup <|image_pad|>"),
    "question: a video's token": _row("grounding", REFUSED, question="cup <|video_pad|>"),
    "question: other tokens": _row("grounding", USED, question="<|im_end|><|im_start|><|vision_start|><|box_end|>"),
    "question: 3,000 characters": _row("grounding", USED, question="cup " * 750),
    "image: missing": _row("grounding", REFUSED, image=...),
    "image: null": _row("grounding", REFUSED, image=None),
    "image: empty": _row("grounding", REFUSED, image=""),
    "image: a number": _row("grounding", REFUSED, image=7),
    "image: a list": _row("grounding", REFUSED, image=["0.png"]),
    "image: with a zero byte": _row("grounding", REFUSED, image="0.png\x00"),
    "image: a name of 5,000 characters": _row("grounding", REFUSED, image="a" * 5000),
    "image: an address": _row("grounding", REFUSED, image="https://example.org/0.png"),
    "image: outside of the folder": _row("grounding", EITHER, image="../../../../../../etc/passwd"),
    "image: by a roundabout way": _row("grounding", USED, image="./x/../0.png".replace("x/../", "")),
    "width: another": _row("grounding", REFUSED, width=SIZE[0] + 1),
    "width: a text": _row("grounding", REFUSED, width=str(SIZE[0])),
    "height: negative": _row("grounding", REFUSED, height=-SIZE[1]),
    "id: twice": _row("grounding", REFUSED, id="1"),
    "id: a list": _row("grounding", REFUSED, id=[1]),
    "id: true": _row("grounding", REFUSED, id=True),
    "id: a path": _row("grounding", USED, id="../../x"),
    "unit: unknown": _row("grounding", REFUSED, unit="inches"),
    "unit: a list": _row("grounding", REFUSED, unit=["pixels"]),
    "tolerance: 2": _row("grounding", REFUSED, tolerance=2),
    "tolerance: NaN": _row("grounding", REFUSED, tolerance=_NAN),
    "count: negative": _row("counting", REFUSED, points=..., count=-1),
    "count: a half": _row("counting", REFUSED, points=..., count=1.5),
    "count: true": _row("counting", REFUSED, points=..., count=True),
    "count: absurd": _row("counting", REFUSED, points=..., count=10**15),
    "count: a billion": _row("counting", EITHER, points=..., count=10**9),
    "count: another number than points": _row("counting", REFUSED, count=5),
    "count: nothing tells it": _row("counting", REFUSED, points=...),
    "points: outside": _row("counting", REFUSED, points=[[9999, 1]]),
    "points: of three numbers": _row("counting", REFUSED, points=[[1, 2, 3]]),
    "points: flat": _row("counting", REFUSED, points=[1, 2]),
    "points: 3,000": _row("counting", EITHER, points=[[1 + n % 100, 1] for n in range(3000)]),
    "label: missing": _row("counting", REFUSED, label=...),
    "objects: null": _row("detection", REFUSED, objects=None),
    "objects: an object": _row("detection", REFUSED, objects={"box": [1, 2, 3, 4], "label": "cup"}),
    "objects: numbers": _row("detection", REFUSED, objects=[1, 2]),
    "objects: none": _row("detection", USED, objects=[]),
    "objects: without a label": _row("detection", REFUSED, objects=[{"box": [1, 2, 3, 4]}]),
    "objects: a number for a label": _row("detection", REFUSED, objects=[{"box": [1, 2, 3, 4], "label": 3}]),
    "objects: a negative area": _row("detection", REFUSED, objects=[{"box": [1, 2, 3, 4], "label": "a", "area": -1}]),
    "objects: crowd in words": _row("detection", REFUSED, objects=[{"box": [1, 2, 3, 4], "label": "a", "crowd": "no"}]),
    "objects: 2,000": _row("detection", EITHER, objects=[{"box": [1, 2, 30, 40], "label": "cup"}] * 2000),
    "objects: a label with a token": _row(
        "detection", EITHER, objects=[{"box": [1, 2, 30, 40], "label": "<|im_end|>"}]
    ),
    "text: a number": _row("ocr", REFUSED, text=7),
    "text: missing": _row("ocr", REFUSED, text=...),
    "text: empty": _row("ocr", USED, text=""),
    "text: 100,000 characters": _row("ocr", USED, text="word " * 20_000),
    "line: not UTF-8": _line(REFUSED, lambda line: line.replace(b"cup", b"c\xffp")),
    "line: cut off": _line(REFUSED, lambda line: line[: len(line) // 2]),
    "line: blank": _line(EITHER, lambda line: b"  \t"),
    "line: a list": _line(REFUSED, lambda line: b"[" + line + b"]"),
    "line: a number": _line(REFUSED, lambda line: b"7"),
    "line: null": _line(REFUSED, lambda line: b"null"),
    "line: with a comma": _line(REFUSED, lambda line: line + b","),
    "line: two objects": _line(REFUSED, lambda line: line + line),
    "line: single quotes": _line(REFUSED, lambda line: line.replace(b'"', b"'")),
    "line: a comment": _line(REFUSED, lambda line: b"# " + line),
    "line: zero bytes": _line(REFUSED, lambda line: b"\x00" * 50),
    "line: 100,000 brackets": _line(REFUSED, lambda line: b"[" * 100_000),
    "line: a number of 5,000 digits": _line(REFUSED, lambda line: line.replace(b"10,", b"9" * 5000 + b",")),
    "line: a key twice": _line(USED, lambda line: line.replace(b"{", b'{"question": "x", ', 1)),
    "line: a megabyte more": _line(USED, lambda line: line[:-1] + b', "note": "' + b"x" * 10**6 + b'"}'),
    "file: with a byte order mark": _file(USED, lambda data: b"\xef\xbb\xbf" + data),
    "file: Windows line ends": _file(USED, lambda data: data.replace(b"\n", b"\r\n")),
    "file: UTF-16": _file(REFUSED, lambda data: data.decode().encode("utf-16")),
    "file: compressed": _file(REFUSED, gzip.compress),
    "file: empty": _file(REFUSED, lambda data: b""),
    "file: blank lines": _file(REFUSED, lambda data: b"\n \n\n"),
    "file: one row": _file(REFUSED, lambda data: data.split(b"\n")[0], place=" "),
    "file: a JSON list by another name": _file(REFUSED, lambda data: b"[" + data.replace(b"\n", b",\n") + b"]"),
    "file: lines as .json": _file(REFUSED, lambda data: data, name="rows.json"),
    "file: an object as .json": _file(REFUSED, lambda data: b"{}", name="rows.json"),
    "file: a list as .json": _file(USED, lambda data: b"[" + data.replace(b"\n", b",\n") + b"]", name="rows.json"),
    "file: a cut list as .json": _file(REFUSED, lambda data: b"[" + data.replace(b"\n", b",\n"), name="rows.json"),
    "file: an unknown ending": _file(USED, lambda data: data, name="rows.txt"),
    "file: none": _path(REFUSED, lambda path: None),
    "file: a folder": _path(REFUSED, lambda path: path.mkdir()),
    "file: a link": _path(USED, lambda path: path.symlink_to("kept.jsonl")),
    "file: a link to nothing": _path(REFUSED, lambda path: path.symlink_to("nowhere")),
    "file: a link to itself": _path(REFUSED, lambda path: path.symlink_to(path.name)),
    "file: a pipe": _path(REFUSED, lambda path: os.mkfifo(path)),
    "COCO: as it is": _coco(USED, lambda values: None),
    "COCO: no images": _coco(REFUSED, lambda values: values.pop("images")),
    "COCO: no categories": _coco(REFUSED, lambda values: values.pop("categories")),
    "COCO: an empty list of images": _coco(REFUSED, lambda values: values["images"].clear()),
    "COCO: two images of one id": _coco(REFUSED, lambda values: values["images"][1].update(id=0)),
    "COCO: an unknown category": _coco(REFUSED, lambda values: values["annotations"][1].update(category_id=3)),
    "COCO: a box of texts": _coco(EITHER, lambda values: values["annotations"][1].update(bbox=["1", "2", "3", "4"])),
    "COCO: a box of three": _coco(REFUSED, lambda values: values["annotations"][1].update(bbox=[1, 2, 3])),
    "COCO: a box of NaN": _coco(REFUSED, lambda values: values["annotations"][1].update(bbox=[_NAN, 2, 3, 4])),
    "COCO: a negative width": _coco(REFUSED, lambda values: values["annotations"][1].update(bbox=[30, 2, -9, 4])),
    "COCO: another size": _coco(REFUSED, lambda values: values["images"][1].update(width=3)),
    "COCO: a picture that is not there": _coco(REFUSED, lambda values: values["images"][1].update(file_name="no.png")),
    "COCO: a list": _coco(REFUSED, lambda values: b"[]"),
    "COCO: cut off": _coco(REFUSED, lambda values: json.dumps(values).encode()[:200]),
    "COCO: 100,000 brackets": _coco(REFUSED, lambda values: b"[" * 100_000),
    "RefCOCO: as it is": _refcoco(USED, lambda references: pickle.dumps(references, protocol=2)),
    "RefCOCO: a pickle that runs a program": _refcoco(REFUSED, lambda references: pickle.dumps(_Evil())),
    "RefCOCO: cut off": _refcoco(REFUSED, lambda references: pickle.dumps(references)[:60]),
    "RefCOCO: no pickle": _refcoco(REFUSED, lambda references: b"hello"),
    "RefCOCO: another split": _refcoco(REFUSED, lambda references: pickle.dumps([references[0] | {"split": "val"}])),
    "RefCOCO: an unknown object": _refcoco(REFUSED, lambda references: pickle.dumps([references[0] | {"ann_id": 99}])),
    "RefCOCO: no sentences": _refcoco(REFUSED, lambda references: pickle.dumps([references[0] | {"sentences": None}])),
    "Rex-Omni: as it is": _rex(USED, lambda images, annotations: None),
    "Rex-Omni: a wrong place": _rex(REFUSED, lambda images, rows: rows.__setitem__(BAD, b"7" + rows[BAD])),
    "Rex-Omni: a negative place": _rex(REFUSED, lambda images, rows: rows.__setitem__(BAD, b"-" + rows[BAD])),
    "Rex-Omni: an endless place": _rex(REFUSED, lambda images, rows: rows.__setitem__(BAD, b"9" * 400 + rows[BAD])),
    "Rex-Omni: no tab": _rex(REFUSED, lambda images, rows: rows.__setitem__(BAD, rows[BAD].replace(b"\t", b" "))),
    "Rex-Omni: a broken picture": _rex(
        REFUSED, lambda images, rows: images.__setitem__(5, images[5][:-40] + b"!" * 40)
    ),
    "Rex-Omni: a list": _rex(REFUSED, lambda images, rows: rows.__setitem__(BAD, rows[BAD].split(b"\t")[0] + b"\t[]")),
    "table: as it is": _table(USED, lambda columns: None),
    "table: cut off": _table(REFUSED, lambda columns: lambda data: data[: len(data) // 2]),
    "table: no bytes": _table(REFUSED, lambda columns: lambda data: b""),
    "table: no column of counts": _table(REFUSED, lambda columns: columns.pop("count")),
    "table: an empty cell": _table(REFUSED, lambda columns: columns["image"].__setitem__(BAD, None)),
    "table: a broken picture": _table(
        REFUSED, lambda columns: columns["image"].__setitem__(BAD, {"bytes": b"no picture", "path": None})
    ),
    "table: numbers for pictures": _table(REFUSED, lambda columns: columns.update(image=[1] * NUM_ROWS)),
    "table: a missing label": _table(REFUSED, lambda columns: columns["label"].__setitem__(BAD, None)),
    "VLM-R1: as it is": _trainer("VlmR1", "grounding", USED, _VLM),
    "VLM-R1: no conversations": _trainer("VlmR1", "grounding", REFUSED, _VLM, conversations=None),
    "VLM-R1: several pictures": _trainer("VlmR1", "grounding", REFUSED, _VLM, image=["0.png", "1.png"]),
    "VLM-R1: words in a conversation": _trainer("VlmR1", "grounding", REFUSED, _VLM, conversations=["a", 3]),
    "ms-swift: as it is": _trainer("MsSwift", "detection", USED, _SWIFT),
    "ms-swift: an unknown kind of box": _trainer(
        "MsSwift", "detection", REFUSED, _SWIFT, objects={"ref": ["cup"], "bbox": [[1, 2, 3, 4]], "bbox_type": ["real"]}
    ),
    "ms-swift: more names than boxes": _trainer(
        "MsSwift", "detection", REFUSED, _SWIFT, objects={"ref": ["cup", "dog"], "bbox": [[1, 2, 3, 4]]}
    ),
    "Perception-R1: as it is": _trainer(
        "PerceptionR1", "grounding", USED, {"problem": "a", "solution": [1, 2, 30, 40]}
    ),
    "Perception-R1: true for a solution": _trainer(
        "PerceptionR1", "grounding", REFUSED, {"problem": "a", "solution": [1, 2, 30, 40]}, solution=True
    ),
    "Perception-R1: clicks in words": _trainer(
        "PerceptionR1", "counting", REFUSED, {"problem": "a", "clicks": [[1, 2]]}, clicks="here"
    ),
}
"""All of them."""
