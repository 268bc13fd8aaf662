"""Trainings that two processes share end as those of one process do, and go on in any of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perception_r1.callbacks.checkpoints import replace
from perception_r1.errors import UserError
from perception_r1.policy.checkpoint import restore
from perception_r1.policy.checkpoint_file import DamagedCheckpointError
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.sharded_checkpoint import META, load_shards
from tests.modules import two_processes
from tests.modules.run_sharded import KINDS, NUM_STEPS, train

pytestmark = pytest.mark.slow

TOLERANCE = 1e-9
SHARDED = [("full", "zero1"), ("lora", "zero1"), ("frozen", "zero1"), *((kind, "fsdp2") for kind in KINDS)]
RESUMED = ["zero1", "fsdp2", "shards"]
LOST = ["zero1", "fsdp2"]
NUM_ROLLOUTS = 2
"""Before an engine is lost; the next validation would come a step later."""


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Folders KIND/STRATEGY of all steps, half/STRATEGY of half, and rest/STRATEGY of the rest after one process."""
    out = tmp_path_factory.mktemp("sharded")
    for kind in KINDS:
        train(str(folder), str(out / kind / "auto"), kind)
    train(str(folder), str(out / "half" / "auto"), "full", max_steps=NUM_STEPS // 2)
    plan = [{"folder": f"{kind}/{strategy}", "kind": kind, "strategy": strategy} for kind, strategy in SHARDED]
    for strategy in RESUMED:
        common = {"kind": "full", "strategy": strategy}
        plan.append({"folder": f"half/{strategy}", "max_steps": NUM_STEPS // 2} | common)
        plan.append({"folder": f"rest/{strategy}", "ckpt_path": str(last(out / "half" / "auto"))} | common)
    for strategy in LOST:
        common = {"kind": "lora", "strategy": strategy}
        plan.append({"folder": f"lost/{strategy}", "num_rollouts": NUM_ROLLOUTS} | common)
        plan.append({"folder": f"found/{strategy}", "ckpt_path": str(last(out / "lost" / strategy))} | common)
    lines = [json.dumps(each | {"folder": str(out / each["folder"])}) for each in plan]
    (out / "plan.jsonl").write_text("\n".join(lines))
    two_processes.run("tests.modules.run_sharded", str(folder), str(out / "plan.jsonl"))
    return out


def last(folder: Path) -> Path:
    return folder / "version_0" / "checkpoints" / "last.ckpt"


def load(folder: Path) -> dict:
    path = last(folder)
    return load_shards(path) if path.is_dir() else torch.load(path, weights_only=True)


def reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_end(one: dict, other: dict) -> None:
    """Weights, and the optimiser's states in the order of their numbers."""
    assert one["global_step"] == other["global_step"] == NUM_STEPS
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


@pytest.mark.parametrize(("kind", "strategy"), SHARDED)
def test_two_processes_end_where_one_ends_with_the_same_batches(runs, kind, strategy):
    assert_same_end(load(runs / kind / "auto"), load(runs / kind / strategy))


@pytest.mark.parametrize(("kind", "strategy"), SHARDED)
def test_both_processes_log_the_same(runs, kind, strategy):
    first, second = reports(runs / kind / strategy)
    assert first["log"] == second["log"]
    assert len(first["log"]) == NUM_STEPS


@pytest.mark.parametrize("strategy", ["zero1", "fsdp2"])
def test_the_processes_had_different_numbers_of_passes_and_sometimes_nothing_to_learn(runs, strategy):
    counts = [report["counts"] for report in reports(runs / "full" / strategy)]
    pairs = list(zip(*counts, strict=True))
    assert len(pairs) == NUM_STEPS
    assert any(one[0] > other[0] > 0 for one, other in pairs)
    assert any(one[0] > other[0] == 0 for one, other in pairs)
    for (first, first_empty), (second, second_empty) in pairs:
        if strategy == "fsdp2":
            assert first + first_empty == second + second_empty == max(first, second)
        else:
            needed = min(1, max(first, second))
            assert (first_empty, second_empty) == (max(0, needed - first), max(0, needed - second))


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_has_half_of_all_weights_frozen_ones_too(runs, kind):
    for report in reports(runs / kind / "fsdp2"):
        assert len(report["shares"]) > 60
        own, total = (sum(numbers) for numbers in zip(*report["shares"], strict=True))
        assert own / total == pytest.approx(0.5, abs=0.02)


def test_an_update_that_is_not_finite_on_one_process_is_skipped_by_both(runs):
    for report in reports(runs / "frozen" / "fsdp2"):
        assert [report["log"][str(step)]["train/skipped_steps"] for step in (2, 3, NUM_STEPS)] == [0, 1, 1]
    assert load(runs / "frozen" / "fsdp2")["run"]["num_skipped_steps"] == 1


@pytest.mark.parametrize("strategy", LOST)
def test_an_engine_that_one_process_loses_leaves_a_checkpoint_of_both(runs, strategy):
    folder = runs / "lost" / strategy
    errors = [(folder / f"error{rank}.txt").read_text() for rank in (0, 1)]
    assert errors == ["The engine of another device has failed.", "It is lost."]
    checkpoint = load(folder)
    assert checkpoint["global_step"] == NUM_ROLLOUTS
    assert_same_end(load(runs / "lora" / "auto"), load(runs / "found" / strategy))
    written = load_file(folder / f"adapter-{NUM_ROLLOUTS + 1}" / "adapter_model.safetensors")  # LogSamples had one
    trained = {
        name.removeprefix("policy.network.").replace(".default", ""): value.cpu()
        for name, value in checkpoint["state_dict"].items()
    }
    torch.testing.assert_close(written, trained, rtol=0, atol=0)
    assert json.loads((folder / "adapter-0" / "adapter_config.json").read_text())["r"] == 2


def test_a_checkpoint_of_shards_is_restored_without_a_trainer(runs, folder):
    policy, expected = Policy.load(PolicyConfig(name=str(folder))), load(runs / "full" / "fsdp2")["state_dict"]
    assert restore(policy, last(runs / "half" / "shards")) == NUM_STEPS // 2
    half = load(runs / "half" / "fsdp2")["state_dict"]
    for name, value in policy.state_dict(prefix="policy.").items():
        torch.testing.assert_close(value, half[name].float(), rtol=0, atol=1e-6)
        assert value.shape == expected[name].shape
    assert any(not torch.equal(half[name], expected[name]) for name in half)


def test_a_folder_without_its_shards_is_an_error(runs, folder, tmp_path):
    copy = shutil.copytree(last(runs / "half" / "shards").resolve(), tmp_path / "copy")
    for shard in copy.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(UserError, match=r"copy is damaged: its file __0_0\.distcp is gone"):
        restore(Policy.load(PolicyConfig(name=str(folder))), copy)


@pytest.mark.parametrize("name", [META, ".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_each_share_proves_itself(runs, folder, tmp_path, name):
    copy = shutil.copytree(last(runs / "half" / "shards").resolve(), tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 3] ^= 16
    (copy / name).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=name):
        restore(Policy.load(PolicyConfig(name=str(folder))), copy)


def test_a_folder_takes_the_place_of_a_folder_or_a_file_and_the_other_way_round(tmp_path):
    path, new = tmp_path / "last.ckpt", tmp_path / "last.part"
    for number, kind in enumerate(["folder", "folder", "file", "folder", "folder", "file"]):
        if kind == "folder":
            new.mkdir()
        (new / META if kind == "folder" else new).write_text(str(number))
        replace(path, new)
        assert (path / META if kind == "folder" else path).read_text() == str(number)
        assert len(list(tmp_path.iterdir())) == (2 if kind == "folder" else 1)


def test_the_one_before_keeps_its_name_until_it_is_removed(tmp_path):
    path, new, kept = (tmp_path / name for name in ("last.ckpt", "last.part", "previous.ckpt"))
    for number, kind in enumerate(["file", "folder", "folder", "folder", "file", "file", "folder"]):
        if kind == "folder":
            new.mkdir()
        (new / META if kind == "folder" else new).write_text(str(number))
        replace(path, new, kept=kept)
        texts = [(name / META if name.is_dir() else name).read_text() for name in (kept, path) if name.exists()]
        assert texts == [str(each) for each in range(max(number - 1, 0), number + 1)]
        assert len(list(tmp_path.iterdir())) == len(texts) + sum(name.is_symlink() for name in (kept, path))


def test_a_folder_with_two_names_is_kept_for_the_other(tmp_path):
    """A run that is killed between two renames leaves such."""
    home, path, kept = (tmp_path / name for name in ("last.0", "last.ckpt", "previous.ckpt"))
    home.mkdir()
    for link in (path, kept):
        link.symlink_to("last.0")
    (new := tmp_path / "last.part").mkdir()
    (new / META).touch()
    replace(path, new, kept=kept)
    assert (path.readlink(), kept.readlink()) == (Path("last.1"), Path("last.0"))
    assert home.exists()


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_run_of_one_process_goes_on_in_two(runs, strategy):
    assert_same_end(load(runs / "full" / "auto"), load(runs / "rest" / strategy))


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_run_of_two_processes_goes_on_in_one(runs, folder, strategy, tmp_path):
    train(str(folder), str(tmp_path), "full", ckpt_path=str(last(runs / "half" / strategy)))
    assert_same_end(load(runs / "full" / "auto"), load(tmp_path))
