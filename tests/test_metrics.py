import contextlib
import io
import json
import math
import socket
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from torch import multiprocessing as mp
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from perception_r1.metrics import BoxAP, MeanScore, TaskMetrics, make_metrics, margins_of_error
from perception_r1.records import ImageSize, LabelledBox, Score
from perception_r1.rows import Row
from perception_r1.task import Mixture
from perception_r1.tasks.detection import Detection, DetectionPrediction, DetectionTarget
from tests.callbacks.toy import ToyTask

NAMES = ("cat", "dog", "cup")
SIZE = ImageSize(width=200, height=100, resized_width=28, resized_height=28)
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


def make_coco(seed: int, num_images: int, decimals: int) -> tuple[dict[str, list], list[dict]]:
    """Annotations and results as COCO's files have them: shaken, relabelled, left out and doubled; areas and crowds.

    Ids are COCO's: large, with gaps, and not in the order of the file. Without decimals many overlaps and areas lie
    exactly on a threshold. Results are not rounded.
    """
    rng = np.random.default_rng(seed)
    images, annotations, crowds, results = [], [], [], []
    for image_id in rng.choice(600_000, num_images, replace=False).tolist():
        width, height = (int(side) for side in rng.integers(70, 900, 2))
        images.append({"id": image_id, "width": width, "height": height})
        for _ in range(rng.integers(0, 7)):
            x, y = rng.uniform(0, 0.6, 2) * [width, height]
            w, h = rng.choice([0.03, 0.1, 0.2, 0.39], 2) * [width, height] if rng.random() < 0.8 else (32, 32)
            bbox = [max(round(float(value), decimals), 1) for value in (x, y, w, h)]
            bbox[2:] = min(bbox[2], width - bbox[0]), min(bbox[3], height - bbox[1])
            category = int(rng.integers(3)) * 10 + 1
            row = {"image_id": image_id, "category_id": category, "bbox": bbox}
            share = rng.choice([1, 0.8, 0.5])
            is_crowd = rng.random() < 0.15
            area = bbox[2] * bbox[3] * float(share)
            (crowds if is_crowd else annotations).append(row | {"area": area, "iscrowd": int(is_crowd)})
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                moved = [*bbox]
                if rng.random() < 0.5:  # half the box: an overlap of exactly one half
                    moved[2] = max(bbox[2] // 2, 1)
                elif rng.random() < 0.8:
                    moved = [value * float(rng.normal(1, 0.1)) for value in bbox]
                label = category if rng.random() < 0.8 else int(rng.integers(3)) * 10 + 1
                if min(moved[2:]) > 0:
                    results.append({"image_id": image_id, "category_id": label, "bbox": moved, "score": 1.0})
    annotations = [{**row, "id": number} for number, row in enumerate([*annotations, *crowds], start=1)]
    categories = [{"id": number * 10 + 1, "name": name} for number, name in enumerate(NAMES)]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def pycocotools_stats(truth: dict[str, list], results: list[dict]) -> dict[str, float]:
    """The metrics by pycocotools' own road: the annotations of a file, and results that `loadRes` reads."""
    truth, results = json.loads(json.dumps([truth, results]))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = {name: float(value) for name, value in zip(STATS, evaluation.stats, strict=True) if name is not None}
    return {name: value if value >= 0 else math.nan for name, value in values.items()}


@dataclass(frozen=True)
class Image:
    """What a metric is told about one image."""

    prediction: Objects | None
    target: DetectionTarget
    image_size: ImageSize
    id: str


def our_images(truth: dict[str, list], results: list[dict]) -> list[Image]:
    """The same by the project's own road: rows of the data format, read by the task."""
    names = {category["id"]: category["name"] for category in truth["categories"]}

    def corners(row: dict) -> list[float]:
        x, y, w, h = row["bbox"]
        return [x, y, x + w, y + h]

    found = []
    for image in truth["images"]:
        width, height = image["width"], image["height"]
        objects = [
            {"box": corners(row), "label": names[row["category_id"]], "area": row["area"]}
            | ({"crowd": True} if row["iscrowd"] else {})
            for row in truth["annotations"]
            if row["image_id"] == image["id"]
        ]
        for thing in objects:
            if thing["area"] == (thing["box"][2] - thing["box"][0]) * (thing["box"][3] - thing["box"][1]):
                del thing["area"]  # that of the box goes without saying
        _, target = Detection(categories=NAMES).read_row(Row({"objects": objects}, width=width, height=height))
        sides = np.array([width, height, width, height])
        guesses = tuple(
            LabelledBox(label=names[row["category_id"]], box=tuple((corners(row) / sides).tolist()))
            for row in results
            if row["image_id"] == image["id"]
        )
        image_size = ImageSize(width=width, height=height, resized_width=28, resized_height=28)
        prediction = Objects(guesses) if guesses else None
        found.append(Image(prediction=prediction, target=target, image_size=image_size, id=str(image["id"])))
    return found


def update(metric: BoxAP, images: list[Image]) -> None:
    metric.update(
        preds=[image.prediction for image in images],
        target=[image.target for image in images],
        image_sizes=[image.image_size for image in images],
        ids=[image.id for image in images],
    )


def values_of(metric: BoxAP) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def exactly(values: dict[str, float]) -> object:
    return pytest.approx(values, abs=1e-9, rel=0, nan_ok=True)


def add(metric: MeanScore, *rows: tuple[float, float, float]) -> None:
    """Count scores of the toy task, given as reward, its component and its metric."""
    scores = [Score(reward=r, components={"format": f}, metrics={"accuracy": a}) for r, f, a in rows]
    metric.update(preds=[None] * len(rows), target=[None] * len(rows), scores=scores)


def test_score_means_agree_with_a_naive_mean():
    rng = np.random.default_rng(0)
    table = rng.uniform(size=(50, 3))
    metric = MeanScore(ToyTask())
    for start in range(0, 50, 7):
        add(metric, *table[start : start + 7].tolist())
    means = metric.compute()
    assert list(means) == ["reward", "reward/format", "accuracy"]
    assert [value.item() for value in means.values()] == pytest.approx(table.mean(axis=0), abs=1e-12)
    metric.reset()
    add(metric)
    assert metric.compute()["reward/format"].isnan()


def test_margins_of_means_are_those_of_students_t():
    table = np.random.default_rng(0).uniform(size=(9, 3))
    metrics = MetricCollection({"scores": MeanScore(ToyTask())}, prefix="test/")
    add(metrics["scores"], *table.tolist())
    low, high = stats.t.interval(0.95, 8, loc=table.mean(axis=0), scale=stats.sem(table, axis=0))
    found = margins_of_error(metrics)
    assert list(found) == ["test/reward", "test/reward/format", "test/accuracy"]
    assert [value.item() for value in found.values()] == pytest.approx((high - low) / 2, abs=1e-12)


def test_margins_of_several_tasks_have_their_names_and_only_those_that_are_known():
    tasks = TaskMetrics(Mixture(tasks={"a": ToyTask(), "b": ToyTask()}), "val")
    table = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    add(tasks.collections[0]["scores"], *table.tolist())
    found = tasks.margins_of_error()
    assert list(found) == ["val/a/margin_of_error/reward", "val/a/margin_of_error/accuracy"]
    expected = stats.t.ppf(0.975, 2) * stats.sem(table[:, 0])
    assert found["val/a/margin_of_error/reward"].item() == pytest.approx(expected, abs=1e-12)


def test_a_margin_worked_by_hand():
    metric = MeanScore(ToyTask())
    for number in range(4):
        add(metric, (number, 0.1, number % 2))  # variances of 5/3, 0 and 1/3
    margins = [value.item() for value in metric.margins_of_error().values()]
    expected = [3.182446 * math.sqrt(5 / 12), math.nan, 3.182446 * math.sqrt(1 / 12)]
    assert margins == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_too_few_samples_have_no_margin():
    metric = MeanScore(ToyTask())
    assert all(value.isnan() for value in metric.margins_of_error().values())
    add(metric, (1, 1, 1))
    assert all(value.isnan() for value in metric.margins_of_error().values())


def test_predictions_without_scores_are_scored_by_the_task():
    target = (0.25, 0.25, 0.75, 0.75)
    metric = MeanScore(ToyTask())
    metric.update(preds=[target, None, target, (0, 0, 1, 1)], target=[target] * 4)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "reward": 0.5, "reward/format": 0.5, "accuracy": 0.5
    }  # fmt: skip


