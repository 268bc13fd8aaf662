"""The families outside Qwen-VL through the command line: trained, exported, asked, planned."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perception_r1.cli import main
from perception_r1.engines import VLLMEngine
from perception_r1.engines.base import EngineContext
from perception_r1.errors import UserError
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy.oracle import is_vision, noise
from tests.tiny_models import BUILDERS

SMALL = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--log_samples.num_samples=0"),
    *("--before_after.enabled=false", "--data.batch_size=2", "--data.num_val=2", "--data.num_test=2"),
    *("--model.max_new_tokens=16", "--model.group_size=3", "--model.optimizer.lr=0.01"),
]
KINDS = {
    "in parts": ["--model.micro_batch_tokens=150", "--model.policy.gradient_checkpointing=true"],
    "frozen": ["--model.policy.freeze_vision=true", "--model.top_p=0.9"],
    "adapter": ["--model.policy.lora.r=2"],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_trained_exported_and_asked(model_folders, family, kind, place, console, capsys):
    arguments = ["fit", "--task=ocr", f"--model.policy.name={model_folders[family]}", *SMALL, *KINDS[kind]]
    assert main([*arguments, "--run_name=run"]) == 0
    told = f"{family}: prompts cannot be shared, so training computes them once for each completion"
    assert console.file.getvalue().count(told) == (not FAMILIES[family].shares_prompts)
    assert main(["export", "logs/run/version_0", "--to", "exported", "--ckpt", "last"]) == 0
    written, before = load_file("exported/model.safetensors"), load_file(model_folders[family] / "model.safetensors")
    assert written.keys() == before.keys()
    changed = {name for name in written if not torch.equal(written[name], before[name])}
    is_tower_trained = any(is_vision(name) for name in changed)
    assert changed
    assert is_tower_trained == (kind == "in parts")
    noise(90, 60).save("picture.png")
    capsys.readouterr()
    assert main(["predict", "exported", "picture.png", "--task=ocr", "--max_new_tokens=5"]) == 0
    assert json.loads(capsys.readouterr().out)["image"].endswith("picture.png")


@pytest.mark.parametrize("family", BUILDERS)
def test_supervised_fine_tuning_learns(model_folders, family, place, console):
    arguments = ["fit", "--task=counting", "--variant=sft", f"--model.policy.name={model_folders[family]}", *SMALL]
    arguments.remove("--model.group_size=3")
    assert main([*arguments, "--run_name=run"]) == 0
    assert "cannot be shared" not in console.file.getvalue()


@pytest.mark.parametrize("family", BUILDERS)
def test_a_run_is_planned(model_folders, family, place, capsys):
    assert main(["plan", "--task=grounding", f"--model.policy.name={model_folders[family]}", "--data=coco"]) == 0
    assert "80 GB: fits" in capsys.readouterr().out


def test_an_engine_that_was_not_seen_to_work_with_a_family_is_refused(model_folders, monkeypatch):
    monkeypatch.setattr("perception_r1.engines.vllm.find_spec", lambda name: True)
    config = PolicyConfig(name=str(model_folders["gemma3"]))
    with pytest.raises(UserError, match=r"gemma3.*leave out the engine"):
        VLLMEngine().connect(
            Policy.without_weights(config), EngineContext(config=config, dtype="float32", run_id="run")
        )
