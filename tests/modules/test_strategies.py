"""Trainings that two processes divide end as those of one process do, and go on in any of them."""

import json
from pathlib import Path

import pytest
import torch

from tests.modules import two_processes
from tests.modules.run_divided import KINDS, train

TOLERANCE = 1e-9
DIVIDED = [("full", "zero1"), ("lora", "zero1"), ("frozen", "zero1"), ("sft", "zero1")]
RESUMED = ["zero1"]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Folders KIND/STRATEGY of ten steps, half/STRATEGY of five, and rest/STRATEGY of five more after one process."""
    out = tmp_path_factory.mktemp("divided")
    for kind in KINDS:
        train(str(folder), str(out / kind / "auto"), kind)
    train(str(folder), str(out / "half" / "auto"), "full", max_steps=5)
    plan = [{"folder": f"{kind}/{strategy}", "kind": kind, "strategy": strategy} for kind, strategy in DIVIDED]
    for strategy in RESUMED:
        common = {"kind": "full", "strategy": strategy}
        plan.append({"folder": f"half/{strategy}", "max_steps": 5} | common)
        plan.append({"folder": f"rest/{strategy}", "ckpt_path": str(last(out / "half" / "auto"))} | common)
    lines = [json.dumps(each | {"folder": str(out / each["folder"])}) for each in plan]
    (out / "plan.jsonl").write_text("\n".join(lines))
    two_processes.run("tests.modules.run_divided", str(folder), str(out / "plan.jsonl"))
    return out


def last(folder: Path) -> Path:
    return folder / "version_0" / "checkpoints" / "last.ckpt"


def load(folder: Path) -> dict:
    return torch.load(last(folder), weights_only=True)


def reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_end(one: dict, other: dict) -> None:
    """Weights, and the optimiser's states in the order of their numbers."""
    assert one["global_step"] == other["global_step"] == 10
    assert one["state_dict"].keys() == other["state_dict"].keys() != set()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=0, atol=TOLERANCE, msg=name)
    first, second = one["optimizer_states"][0], other["optimizer_states"][0]
    assert first["param_groups"] == second["param_groups"]
    assert sorted(first["state"]) == sorted(second["state"])
    for index, values in first["state"].items():
        assert values.keys() == second["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            torch.testing.assert_close(second["state"][index][name], value, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(("kind", "strategy"), DIVIDED)
def test_two_processes_end_where_one_ends_with_the_same_batches(runs, kind, strategy):
    assert_same_end(load(runs / kind / "auto"), load(runs / kind / strategy))


@pytest.mark.parametrize(("kind", "strategy"), DIVIDED)
def test_both_processes_log_the_same(runs, kind, strategy):
    first, second = reports(runs / kind / strategy)
    assert first["log"] == second["log"]
    assert len(first["log"]) == 10


@pytest.mark.parametrize("strategy", ["zero1"])
def test_the_processes_had_different_numbers_of_passes_and_sometimes_nothing_to_learn(runs, strategy):
    counts = [report["counts"] for report in reports(runs / "full" / strategy)]
    pairs = list(zip(*counts, strict=True))
    assert len(pairs) == 10
    assert any(one[0] > other[0] > 0 for one, other in pairs)
    assert any(one[0] > other[0] == 0 for one, other in pairs)
    for (first, first_empty), (second, second_empty) in pairs:
        needed = min(1, max(first, second))
        assert (first_empty, second_empty) == (max(0, needed - first), max(0, needed - second))


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_run_of_one_process_goes_on_in_two(runs, strategy):
    assert_same_end(load(runs / "full" / "auto"), load(runs / "rest" / strategy))


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_run_of_two_processes_goes_on_in_one(runs, folder, strategy, tmp_path):
    train(str(folder), str(tmp_path), "full", ckpt_path=str(last(runs / "half" / strategy)))
    assert_same_end(load(runs / "full" / "auto"), load(tmp_path))
