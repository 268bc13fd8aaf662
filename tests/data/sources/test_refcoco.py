import contextlib
import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perception_r1.data.samples import load
from perception_r1.data.sources import DataError, RefCoco, refcoco
from perception_r1.tasks.grounding import Grounding
from tests.public_data import coco_file, coco_image, instance, picture, reference, write_json

REFERENCES = [
    reference(4, 100, 7, "train", "left dog", "the dog that sleeps"),
    reference(5, 101, 7, "testA", "right dog"),
    reference(6, 101, 7, "train", "dog on the right"),
]


@pytest.fixture
def make(tmp_path):
    """A source of the given references: their bytes, or what a pickle of protocol 2 is to hold."""

    def make(references=REFERENCES, split="train", name="refs(unc).p") -> RefCoco:
        picture(tmp_path / "images" / "7.jpg")
        boxes = {100: (20, 10, 50, 40), 101: (100.25, 0, 100, 50)}
        file = coco_file([coco_image(7, "7.jpg")], [instance(n, 7, 18, box) for n, box in boxes.items()])
        write_json(tmp_path / "instances.json", file)
        data = references if isinstance(references, bytes) else pickle.dumps(references, protocol=2)
        (tmp_path / name).write_bytes(data)
        return RefCoco(tmp_path / name, tmp_path / "instances.json", tmp_path / "images", split=split)

    return make


def test_each_sentence_of_a_split_is_a_row(make):
    samples = load(make(), Grounding())
    assert [(sample.id, sample.query, sample.target.box) for sample in samples] == [
        ("40", "left dog", (0.1, 0.1, 0.35, 0.5)),
        ("41", "the dog that sleeps", (0.1, 0.1, 0.35, 0.5)),
        ("60", "dog on the right", (0.50125, 0.0, 1.0, 0.5)),
    ]
    assert [sample.query for sample in load(make(split="testA"), Grounding())] == ["right dog"]


def python_2(value: object) -> bytes:
    """What Python 2 writes in protocol 2: its texts are bytes, its unicode and long have their own opcodes."""

    def written(value: object) -> bytes:
        if isinstance(value, bytes):
            return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING
        if isinstance(value, str):
            data = value.encode()
            return b"X" + len(data).to_bytes(4, "little") + data  # BINUNICODE
        if isinstance(value, int):
            return b"\x8a\x05" + value.to_bytes(5, "little")  # LONG1
        if isinstance(value, dict):
            return b"}(" + b"".join(written(k) + written(v) for k, v in value.items()) + b"u"
        return b"](" + b"".join(map(written, value)) + b"e"

    return b"\x80\x02" + written(value) + b"."


def test_a_file_that_python_2_wrote_is_read(make):
    def as_bytes(value):
        if isinstance(value, dict):
            return {as_bytes(key): as_bytes(item) for key, item in value.items()}
        if isinstance(value, list):
            return [as_bytes(item) for item in value]
        return value.encode() if isinstance(value, str) and value != "caf\u00e9 dog" else value

    references = [*REFERENCES, reference(8, 100, 7, "train", "caf\u00e9 dog")]
    data = python_2(as_bytes(references))
    assert b"U\x05split" in data
    assert list(make(data)) == list(make(references))
    assert [row.values["question"] for row in make(data)][-1] == "caf\u00e9 dog"


def test_references_as_json_are_the_same(make):
    found = list(make(json.dumps(REFERENCES).encode(), name="refs.json"))
    assert [row.values for row in found] == [row.values for row in make()]


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(make, tmp_path, protocol):
    target = tmp_path / "ran"
    for content in (Runs(target), [*REFERENCES, {"split": Runs(target)}]):
        with pytest.raises(DataError, match=r"cannot be read as references \(it asks for \w+\.system, which") as caught:
            len(make(pickle.dumps(content, protocol=protocol)))
        assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cposix\nsystem\n(S'touch ran'\ntR.",
        b"\x80\x02cbuiltins\neval\nq\x00X\x01\x00\x00\x001q\x01\x85q\x02Rq\x03.",
        b"(S'x'\nicollections\nOrderedDict\n.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
    ],
)
def test_classes_functions_extensions_and_persistent_ids_are_refused(make, data):
    with pytest.raises(DataError, match="cannot be read as references"):
        len(make(data))


