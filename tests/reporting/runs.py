"""Folders of runs and evaluations, made by hand: everything in them is known."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from perception_r1.callbacks.files import image_name

COUNTING = {
    "class_path": "perception_r1.tasks.counting.Counting",
    "init_args": {"prompt_template": "Count the {query}"},
}
OCR = {"class_path": "perception_r1.tasks.ocr.Ocr", "init_args": {"prompt_template": "OCR this image."}}
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "perception_r1.modules.GRPO", "init_args": {"group_size": 4, "policy": {"name": "tiny"}}},
    "data": {"class_path": "CountingData", "init_args": {"eval_split": "test", "task": COUNTING}},
}
CARD = {
    "status": "finished",
    "start": "2026-01-02T03:04:05+00:00",
    "seconds": 100.0,
    "command": ["/bin/perception-r1", "fit", "--task", "counting", "--run_name", "a b"],
    "versions": {"python": "3.12.1", "torch": "2.13.0", "peft": None},
    "git": {"commit": "0123abcd", "is_dirty": True},
    "hardware": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "gpus": [{"name": "A GPU", "memory_gib": 80.0}]},
    "trainer": {"strategy": "SingleDeviceStrategy", "devices": 1},
    "seeds": {"everything": 0, "module": 3, "torch": None},
    "data": {"fingerprint": "f00d", "splits": {"train": {"num_samples": 8192}, "test": {"num_samples": 4}}},
    "policy": {"name": "tiny", "num_parameters": 1000, "num_trainable": 400},
    "resumed_from": None,
    "steps": 12,
    "phase_seconds": {"decode": 50.0, "backward": 20.0, "validation": 5.0},
    "primary_metrics": ["count_accuracy"],
}
BEFORE, AFTER = (0.5, 0.25, 1.0, 0.0), (1.0, 0.0, 1.0, 0.5)
"""Rewards of four samples."""


def row(index: int, reward: float, *, source: str = "", completion: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of predictions: one box at the left, one target at the right."""
    return {
        "id": f"test-{index}",
        "source": source,
        "width": 80,
        "height": 40,
        "query": "cups",
        "completion": f"answer worth {reward}" if completion is None else completion,
        "reward": reward,
        "components": {"format": 1.0},
        "metrics": {"count_accuracy": float(reward == 1)},
        "is_truncated": False,
        "target_in_words": f"{index} cups",
        "prediction_in_words": "1 cup",
        "target_overlays": [{"shape": [0.5, 0.25, 1.0, 0.75], "caption": "cup"}],
        "predicted_overlays": [{"shape": [0.0, 0.25, 0.5, 0.75], "caption": "cup"}],
        **more,
    }


def mean_scores(rewards: Sequence[float]) -> dict[str, float]:
    """What an evaluation makes of rewards."""
    accuracy = sum(reward == 1 for reward in rewards) / len(rewards)
    return {"reward": sum(rewards) / len(rewards), "reward/format": 1.0, "count_accuracy": accuracy}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def write_images(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, each in enumerate(rows):
        Image.new("RGB", (80, 40), (40 * index % 256, 90, 160)).save(folder / image_name(each["source"], each["id"]))


def write_scalars(folder: Path, scalars: Mapping[str, Mapping[int, float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)


def make_run(
    folder: Path,
    *,
    before: Sequence[float] = BEFORE,
    after: Sequence[float] | None = AFTER,
    config: Mapping[str, Any] = CONFIG,
    scalars: Mapping[str, Mapping[int, float]] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    **card: Any,
) -> Path:
    """A run whose answers before and after have these rewards; without those after it has not come to its end."""
    folder.mkdir(parents=True)
    whole = {**CARD, "task": COUNTING, "before": mean_scores(before), "after": mean_scores(after) if after else {}}
    whole |= {"margins_of_error": {when: {"reward": 0.125, "count_accuracy": None} for when in ("before", "after")}}
    (folder / "run.json").write_text(json.dumps(whole | card))
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    test = folder / "predictions" / "test"
    write_rows(test / "before.jsonl", [row(index, reward) for index, reward in enumerate(before)])
    if after:
        found = list(rows) or [row(index, reward) for index, reward in enumerate(after)]
        write_rows(test / "after.jsonl", found)
        write_images(test / "images", found)
    default = {
        "train/reward": {step: step / 10 for step in range(12)},
        "train/group_size": dict.fromkeys(range(12), 4.0),
        "train/seconds/decode": dict.fromkeys(range(12), 2.0),
        "train/seconds/step": dict.fromkeys(range(12), 3.0),
        "val/reward": {5: 0.5, 11: 0.75},
        "val/margin_of_error/reward": {5: 0.25, 11: 0.125},
        "val/seconds": {5: 1.0, 11: 2.0},
    }
    write_scalars(folder, default if scalars is None else scalars)
    return folder


def make_evaluation(folder: Path, rewards: Sequence[float] = AFTER) -> Path:
    """An evaluation of the same samples."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**CONFIG, "ckpt_path": "logs/a/version_0/checkpoints/best.ckpt"})
    )
    (folder / "metrics.json").write_text(json.dumps({"test": mean_scores(rewards)}))
    (folder / "margins_of_error.json").write_text(json.dumps({"test": {"reward": 0.25}}))
    rows = [row(index, reward) for index, reward in enumerate(rewards)]
    write_rows(folder / "predictions.jsonl", rows)
    write_images(folder / "images", rows)
    return folder
