"""What holds for every source: little memory, and samples that other processes can read."""

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from torch.utils.data import DataLoader

from perception_r1.data.loading import Batch, BatchDataset, EvalBatchSampler, load_sample_image
from perception_r1.data.samples import load
from perception_r1.data.sources import Coco, Conversations, Hub, JsonLines, PerceptionR1, PixMoCount, RefCoco, Source
from perception_r1.records import ImageBytes
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr
from tests.public_data import (
    coco_file,
    coco_image,
    hub_pixmo,
    hub_refcoco,
    instance,
    make_coco,
    make_conversations,
    make_refcoco,
    picture,
    write_json,
)

NUM_ROWS = 20_000


def json_lines(folder: Path) -> tuple[Source, float, float]:
    rows = [{"image": f"{k}.png", "text": "a page of text " * 20} for k in range(NUM_ROWS)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return JsonLines(folder / "a.jsonl"), 1.0, 2.0


def coco(folder: Path) -> tuple[Source, float, float]:
    images = [coco_image(k, f"{k:012d}.jpg") for k in range(NUM_ROWS)]
    items = [instance(k, k, 1, (1, 1, 5, 5), segmentation=[[1.5] * 100]) for k in range(NUM_ROWS)]
    return Coco(write_json(folder / "a.json", coco_file(images, items)), folder), 10.0, 50.0


def hub(folder: Path) -> tuple[Source, float, float]:
    rows = [{"image": b"x" * 2000, "id": f"{k}", "text": ["a page of text " * 20] * 2} for k in range(NUM_ROWS // 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return Hub(str(folder / "a.parquet"), {"image": "image", "id": "id", "text": "text"}), 4.0, 20.0


@pytest.mark.parametrize("make", [json_lines, coco, hub])
def test_of_many_rows_only_an_index_is_in_memory(make, tmp_path):
    source, most, most_while_reading = make(tmp_path)
    tracemalloc.start()
    try:
        assert len(source) == NUM_ROWS
        assert source[NUM_ROWS - 1].values
        now, peak = (number / 1e6 for number in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert now < most
    assert peak < most_while_reading


def sources(folder: Path) -> dict[str, tuple[Callable[[], Source], Any]]:
    make_coco(folder)
    make_refcoco(folder)
    make_conversations(folder / "fox" / "fox.json")
    picture(folder / "own" / "a.png")
    (folder / "own" / "a.jsonl").write_text('{"image": "a.png", "text": "x"}\n' * 4)
    (folder / "own" / "r1.jsonl").write_text('{"image": "a.png", "problem": "x", "solution": [1, 2, 3, 4]}\n' * 4)
    hub_refcoco(folder / "own").to_parquet(folder / "own" / "refcoco.parquet")
    hub_pixmo(folder / "own", has_points=True).to_parquet(folder / "own" / "pixmo.parquet")
    columns = {"image": "image", "question": "answer", "box": "bbox"}
    annotations = folder / "coco" / "annotations" / "instances_train2017.json"
    return {
        "JsonLines": (lambda: JsonLines(folder / "own" / "a.jsonl"), Ocr()),
        "Conversations": (lambda: Conversations(folder / "fox" / "fox.json"), Ocr()),
        "PerceptionR1": (lambda: PerceptionR1(folder / "own" / "r1.jsonl"), Grounding()),
        "Coco": (lambda: Coco(annotations, folder / "coco" / "train2017"), Detection(categories=("dog",))),
        "RefCoco": (
            lambda: RefCoco(
                folder / "refcoco" / "refs(unc).p",
                folder / "refcoco" / "instances.json",
                folder / "coco" / "train2014",
                split="val",
            ),
            Grounding(),
        ),
        "Hub": (lambda: Hub(str(folder / "own" / "refcoco.parquet"), columns, corners=False), Grounding()),
        "PixMoCount": (
            lambda: PixMoCount(folder / "own", path=str(folder / "own" / "pixmo.parquet"), take="first:3"),
            Counting(),
        ),
    }


def contents(batches: Any) -> list[Any]:
    return [
        (sample.id, sample.query, sample.target, sample.source, sample.image.size, sample.image.getpixel((0, 0)))
        for batch in batches
        for sample in batch
    ]


@pytest.mark.parametrize("name", ["JsonLines", "Conversations", "PerceptionR1", "Coco", "RefCoco", "Hub", "PixMoCount"])
def test_samples_can_be_read_by_workers_and_sent_to_processes(tmp_path, name):
    make, task = sources(tmp_path)[name]
    samples = load(make(), task, name="its name")
    dataset, sampler = BatchDataset(samples), EvalBatchSampler(len(samples), batch_size=2)
    here = contents(dataset[indices] for indices in sampler)
    assert len(here) == len(samples) >= 3
    loader: DataLoader[Batch] = DataLoader(
        dataset, sampler=sampler, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert contents(loader) == here
    assert contents(pickle.loads(pickle.dumps(dataset))[indices] for indices in sampler) == here


@pytest.mark.parametrize("name", ["JsonLines", "Coco", "RefCoco", "Hub", "PixMoCount"])
def test_what_a_worker_sends_holds_neither_source_nor_decoded_images(tmp_path, name):
    make, task = sources(tmp_path)[name]
    samples = load(make(), task, name="its name")
    indices = list(range(len(samples)))
    sent = pickle.dumps(BatchDataset(samples, lambda samples: None)[indices])  # type: ignore[arg-type, return-value]
    files = sum(len(sample.image.read()) for sample in samples if isinstance(sample.image, ImageBytes))
    assert len(sent) < 1000 * len(samples) + files
    arrived = [load_sample_image(sample) for sample in pickle.loads(sent)]
    assert contents([arrived]) == contents([BatchDataset(samples)[indices]])