@pytest.mark.parametrize(
    "data", [b"", b".", b"\x80\x02", b"\x80\x63.", b"(", pickle.dumps(REFERENCES)[:-40], b"\xff" * 9]
)
@pytest.mark.parametrize("name", ["refs.p", "refs.json"])
def test_a_damaged_file_is_an_error_of_one_sentence(make, data, name):
    with pytest.raises(DataError, match=r"refs\.\w+: cannot be read as references \(") as caught:
        len(make(data, name=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        ({}, "must hold a list of references, each with its split"),
        ([1], "must hold a list of references, each with its split"),
        ([{"ann_id": 100}], "must hold a list of references, each with its split"),
        ([], "has no split 'train', only nothing"),
        ([reference(1, 100, 7, "val", "a")], "has no split 'train', only val"),
        ([reference(1, 999, 7, "train", "a")], r"belong to .*instances\.json \(KeyError: 999\)"),
        ([{"split": "train"}], "must hold references with split, ann_id and sentences"),
        ([{"split": "train", "ann_id": [1], "sentences": []}], "must hold references with split, ann_id"),
        ([{"split": "train", "ann_id": 100, "sentences": None}], "must hold references with split, ann_id"),
        ([{"split": "train", "ann_id": 100, "sentences": ["a"]}], "must hold references with split, ann_id"),
        ([{"split": "train", "ann_id": 100, "sentences": [{"sent_id": 10**30, "sent": "a"}]}], "must hold references"),
    ],
)
def test_what_is_no_list_of_references_is_an_error_of_one_sentence(make, references, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        len(make(references))
    assert "\n" not in str(caught.value)


def test_a_bad_sentence_spoils_its_row_only(make):
    references = [reference(1, 100, 7, "train", "a", " ", "c"), reference(1, 101, 7, "train", "d")]
    references[0]["sentences"][2]["sent"] = None
    with pytest.raises(DataError, match=r"refs\(unc\)\.p:2: question: must not be blank"):
        load(make(references), Grounding())
    assert [sample.query for sample in load(make(references), Grounding(), on_bad_row="skip")] == ["a"]
    with pytest.raises(DataError, match=r"p:2: id: must be unique, but '10' is also that of .*:1"):
        load(make([reference(1, 100, 7, "train", "a"), references[1]]), Grounding())


def test_missing_files_are_errors(make, tmp_path):
    source = make()
    source.references.unlink()
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: cannot be read \(No such file"):
        len(source)
    source.annotations.unlink()
    with pytest.raises(DataError, match=r"instances\.json: cannot be read \(No such file"):
        len(source)


def test_fingerprint_knows_both_files_and_the_split(make):
    source = make()
    prints = {source.fingerprint(), make(split="testA").fingerprint(), make(REFERENCES[:1]).fingerprint()}
    source.annotations.write_text(source.annotations.read_text() + " ")
    assert len({*prints, source.fingerprint()}) == 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.binary(max_size=60), cut=st.integers(0, 400))
def test_no_bytes_raise_anything_but_a_data_error(make, data, cut):
    whole = pickle.dumps(REFERENCES, protocol=2)
    for content in (data, b"\x80\x02" + data, whole[:cut] + data + whole[cut + len(data) :]):
        with contextlib.suppress(DataError):
            load(make(content), Grounding(), on_bad_row="skip")


def test_all_splits_share_what_was_parsed_once(make, monkeypatch):
    parsed, load_json, unpickler = [], json.load, refcoco._PlainUnpickler
    monkeypatch.setattr(json, "load", lambda *args, **kw: parsed.append("instances") or load_json(*args, **kw))
    monkeypatch.setattr(refcoco, "_PlainUnpickler", lambda *args, **kw: parsed.append("refs") or unpickler(*args, **kw))
    sources = [make(split=split) for split in ("train", "testA", "train")]
    os.utime(sources[0].references, ns=(1, 1))  # each `make` writes the files anew
    os.utime(sources[0].annotations, ns=(1, 1))
    assert [len(source) for source in sources] == [3, 1, 3]
    assert sorted(parsed) == ["instances", "refs"]
    del sources
    assert len(make()) == 3
    assert sorted(parsed) == ["instances", "instances", "refs", "refs"], "nothing is kept that nobody uses"


def test_a_file_that_has_changed_is_parsed_again(make):
    first = make()
    assert len(first) == 3
    again = make([*REFERENCES, reference(9, 100, 7, "train", "another dog")])
    assert (len(again), len(first)) == (4, 3)