def test_score_means_refuse_names_that_collide():
    class Twice(ToyTask):
        metric_names = ("accuracy", "accuracy")

    with pytest.raises(ValueError, match="different"):
        MeanScore(Twice())


def test_in_training_there_are_neither_slow_metrics_nor_those_of_a_data_set():
    class Slow(ToyTask):
        eval_metric_names = ("bleu",)

        def eval_metrics(self, prediction, target):
            return {"bleu": 0.25}

        def dataset_metrics(self):
            return {"boxes": BoxAP(NAMES)}

    means = ["reward", "reward/format", "accuracy"]
    assert list(make_metrics(Slow(), is_evaluation=False).compute()) == means
    metrics = make_metrics(Slow()).clone(prefix="val/")
    metrics.update(preds=[None], target=[DetectionTarget(objects=())], image_sizes=[SIZE], ids=["1"])
    values = metrics.compute()
    assert list(values)[:5] == [f"val/{name}" for name in (*means, "bleu", "ap")]
    assert values["val/bleu"] == 0.25


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decimals", [0, 2, 6])
def test_box_ap_is_that_of_pycocotools_whatever_the_batches(seed, decimals, capsys):
    truth, results = make_coco(seed, 40, decimals)
    images = our_images(truth, results)
    metric = BoxAP([*NAMES, "never seen"])
    np.random.default_rng(seed).shuffle(images)
    for start in range(0, 40, 7):
        update(metric, images[start : start + 7])
    found = values_of(metric)
    assert capsys.readouterr().out == ""
    wanted = pycocotools_stats(truth, results)
    assert found == exactly(wanted)
    assert 0.02 < found["ap"] < found["ap50"] < 1
    assert all(value.dtype == torch.float64 for value in metric.compute().values())


