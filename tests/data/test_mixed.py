"""Several tasks in one run: shares, orders, names, and that nothing is lost in a resume."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perception_r1.data.mixed import MixedData, interleaved
from perception_r1.data.sources import JsonLines
from perception_r1.errors import UserError
from perception_r1.task import Mixture
from perception_r1.tasks.counting import Counting, CountingData
from perception_r1.tasks.grounding import Grounding, GroundingData
from perception_r1.tasks.ocr import OcrData
from tests.evaluation.evaluating import write_sources

SIZES = {"num_val": 3, "num_test": 2}


def mixed(**options):
    tasks = {
        "grounding": GroundingData(num_train=12, **SIZES),
        "counting": CountingData(num_train=5, **SIZES),
        "ocr": OcrData(num_train=7, **SIZES),
    }
    return MixedData(tasks, **({"batch_size": 4} | options))


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(1, 300))
def test_after_any_number_of_turns_each_has_had_its_share(weights, size):
    shares = np.array(weights) / sum(weights)
    turns = interleaved(shares, size)
    assert len(turns) == size
    counts = np.cumsum(turns[:, None] == np.arange(len(shares)), axis=0)
    assert np.abs(counts[-1] - shares * size).max() < 1
    wanted = np.outer(np.arange(1, size + 1) / size, counts[-1])
    assert np.abs(counts - wanted).max() <= max(1.0, len(shares) / 2)


def test_every_task_begins_anew_when_all_of_it_was_shown():
    data = mixed(weights={"counting": 2.0}, seed=3)
    data.setup("fit")
    samples = data.samples("train")
    seen = {name: [] for name in data.parts}
    for epoch in range(4):
        order = data.train_order(epoch)
        assert order == data.train_order(epoch)
        assert len(order) == len(samples) == 24
        for index in order:
            sample = samples[index]
            seen[sample.source].append(sample.id)
    assert {name: len(ids) for name, ids in seen.items()} == {"grounding": 24, "counting": 48, "ocr": 24}
    for name, ids in seen.items():
        size = data.parts[name].num_scenes["train"]
        rounds = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        assert all(len(set(each)) == size for each in rounds)
        assert len({tuple(each) for each in rounds}) == len(rounds)  # in another order each time


def test_batches_hold_all_tasks_and_resume_where_they_were():
    data = mixed()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    batches = [[(sample.source, sample.id) for sample in batch] for batch in loader]
    assert all({source for source, _ in batch} == set(data.parts) for batch in batches)
    data._num_done = lambda: 3
    rest = data.train_dataloader()
    rest.sampler.set_epoch(1)
    assert [[(sample.source, sample.id) for sample in batch] for batch in rest] == batches[3:]


def test_samples_are_those_of_the_tasks_alone_under_their_names():
    data = mixed(seed=5)
    data.setup("test")
    data.setup("fit")
    alone = GroundingData(num_train=12, **SIZES, seed=5)
    alone.setup("test")
    found = [sample for sample in data.samples("test") if sample.source == "grounding"]
    for mine, own in zip(found, alone.samples("test"), strict=True):
        assert mine == replace(own, source="grounding", image=mine.image)
        assert mine.image.tobytes() == own.image.tobytes()
    assert Counter(sample.source for sample in data.samples("val")) == dict.fromkeys(data.parts, 3)
    assert [sample.source for sample in data.samples("val")][:6] == [*data.parts] * 2
    assert data.tested_sources == ("grounding", "counting", "ocr")
    assert data.task == Mixture(tasks={name: part.task for name, part in data.parts.items()})
    assert len(data.test_dataloader()) == 3
    assert {name: split["num_samples"] for name, split in data.describe().items() if name.startswith("counting")} == {
        "counting/train": 5, "counting/val": 3, "counting/test": 2
    }  # fmt: skip
    assert data.fingerprint() == mixed(seed=5).fingerprint()
    assert data.fingerprint() not in (mixed().fingerprint(), mixed(seed=5, weights={"ocr": 2.0}).fingerprint())


def test_a_validation_has_some_rows_of_each_task_and_begins_with_all(tmp_path):
    files = write_sources(tmp_path, "grounding", {"many": 12})
    parts = {"a": GroundingData(num_val=3), "b": GroundingData(val={"x": JsonLines(files["many"])}, num_val=5)}
    data = MixedData(parts)
    for part in parts.values():
        part.setup("validate")
    assert Counter(sample.source for sample in data.samples("val")) == {"a": 3, "b/x": 12}
    found = list(data.validated_samples())
    assert Counter(sample.source for sample in found) == {"a": 3, "b/x": 5}
    assert [sample.source for sample in found[:6]] == ["a", "b/x"] * 3
    assert {sample.id for sample in found[1:6:2]} <= {sample.id for sample in parts["b"].validated_samples()}


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        ({}, {}, "tasks is empty"),
        ({"a": GroundingData()}, {"weights": {"b": 1.0}}, "weights names b, which is none of the tasks a"),
        ({"a": GroundingData()}, {"weights": {"a": 0.0}}, "weights.a must be above 0"),
        ({"a": GroundingData()}, {"weights": {"a": float("inf")}}, "weights.a must be above 0"),
        ({"a/b": GroundingData()}, {}, "a task cannot be named 'a/b'"),
        ({"a": GroundingData(batch_size=3)}, {}, "tasks.a.batch_size has no effect in a mixture"),
        ({"a": GroundingData(shuffle=False)}, {}, "tasks.a.shuffle has no effect in a mixture"),
        ({"a": GroundingData()}, {"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tasks, options, words):
    with pytest.raises(UserError, match=words):
        MixedData(tasks, **options)


def test_options_of_tasks_stay_their_own():
    data = MixedData({"a": GroundingData(Grounding(iou_weight=2.0)), "b": CountingData(Counting(think=True))})
    assert data.task.tasks == {"a": Grounding(iou_weight=2.0), "b": Counting(think=True)}


def test_the_largest_images_of_all_tasks_come_first_when_asked_for(tmp_path):
    files = write_sources(tmp_path, "grounding", {"rows": 12})
    Image.new("RGB", (400, 300)).save(tmp_path / "rows" / "7.png")
    parts = {"a": GroundingData(num_train=12, num_val=2), "b": GroundingData(train_file=files["rows"])}
    data = MixedData(parts, longest_first=True, batch_size=2)
    data.setup("fit")
    assert len(data.num_train_pixels()) == len(data.samples("train"))
    order, plain = data._order(0), data.train_order(0)
    assert sorted(order) == sorted(plain)
    pixels = data.num_train_pixels()
    assert [pixels[index] for index in order[:2]] == sorted((pixels[index] for index in plain), reverse=True)[:2]
