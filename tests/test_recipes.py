"""Every recipe composes to the paper's settings, and trains on data of the form that it names."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from perception_r1.cli import main
from tests.public_data import from_the_hub, make_coco, make_pageocr, make_refcoco
from tests.readme import ROOT

RECIPES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "grounding": ("qwen2_vl_2b", "refcoco", make_refcoco),
    "counting": ("qwen2_vl_2b", "pixmo_count", lambda root: None),
    "ocr": ("qwen2_vl_2b", "pageocr", make_pageocr),
    "detection": ("qwen2_5_vl_3b", "coco", make_coco),
}
"""Task, which names the recipe -> model, data, and what makes data of that form."""
PUBLISHED = {
    "grounding": {"take": "random:5000", "length": 768, "model": "Qwen/Qwen2-VL-2B-Instruct"},
    "counting": {"take": "random:10000", "length": 768, "model": "Qwen/Qwen2-VL-2B-Instruct"},
    "ocr": {"take": "random:5000", "length": 2048, "model": "Qwen/Qwen2-VL-2B-Instruct"},
    "detection": {"take": "all", "length": 2048, "model": "Qwen/Qwen2.5-VL-3B-Instruct"},
}
SMALL = shlex.split(
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.precision 32-true --trainer.max_steps 2"
    " --trainer.limit_val_batches 1 --data.num_workers 0 --data.global_batch_size 1 --data.eval_batch_size 2"
    " --data.train_take all --model.max_new_tokens 4 --before_after.enabled false --log_samples.num_samples 0"
)


def parts(task: str, *variants: str) -> list[str]:
    """The options that `make train TASK=... MODEL=... DATA=... RECIPE=... VARIANT=...` gives."""
    model, data, _ = RECIPES[task]
    return ["--task", task, "--model", model, "--data", data, "--recipe", task, *(f"--variant={v}" for v in variants)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to train in, with a data folder in which the hub has its counterpart."""
    monkeypatch.setenv("PERCEPTION_R1_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub(tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["perception-r1"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(place: Path, folder: Path, task: str, *more: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Two steps of a recipe with a tiny model; its run.json."""
    RECIPES[task][2](place / "data")
    metrics = ["--data.task.word_metrics", "stems"] if task == "ocr" else []  # WordNet is no package
    arguments = ["fit", *parts(task, *more), *SMALL, "--model.policy.name", str(folder), *metrics, *options]
    assert main(arguments) == 0
    (card,) = (place / "logs").glob("*/version_0/run.json")
    return json.loads(card.read_text())


def test_every_recipe_is_known_to_these_tests():
    assert {path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_prints_the_settings_of_the_paper(task, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perception-r1"])
    assert main(["fit", *parts(task), "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    model, data, expected = config["model"]["init_args"], config["data"]["init_args"], PUBLISHED[task]
    assert config["model"]["class_path"].endswith("GRPO")
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    assert (model["group_size"], model["kl_coef"], model["temperature"]) == (8, 0.04, 1.0)
    assert (model["num_iterations"], model["loss_type"], model["scale_rewards"]) == (1, "grpo", "group")
    assert model["max_new_tokens"] == expected["length"]
    assert model["policy"]["name"] == expected["model"]
    assert model["policy"]["max_pixels"] == 1_000_000
    assert model["policy"]["lora"] is None
    assert not model["policy"]["freeze_vision"]
    assert (data["global_batch_size"], data["train_take"]) == (14, expected["take"])
    trainer = config["trainer"]
    assert (trainer["precision"], trainer["max_epochs"], trainer["max_steps"]) == ("bf16-mixed", 1, -1)
    assert (model["final_group_size"] or 8) > 8 if task == "detection" else model["final_group_size"] is None


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_trains_on_data_of_its_form(task, place, model_folders):
    family = "qwen2_5_vl" if task == "detection" else "qwen2_vl"
    card = train(place, model_folders[family], task)
    assert (card["status"], card["steps"]) == ("finished", 2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "frozen_vision", "think", "modern"])
def test_variants_go_on_top_of_a_recipe(variant, place, model_folders):
    card = train(place, model_folders["qwen2_vl"], "grounding", variant)
    assert (card["status"], card["steps"]) == ("finished", 2)
    share = card["policy"]["num_trainable"] / card["policy"]["num_parameters"]
    assert share == 1 if variant in ("think", "modern") else 0 < share < 1


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_can_be_fine_tuned_with_supervision(task, place, model_folders):
    if task == "counting":  # a point has no box in the data; squares stand for them
        options: tuple[str, ...] = ("--data.val", "null", "--data.held_out_share", "0.3")
    else:
        options = ()
    family = "qwen2_5_vl" if task == "detection" else "qwen2_vl"
    card = train(place, model_folders[family], task, "sft", options=options)
    assert (card["status"], card["steps"]) == ("finished", 2)


def test_supervision_then_reinforcement(place, model_folders):
    train(place, model_folders["qwen2_vl"], "grounding", "sft")
    run = place / "logs" / "grounding-sft" / "version_0"
    assert main(["export", str(run), "--ckpt", "last", "--to", "supervised"]) == 0
    arguments = ["fit", *parts("grounding"), *SMALL, "--model.policy.name", "supervised"]
    assert main(arguments) == 0
    assert (place / "logs" / "grounding" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_the_curriculum_of_detection_starts_from_an_evaluation_of_the_training_rows(place, model_folders):
    make_coco(place / "data")
    policy = ["--model.policy.name", str(model_folders["qwen2_5_vl"])]
    options = [*parts("detection"), *SMALL, *policy]
    assert main(["test", *options, "--data.eval_split", "train"]) == 0
    (predictions,) = (place / "logs" / "detection").glob("eval-*/predictions.jsonl")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 6
    assert main(["fit", *options, "--data.curriculum", str(predictions)]) == 0