def test_margins_of_box_ap_are_those_of_images_drawn_again_and_again():
    images = sorted(our_images(*make_coco(1, 12, 2)), key=lambda image: int(image.id))
    metric = BoxAP([*NAMES, "never seen"])
    update(metric, images)
    margins = {name: value.item() for name, value in metric.margins_of_error().items()}
    assert values_of(metric) == exactly(pycocotools_stats(*make_coco(1, 12, 2)))
    generator, found = np.random.default_rng(0), []
    for _ in range(200):
        drawn = BoxAP(NAMES)
        chosen = np.sort(generator.integers(12, size=12)).tolist()
        update(drawn, [replace(images[index], id=str(number)) for number, index in enumerate(chosen)])
        found.append(values_of(drawn))
    quantile = 2.200985  # of Student's t at 97.5 %, 11 degrees of freedom
    for name in ("ap", "ap50", "ap75", "ar"):
        assert margins[name] == pytest.approx(quantile * np.std([one[name] for one in found], ddof=1), rel=1e-6)
        assert margins[name] > 0.03
    assert {name for name, value in margins.items() if math.isnan(value)} == {
        f"{name}_{size}" for name in ("ap", "ar") for size in ("small", "medium", "large")
    }


def test_without_objects_or_with_one_image_box_ap_has_no_margin():
    metric = BoxAP(NAMES)
    assert all(value.isnan() for value in metric.margins_of_error().values())
    update(metric, our_images(*make_coco(1, 12, 2))[:1])
    assert all(value.isnan() for value in metric.margins_of_error().values())


def test_areas_crowds_and_the_order_of_images_each_count():
    """The test above would not see what makes no difference."""
    truth, results = make_coco(0, 40, 0)
    wanted = pycocotools_stats(truth, results)
    for change in ({"area": 5000}, {"iscrowd": 0}):
        annotations = [{**row, **change} for row in truth["annotations"]]
        assert pycocotools_stats({**truth, "annotations": annotations}, results) != exactly(wanted)
    turned = {image["id"]: 600_000 - image["id"] for image in truth["images"]}
    images = [{**image, "id": turned[image["id"]]} for image in truth["images"]]
    annotations, results = (
        [{**row, "image_id": turned[row["image_id"]]} for row in rows] for rows in (truth["annotations"], results)
    )
    assert pycocotools_stats({**truth, "images": images, "annotations": annotations}, results) != exactly(wanted)


def test_ids_that_are_no_numbers_have_an_order_of_their_own():
    images = [replace(image, id=f"page {image.id}") for image in our_images(*make_coco(1, 20, 2))]
    images[3], images[4] = replace(images[3], id="\ud800"), replace(images[4], id="9" * 5000)
    found = []
    for order in (images, images[::-1], sorted(images, key=lambda image: image.id)):
        metric = BoxAP(NAMES)
        update(metric, order)
        found.append(values_of(metric))
    assert found[1] == exactly(found[0])
    assert found[2] == exactly(found[0])


def test_box_ap_worked_by_hand():
    cat = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))  # 100 x 50 pixels: medium
    target = DetectionTarget(objects=(cat,))
    hit, miss = (Image(prediction=found, target=target, image_size=SIZE, id="1") for found in (Objects((cat,)), None))
    metric = BoxAP(NAMES)
    update(metric, [])
    assert all(value.isnan() for value in metric.compute().values())
    update(metric, [hit])
    found = values_of(metric)
    assert [found[name] for name in ("ap", "ap50", "ap75", "ap_medium", "ar", "ar_medium")] == pytest.approx([1.0] * 6)
    assert all(math.isnan(found[name]) for name in ("ap_small", "ap_large", "ar_small", "ar_large"))
    update(metric, [replace(miss, id="2")])
    assert metric.compute()["ar"].item() == pytest.approx(0.5)
    metric.reset()
    update(metric, [miss])
    assert metric.compute()["ap"].item() == 0
    metric.reset()
    update(metric, [replace(hit, target=DetectionTarget(objects=()))])
    assert metric.compute()["ap50"].isnan()


