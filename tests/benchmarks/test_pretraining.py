"""The committed curve of the embedded model: that of the shipped weights, with the recipe that `make pretrain` has."""

import json
from importlib.resources import files

from perception_r1.embedded.pretraining.training import Settings
from tests.benchmarks.programs import RESULTS, program

curve = program("pretraining")


def test_a_curve_is_summed_up_by_the_hundred_steps():
    steps = [{"step": step, "seconds": 2.0, "scene/name": float(step <= 100)} for step in range(1, 151)]
    steps[-1]["ocr"] = 0.5
    assert curve.summarise(steps) == [
        {"step": 100, "seconds": 200.0, "scene/name": 1.0},
        {"step": 150, "seconds": 100.0, "scene/name": 0.0, "ocr": 0.5},
    ]


def test_the_committed_curve_is_that_of_the_recipe_and_of_the_model_card():
    result = json.loads((RESULTS / "pretraining.json").read_text(encoding="utf-8"))
    assert Settings(**result["settings"]) == Settings()
    assert [row["step"] for row in result["rows"]] == list(range(100, Settings.num_steps + 1, 100))
    card = (files("perception_r1") / "embedded" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert f"{Settings.num_steps:,} steps" in card
    assert f"{result['cpu_hours']:.0f} CPU-hours" in card
