"""A run's folder, opened: what it says, and what is wrong with it in one sentence."""

import json
import shutil

import pytest
import torch
import yaml

from perception_r1.commands.runs import checkpoint_path, is_run, load_checkpoint, open_run
from perception_r1.errors import UserError
from perception_r1.policy.checkpoint_file import save_file
from perception_r1.policy.load import LoraConfig
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding


@pytest.fixture
def copy(runs, tmp_path):
    """A run to be spoilt."""
    return shutil.copytree(runs["full"], tmp_path / "version_0")


def change_card(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_settings(folder, change):
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    change(settings["model"]["init_args"])
    path.write_text(yaml.safe_dump(settings))


def test_a_run_says_what_was_trained(runs, folder):
    run = open_run(runs["full"])
    assert (run.folder, run.training, run.task, run.max_new_tokens) == (runs["full"], "SFT", Grounding(), 6)
    assert (run.policy.name, run.policy.lora) == (str(folder), None)
    assert run.card["steps"] == 3
    adapted = open_run(runs["lora"]).policy.lora
    assert adapted == LoraConfig(r=2, lora_alpha=6)


def test_opening_a_run_writes_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(runs["full"].parent.rglob("*"))
    open_run(runs["full"])
    assert sorted(runs["full"].parent.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_the_task_is_the_one_with_the_categories_of_the_data(copy):
    options = {"categories": ["cup", "spoon"], "missing_weight": 0.0}
    change_card(copy, task={"class_path": "perception_r1.tasks.detection.Detection", "init_args": options})
    assert open_run(copy).task == Detection(categories=("cup", "spoon"), missing_weight=0.0)


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-2B-Instruct", "tiny"])
def test_a_run_of_a_model_of_the_hub_or_of_this_package_keeps_its_name(copy, name):
    change_settings(copy, lambda settings: settings["policy"].update(name=name))
    assert open_run(copy).policy.name == name


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "run.json").unlink(), "there is no run in"),
        (lambda run: (run / "run.json").write_text("{"), "does not tell what was trained"),
        (lambda run: (run / "run.json").write_text("[]"), "does not tell what was trained"),
        (lambda run: (run / "config.yaml").unlink(), "does not tell what was trained"),
        (lambda run: (run / "config.yaml").write_text("model: ["), "does not tell what was trained"),
        (lambda run: change_card(run, task=None), "--tasks: Not a valid subclass of Task"),
        (lambda run: change_card(run, task={"class_path": "nowhere.Task"}), "No module named 'nowhere'"),
        (lambda run: change_settings(run, lambda values: values.update(max_new_tokens="many")), "--max_new_tokens"),
        (lambda run: change_settings(run, lambda values: values["policy"].update(r=1)), "r"),
    ],
)
def test_a_folder_that_is_no_run_or_damaged_is_one_sentence(copy, spoil, words):
    spoil(copy)
    with pytest.raises(UserError, match=words) as error:
        open_run(copy)
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)


def test_checkpoints_have_names_or_are_files(runs, copy):
    run = open_run(copy)
    assert is_run(copy)
    assert not is_run(copy / "checkpoints")
    for name in ("best", "last"):
        assert checkpoint_path(run, name) == copy / "checkpoints" / f"{name}.ckpt"
    file = runs["full"] / "checkpoints" / "last.ckpt"
    assert checkpoint_path(run, str(file)) == file
    with pytest.raises(UserError, match=r"no checkpoint none\.ckpt: .* it has best and last"):
        checkpoint_path(run, "none.ckpt")
    (copy / "checkpoints" / "last.ckpt").rename(copy / "checkpoints" / "previous.ckpt")
    assert checkpoint_path(run, "last") == copy / "checkpoints" / "previous.ckpt"
    (copy / "checkpoints" / "previous.ckpt").rename(copy / "checkpoints" / "last.ckpt")
    (copy / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"has no best\.ckpt: .* it has last$"):
        checkpoint_path(run, "best")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match=r"it has none$"):
        checkpoint_path(run, "last")


@pytest.mark.parametrize(("kind", "step"), [("full", 3), ("lora", 3)])
def test_a_policy_gets_exactly_the_weights_of_its_checkpoint(runs, kind, step):
    run = open_run(runs[kind])
    policy, found = load_checkpoint(run.policy, checkpoint_path(run, "last"))
    state = torch.load(checkpoint_path(run, "last"), weights_only=True)["state_dict"]
    entries = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    assert found == step
    assert not policy.training
    assert all(torch.equal(entries[name], value) for name, value in state.items())
    assert len(state) == (len(entries) if kind == "full" else 2 * 7 * 3)
    assert load_checkpoint(run.policy, checkpoint_path(run, "best"))[1] == 2


def spoilt_checkpoint(run, path, change):
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    change(checkpoint)
    save_file(checkpoint, path)
    return path


NORM = "policy.network.model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: it["state_dict"].pop(NORM), f"misses 1 entries, first {NORM}"),
        (lambda it: it["state_dict"].update(more=torch.zeros(1)), "has unexpected 1 entries, first more"),
        (lambda it: it["state_dict"].update({NORM: torch.zeros(95)}), f"has other shapes of 1 entries, first {NORM}"),
        (lambda it: it.pop("run"), "was not written by a run of this program"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(runs, tmp_path, change, words):
    run = open_run(runs["full"])
    path = spoilt_checkpoint(run, tmp_path / "spoilt.ckpt", change)
    with pytest.raises(UserError, match=words):
        load_checkpoint(run.policy, path)


def test_weights_trained_in_half_precision_stay_so(runs, tmp_path):
    def halve(checkpoint):
        checkpoint["state_dict"] = {name: value.bfloat16() for name, value in checkpoint["state_dict"].items()}

    run = open_run(runs["full"])
    policy, _ = load_checkpoint(run.policy, spoilt_checkpoint(run, tmp_path / "half.ckpt", halve))
    assert {value.dtype for value in policy.parameters()} == {torch.bfloat16}


def test_a_checkpoint_of_another_training_does_not_fit(runs):
    with pytest.raises(UserError, match="another model, adapter or frozen part"):
        load_checkpoint(open_run(runs["full"]).policy, runs["lora"] / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"no checkpoint", "no checkpoint at all"), (b"PK\x03\x04 cut off", "is damaged")],
)
def test_a_file_that_is_no_checkpoint_is_one_sentence(runs, tmp_path, content, words):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.ckpt .*{words}") as error:
        load_checkpoint(open_run(runs["full"]).policy, path)
    assert "\n" not in str(error.value)