def test_an_area_decides_the_size_and_a_crowd_forgives():
    cat = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))
    inside = LabelledBox(label="cat", box=(0.6, 0.1, 0.7, 0.3))
    crowd = LabelledBox(label="cat", box=(0.5, 0.0, 1.0, 1.0))
    image = Image(
        prediction=Objects((inside, inside, cat)),
        target=DetectionTarget(objects=(cat,), areas=(1024.0,), crowds=(crowd,)),
        image_size=SIZE,
        id="1",
    )
    metric = BoxAP(NAMES)
    update(metric, [image])
    found = values_of(metric)
    assert [found[name] for name in ("ap", "ap_small", "ap_medium")] == pytest.approx(
        [1, 1, 1]
    )  # 32 x 32 pixels are both
    assert math.isnan(found["ap_large"])
    metric.reset()
    update(metric, [replace(image, target=DetectionTarget(objects=(cat,)))])
    assert metric.compute()["ap"].item() == pytest.approx(1 / 3)
    metric.reset()
    update(metric, [replace(image, target=DetectionTarget(objects=(), crowds=(crowd,)))])
    assert metric.compute()["ap"].isnan()


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu"),
        lambda module: [metric.set_dtype(torch.float16) for metric in module],
    ],
)
def test_no_cast_reduces_the_state(cast):
    means, ap = MeanScore(ToyTask()), BoxAP(NAMES)
    module = torch.nn.ModuleList([means, ap])
    images = our_images(*make_coco(0, 20, 2))
    for half in (images[:10], images[10:]):
        cast(module)
        add(means, (0.1, 0, 0))
        update(ap, half)
    cast(module)
    assert means.compute()["reward"].item() == 0.1
    assert values_of(ap) == exactly(pycocotools_stats(*make_coco(0, 20, 2)))
    assert all(part.dtype == torch.float64 for part in [means.sums, means.count, *ap.records])
    means.reset()
    assert means.sums.dtype == torch.float64


class Logs(LightningModule):
    """Logs a metric of the rewards as the modules do; a batch holds indices of them."""

    def __init__(self, rewards) -> None:
        super().__init__()
        self.rewards = rewards
        self.means = MeanScore(ToyTask())
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def validation_step(self, batch, batch_idx) -> None:
        add(self.means, *((float(self.rewards[index]), 0, 0) for index in batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.means.compute(), sync_dist=True, batch_size=1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_what_is_logged_is_exact(tmp_path, precision):
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    rewards = np.random.default_rng(0).uniform(size=100)
    found = trainer.validate(Logs(rewards), DataLoader(range(100), batch_size=7), verbose=False)
    assert found[0]["reward"] == pytest.approx(rewards.mean(), abs=1e-12, rel=0)


def test_the_metrics_of_a_task_are_one_flat_dict():
    task = Detection(categories=NAMES)
    cat = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))
    target = DetectionTarget(objects=(cat,))
    prediction = DetectionPrediction(objects=(cat,), num_listed=1, is_exact=True)
    metrics = make_metrics(task)
    for guess in (prediction, None):
        metrics.update(preds=[guess], target=[target], image_sizes=[SIZE], ids=["1"])
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values["reward"] == pytest.approx(1.5)
    assert values["reward/iou"] == pytest.approx(0.5)
    assert values["ap50"] == pytest.approx(values["ap"]) == pytest.approx(51 / 101)  # recall levels 0, .01, ... .5
    metrics.reset()
    assert metrics["ap"].records == []


SHARES = [[[*range(11, 2, -1)], [0, 1, 2]], [[*range(12)], []]]
"""Images of two devices: uneven numbers in any order, and one device without any."""


def _merged(rank: int, port: int, queue) -> None:
    """What one device computes after the states of both are merged."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images = our_images(*make_coco(0, 12, 0))
    for shares in SHARES:
        means, ap = MeanScore(ToyTask()), BoxAP(NAMES)
        for index in shares[rank]:
            add(means, (index / 7, 0, 0))
            update(ap, [images[index]])
        values = {"reward": means.compute()["reward"], **ap.compute()}
        values |= {"margin": means.margins_of_error()["reward"], "ap50 margin": ap.margins_of_error()["ap50"]}
        queue.put({name: value.item() for name, value in values.items()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_devices_together_find_what_pycocotools_finds(free_port):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_merged, args=(rank, free_port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    means, ap = MeanScore(ToyTask()), BoxAP(NAMES)
    add(means, *((index / 7, 0, 0) for index in range(12)))
    update(ap, our_images(*make_coco(0, 12, 0)))
    wanted = {"reward": 5.5 / 7} | pycocotools_stats(*make_coco(0, 12, 0))
    wanted |= {
        "margin": means.margins_of_error()["reward"].item(),
        "ap50 margin": ap.margins_of_error()["ap50"].item(),
    }
    for _ in range(len(processes) * len(SHARES)):
        assert queue.get() == exactly(wanted)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
