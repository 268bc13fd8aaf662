import contextlib
import io
import math
import socket
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import multiprocessing as mp

from perception_r1.metrics import BoxAP, ScoreMeans, task_metrics
from perception_r1.records import Frame, LabelledBox, Score
from perception_r1.tasks.detection import Detection, DetectionPrediction, DetectionTarget

NAMES = ("cat", "dog", "cup")
STATS = [
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    None,
    None,
    "ar",
    "ar_small",
    "ar_medium",
    "ar_large",
]


@dataclass(frozen=True)
class Objects:
    objects: tuple[LabelledBox, ...]


def make_images(seed: int, count: int) -> tuple[list[Objects | None], list[Objects], list[Frame]]:
    """Predictions that are targets, shaken, relabelled, left out and doubled, in images of many sizes."""
    rng = np.random.default_rng(seed)
    predictions: list[Objects | None] = []
    targets, frames = [], []
    for _ in range(count):
        width, height = (int(side) for side in rng.integers(60, 900, 2))
        objects, guesses = [], []
        for _ in range(rng.integers(0, 7)):
            x, y = rng.uniform(0, 0.6, 2)
            w, h = rng.uniform(0.03, 0.4, 2)
            box = np.array([x, y, x + w, y + h])
            objects.append(LabelledBox(label=str(rng.choice(NAMES)), box=tuple(box.tolist())))
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                moved = box + rng.normal(0, 0.02, 4) * np.array([w, h, w, h]) * rng.choice([0, 1, 8])
                label = objects[-1].label if rng.random() < 0.8 else str(rng.choice(NAMES))
                if moved[0] < moved[2] and moved[1] < moved[3]:
                    guesses.append(LabelledBox(label=label, box=tuple(moved.tolist())))
        targets.append(Objects(objects=tuple(objects)))
        predictions.append(Objects(objects=tuple(guesses)) if guesses else None)
        frames.append(Frame(width=width, height=height, seen_width=28, seen_height=28))
    return predictions, targets, frames


def pycocotools_stats(predictions, targets, frames) -> dict[str, float]:
    """The same numbers by pycocotools' own road: a data set, and results that `loadRes` reads."""

    def rows(answers) -> list[dict[str, object]]:
        found = []
        for image, (answer, frame) in enumerate(zip(answers, frames, strict=True)):
            for item in answer.objects if answer is not None else ():
                x1, y1, x2, y2 = np.array(item.box) * [frame.width, frame.height, frame.width, frame.height]
                bbox = [x1, y1, x2 - x1, y2 - y1]
                found.append({"image_id": image, "category_id": NAMES.index(item.label), "bbox": bbox, "score": 1.0})
        return found

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(len(frames))],
            "categories": [{"id": number} for number in range(len(NAMES))],
            "annotations": [
                {**row, "id": number + 1, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
                for number, row in enumerate(rows(targets))
            ],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows(predictions)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(STATS, evaluation.stats, strict=True) if name is not None}


def test_score_means_agree_with_a_naive_mean():
    rng = np.random.default_rng(0)
    table = rng.uniform(size=(50, 3))
    metric = ScoreMeans(("reward", "iou", "count"))
    for start in range(0, 50, 7):
        rows = table[start : start + 7].tolist()
        metric.update(scores=[Score(reward=r, terms={"iou": i}, figures={"count": c}) for r, i, c in rows])
    means = metric.compute()
    assert [means[name].item() for name in ("reward", "iou", "count")] == pytest.approx(table.mean(axis=0), abs=1e-6)
    metric.reset()
    metric.update(scores=[])
    assert metric.compute()["iou"].isnan()


def test_score_means_refuse_names_that_collide():
    with pytest.raises(ValueError, match="different"):
        ScoreMeans(("reward", "iou", "iou"))


@pytest.mark.parametrize("seed", range(3))
def test_box_ap_agrees_with_pycocotools(seed, capsys):
    images = make_images(seed, 40)
    metric = BoxAP([*NAMES, "never seen"])
    for start in range(0, 40, 7):
        predictions, targets, frames = (part[start : start + 7] for part in images)
        metric.update(predictions=predictions, targets=targets, frames=frames)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert capsys.readouterr().out == ""
    assert found == pytest.approx(pycocotools_stats(*images), abs=1e-5)
    assert 0.2 < found["ap"] < found["ap50"] < 1


def test_box_ap_worked_by_hand():
    frame = Frame(width=200, height=100, seen_width=28, seen_height=28)
    cat = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))  # 100 x 50 pixels: medium
    metric = BoxAP(NAMES)
    metric.update(predictions=[], targets=[], frames=[])
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(predictions=[Objects((cat,))], targets=[Objects((cat,))], frames=[frame])
    found = {name: value.item() for name, value in metric.compute().items()}
    assert [found[name] for name in ("ap", "ap50", "ap75", "ap_medium", "ar", "ar_medium")] == pytest.approx([1.0] * 6)
    assert all(math.isnan(found[name]) for name in ("ap_small", "ap_large", "ar_small", "ar_large"))
    metric.update(predictions=[None], targets=[Objects((cat,))], frames=[frame])
    assert metric.compute()["ar"].item() == pytest.approx(0.5)
    metric.reset()
    metric.update(predictions=[None], targets=[Objects((cat,))], frames=[frame])
    assert metric.compute()["ap"].item() == 0
    metric.reset()
    metric.update(predictions=[Objects((cat,))], targets=[Objects(())], frames=[frame])
    assert metric.compute()["ap50"].isnan()


def test_task_metrics_give_one_flat_dict():
    task = Detection(categories=NAMES)
    cat = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))
    target = DetectionTarget(objects=(cat,))
    prediction = DetectionPrediction(objects=(cat,), num_listed=1, is_exact=True)
    metrics = task_metrics(task)
    frame = Frame(width=200, height=100, seen_width=28, seen_height=28)
    for guess in (prediction, None):
        metrics.update(scores=[task.score(guess, target)], predictions=[guess], targets=[target], frames=[frame])
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values["reward"] == pytest.approx(1.5)
    assert values["iou"] == pytest.approx(0.5)
    assert values["ap50"] == pytest.approx(values["ap"]) == pytest.approx(51 / 101)  # recall levels 0, .01, ... .5
    metrics.reset()
    assert metrics["ap"].records == []


SHARES = [[[*range(9)], [9, 10, 11]], [[*range(12)], []]]
"""Images of two devices: uneven numbers, and one device without any."""


def _merged(rank: int, port: int, queue) -> None:
    """What one device computes after the states of both are merged."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images = make_images(0, 12)
    for shares in SHARES:
        means, ap = ScoreMeans(("reward",)), BoxAP(NAMES)
        for index in shares[rank]:
            predictions, targets, frames = ([part[index]] for part in images)
            means.update(scores=[Score(reward=float(index))])
            ap.update(predictions=predictions, targets=targets, frames=frames)
        values = {**means.compute(), **ap.compute()}
        queue.put({name: value.item() for name, value in values.items()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_devices_together_find_what_one_finds(free_port):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_merged, args=(rank, free_port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    single = BoxAP(NAMES)
    predictions, targets, frames = make_images(0, 12)
    single.update(predictions=predictions, targets=targets, frames=frames)
    wanted = {"reward": 5.5} | {name: value.item() for name, value in single.compute().items()}
    for _ in range(len(processes) * len(SHARES)):
        assert queue.get() == pytest.approx(wanted, nan_ok=True, abs=1e-6)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
