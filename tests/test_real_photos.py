"""Real input: photographs of different sizes, in a JSON-lines file, through the command line, for every task."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from perception_r1.cli import main
from perception_r1.tasks import TASKS

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[1] / "configs"
PHOTOS = {"astronaut": "png", "chelsea": "jpg", "coffee": "jpg", "rocket": "png", "page": "png"}
"""Photographs that ship with scikit-image, and the form in which the data set has them."""

ROWS = {
    "grounding": [
        {"image": "astronaut.png", "question": "helmet", "box": [275, 345, 510, 512]},
        {"image": "astronaut.png", "question": "model of a space shuttle", "box": [350, 0, 460, 285]},
        {"image": "chelsea.jpg", "question": "face of the cat", "box": [30, 10, 390, 290]},
        {"image": "coffee.jpg", "question": "spoon", "box": [325, 65, 425, 325]},
        {"image": "rocket.png", "question": "rocket", "box": [308, 126, 338, 405]},
    ],
    "counting": [
        {"image": "chelsea.jpg", "label": "eye of the cat", "points": [[170, 108], [318, 135]]},
        {"image": "rocket.png", "label": "tower", "points": [[68, 200], [195, 250], [450, 250], [600, 200]]},
        {"image": "coffee.jpg", "label": "cup", "boxes": [[173, 18, 410, 310]], "count": 1},
        {"image": "astronaut.png", "label": "person", "points": [[220, 120]]},
    ],
    "detection": [
        {"image": "astronaut.png", "objects": [{"box": [25, 15, 400, 512], "label": "person"}]},
        {"image": "chelsea.jpg", "objects": [{"box": [0, 0, 451, 300], "label": "cat"}]},
        {
            "image": "coffee.jpg",
            "objects": [
                {"box": [173, 18, 410, 310], "label": "cup"},
                {"box": [325, 65, 425, 325], "label": "spoon"},
            ],
        },
        {"image": "rocket.png", "objects": []},
    ],
    "ocr": [
        {"image": "page.png", "text": "Region-based segmentation\nLet us first determine markers of the coins"},
        {"image": "astronaut.png", "text": "COLLINS ASHBY"},
        {"image": "rocket.png", "text": ""},
        {"image": "chelsea.jpg", "text": ""},
    ],
}
SET_UPS = {
    "qwen2_vl": ("qwen2_vl", []),
    "qwen2_5_vl": ("qwen2_5_vl", []),
    "lora": ("qwen2_vl", ["-c", str(CONFIGS / "variant" / "lora.yaml")]),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs with a data file for every task."""
    folder = tmp_path_factory.mktemp("photos")
    for name, suffix in PHOTOS.items():
        source = next(path for path in (files("skimage") / "data").iterdir() if path.name.startswith(f"{name}."))
        with source.open("rb") as file:
            Image.open(file).convert("RGB").save(folder / f"{name}.{suffix}")
    for task, rows in ROWS.items():
        lines = [json.dumps(row | {"id": f"photo-{index}"}) for index, row in enumerate(rows)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(command: str, task: str, data: Path, model: Path, *options: str) -> int:
    """The command line as the Makefile composes it, with photographs for all splits, small enough to be quick."""
    configs = [CONFIGS / "default.yaml", CONFIGS / "task" / f"{task}.yaml", CONFIGS / "model" / "tiny.yaml"]
    arguments = [argument for config in configs for argument in ("-c", str(config))]
    arguments += ["--seed_everything", "0", "--model.policy.name", str(model), "--model.policy.max_pixels", "10000"]
    arguments += [f"--data.{split}_file={data / task}.jsonl" for split in ("train", "val", "test")]
    arguments += ["--data.batch_size", "2", "--data.eval_batch_size", "3", "--model.max_new_tokens", "8"]
    arguments += ["--log_samples.num_samples", "2", "--log_samples.panel_width", "112"]
    return main([command, *arguments, *options])


def test_there_are_rows_for_every_task():
    assert set(ROWS) == set(TASKS)


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("set_up", SET_UPS)
def test_real_photographs_train_validate_and_predict(
    photos, model_folders, tmp_path, monkeypatch, capsys, task, set_up
):
    family, options = SET_UPS[set_up]
    monkeypatch.chdir(tmp_path)
    model = model_folders[family]
    training = ["--model.group_size", "3", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    assert run("fit", task, photos, model, *options, *training) == 0
    folder = tmp_path / "logs" / task / "version_0"
    card = json.loads((folder / "run.json").read_text())
    assert (card["status"], card["steps"], card["num_skipped_steps"]) == ("finished", 2, 0)
    assert card["before"].keys() == card["after"].keys() >= {"reward", TASKS[task].primary_metric}
    assert (folder / "checkpoints" / "best.ckpt").exists()
    if task == "detection":
        assert card["task"]["init_args"]["categories"] == ["cat", "cup", "person", "spoon"]

    assert run("validate", task, photos, model, *options, "--ckpt_path", "best") == 0
    query = [] if task in ("detection", "ocr") else ["--query", "cup"]
    pictures = [str(photos / row["image"]) for row in ROWS[task]]
    capsys.readouterr()
    assert main(["predict", str(folder), *pictures, *query, "--ckpt", "last", "--out", "out"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == pictures
    assert {line["query"] for line in lines} == {"cup" if query else ""}
    assert len(list((tmp_path / "out").glob("*.png"))) == len(pictures)

    answers = zip(ROWS[task], pictures, [line["completion"] for line in lines], strict=True)
    scored = [row | {"image": picture, "completion": completion} for row, picture, completion in answers]
    Path("scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    score = ["score", "--task", task, "--codec", family, "--min_pixels", "784", "--max_pixels", "10000", "scored.jsonl"]
    assert main(score) == 0
    for line, scored in zip(lines, capsys.readouterr().out.splitlines(), strict=True):
        scores = json.loads(scored)
        assert set(scores["components"]) == set(TASKS[task].component_names)
        assert set(scores["metrics"]) == set(TASKS[task].metric_names)
        assert isinstance(scores["reward"], float)
        assert scores["prediction"] == line["prediction"]
