"""The program for a card that is there for a short time: its stages are limited, kept, and gone on with."""

import json

import pytest
import torch

from perception_r1.modules.encoding import encode_prompts
from perception_r1.planning.policy import read_config
from perception_r1.policy.load import PolicyConfig
from tests.benchmarks.programs import program

gpu = program("gpu")
gpu_worker = program("gpu_worker")
random_model = program("random_model")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the program with stages that a function does; returns its results."""

    def call(run, *arguments):
        monkeypatch.setattr(gpu, "run", run)
        path = tmp_path / "gpu.json"
        monkeypatch.setattr("sys.argv", ["gpu.py", "--smoke", "--results", str(path), *arguments])
        assert gpu.main() == 0
        return json.loads(path.read_text())["stages"]

    return call


def test_a_second_start_does_what_is_missing(start):
    done = []

    def run(stage, seconds, trl_python):
        done.append(stage.name)
        return {"error": "no luck"} if stage.name.startswith("graphs") else {"found": len(done)}

    first = start(run)
    assert (
        list(first)
        == done
        == ["rates", "graphs, 12 tokens", "smoke, 100, 12, 2, shared", "smoke, 100, 12, 2, repeated"]
    )
    assert first["graphs, 12 tokens"] == {"error": "no luck"}
    done.clear()
    second = start(lambda stage, *_: done.append(stage.name) or {"found": 0})
    assert done == ["graphs, 12 tokens"]
    assert second == first | {"graphs, 12 tokens": {"found": 0}}


def test_no_stage_begins_when_time_is_over(start):
    assert set(map(str, start(lambda *_: {}, "--minutes", "0").values())) == {"{'error': 'no time was left'}"}


@pytest.mark.slow
def test_a_stage_that_fails_or_takes_too_long_says_so():
    stage = gpu.Stage(name="a", minutes=1, options={"what": "unknown"})
    assert "unknown" in gpu.run(stage, 60, None)["error"]
    assert gpu.run(stage, 0.01, None) == {"error": "not done after 0 seconds"}


def test_tables_show_steps_and_plans_and_what_failed():
    shared = {"seconds": {"step": 2.0}, "decode_step_s": 0.003, "read_weights_s": 0.001}
    shared |= {"peak_gb": {"decode": 40.0, "forward": 50.0}, "planned_gb": {"decode": 38.0, "save": 30.0}}
    found = {
        "7B, LoRA, 1300, 128, 4, shared": shared,
        "7B, LoRA, 1300, 128, 4, repeated": {"seconds": {"step": 9.0}},
        "2B, 400, 128, 1, shared": shared,
        "2B, 400, 128, 1, repeated": {"error": "out of memory"},
        "2B, 400, 128, 1, trl": {"seconds": {"step": 20.0}},
    }
    assert gpu.step_table(found).splitlines()[2:] == [
        "| 7B, LoRA | 1300 | 128 | 4 | 2.00 | 9.00 |  | 4.5 | 3.0 |",
        "| 2B | 400 | 128 | 1 | 2.00 | out of memory | 20.00 |  | 3.0 |",
    ]
    rows = gpu.memory_table(found).splitlines()[2:]
    assert rows == [
        f"| {name} | decode | 40.0 | 38.0 | -5 % |" for name in ("7B, LoRA, 1300, 128, 4", "2B, 400, 128, 1")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"])
def test_a_folder_like_a_published_model_has_its_width_and_prompts_of_the_wanted_length(tmp_path, monkeypatch, name):
    def shallow(name):
        config = read_config(name)
        config.text_config.num_hidden_layers = config.vision_config.depth = 1
        config.text_config.layer_types = ["full_attention"]
        if hasattr(config.vision_config, "fullatt_block_indexes"):
            config.vision_config.fullatt_block_indexes = [0]
        return config

    monkeypatch.setattr(random_model, "read_config", shallow)
    gpu_worker.make_model({"what": "step", "prompt": 100, "published": name}, tmp_path)
    policy = gpu_worker.RandomPolicy.load(PolicyConfig(name=str(tmp_path)))
    samples = gpu_worker.Prompts(tmp_path, 2).samples[:2]
    prompts = encode_prompts(policy, gpu_worker.EvenCharacters(), samples)
    assert prompts.lengths == [100, 100]
    published = read_config(name).text_config
    assert tuple(policy.model.lm_head.weight.shape) == (published.vocab_size, published.hidden_size)
    with torch.no_grad():
        logprobs = policy(prompts, [torch.tensor([1, 2, 3])] * 2)
    assert logprobs.isfinite().all()
