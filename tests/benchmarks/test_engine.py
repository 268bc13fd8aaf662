import json
import sys
from math import prod

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

engine = program("engine")
two_commits = program("two_commits")
random_model = sys.modules["random_model"]


def committed(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cells():
    names = engine.Cell.__dataclass_fields__
    return [
        engine.Cell(**{name: value for name, value in cell.items() if name in names})
        for cell in committed("engine_cpu.json")["cells"]
    ]


@pytest.mark.parametrize(("prompt", "completion", "least"), [(333, 64, 3.5), (1101, 64, 7.0), (333, 256, 2.0)])
def test_committed_results_hold_the_claims_beside_trl(cells, prompt, completion, least):
    (cell,) = (cell for cell in cells if (cell.prompt, cell.completion, cell.group_size) == (prompt, completion, 8))
    assert cell.steps["trl"] >= 3
    assert cell.ratio("trl") >= least
    if prompt == 1101:
        assert cell.peak_mb["shared"] <= 0.4 * cell.peak_mb["trl"]


@pytest.mark.parametrize(("prompt", "completion"), [(333, 64), (1101, 64), (333, 256)])
def test_committed_costs_grow_with_the_completions_and_not_with_repeated_prompts(cells, prompt, completion):
    found = {cell.group_size: cell for cell in cells if (cell.prompt, cell.completion) == (prompt, completion)}
    assert set(found) == {4, 8, 16, 32}
    growth = found[32].cpu_s["shared"] / found[4].cpu_s["shared"]
    assert growth < 1.3 * (prompt + 32 * completion) / (prompt + 4 * completion)
    assert growth < 0.8 * found[32].cpu_s["trl"] / found[4].cpu_s["trl"]


def test_the_documentation_shows_the_committed_tables(cells):
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    assert engine.table(cells) in page


def test_the_documentation_has_the_committed_costs_of_a_middle_size():
    (cell,) = committed("engine_653.json")["cells"]
    assert (cell["prompt"], cell["completion"], cell["group_size"]) == (653, 96, 12)
    shared, repeated, trl = (cell["cpu_s"][name] for name in ("shared", "repeated", "trl"))
    page = " ".join((ROOT / "docs" / "engine.md").read_text(encoding="utf-8").split())
    costs = f"takes {shared:.2f} CPU-s, of repeated prompts {repeated:.2f}, and TRL's {trl:.2f}, "
    assert f"{costs}{trl / shared:.1f} times as long" in page


def test_the_documentation_has_the_committed_ratios_of_two_commits():
    ratios = [row["ratio"] for row in committed("engine_commits.json")["steps"]]
    page = " ".join((ROOT / "docs" / "engine.md").read_text(encoding="utf-8").split())
    assert len(ratios) == 12
    assert f"no size has become slower by more than {100 * (max(ratios) - 1):.1f} %" in page


def test_the_readme_names_the_range_of_speed_at_8_completions(cells):
    ratios = [cell.ratio("trl") for cell in cells if cell.group_size == 8]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times faster than in TRL" in " ".join(readme.split())


def test_training_of_the_embedded_policy_became_faster():
    results = committed("train_counting.json")
    assert results["step_faster_by"] > 1
    assert results["tokens_per_second_ratio"] > 1
    old, new = (metrics["train/seconds/step"] for metrics in results["medians"])
    assert results["step_faster_by"] == pytest.approx(old / new, abs=1e-3)


def test_the_operations_that_are_needed_are_about_those_that_are_made(tmp_path):
    """Counted while the engine works; its attention also computes what the causal triangle then hides."""
    shape = random_model.Shape(prompt_tokens=100, picture=(4, 4))
    random_model.make_folder(tmp_path / "model", shape)
    policy = Policy.load(PolicyConfig(name=str(tmp_path / "model")))
    reference = Policy.load(PolicyConfig(name=str(tmp_path / "model")), is_trained=False)
    policy.eos_token_ids = torch.tensor([10**6])
    text = json.loads((tmp_path / "model" / "prompts.jsonl").read_text().splitlines()[0])["text"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompts = policy.processor.encode([chat], [[Image.new("RGB", (112, 112))]], max_tokens=None)
    assert prompts.lengths == [100]
    packed = {torch.ops.mkldnn._linear_pointwise: lambda rows, weight, *args, **kwargs: 2 * prod(rows) * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        params = policy.sampling_params(max_new_tokens=20)
        states = policy.prompt_states(prompts)
        rollout = policy.generate(policy.prefill(prompts, states), group_size=4, params=params, seeds=[0])
        with torch.no_grad():
            reference(prompts, rollout.completions)
        policy(prompts, rollout.completions, states=states).sum().backward()
    needed = 1e9 * engine.needed_operations(tmp_path / "model", 100, 20, 4, 16)
    assert [len(row) for row in rollout.completions] == [20] * 4
    assert 0.8 * counter.get_total_flops() < needed < 1.05 * counter.get_total_flops()


def test_a_commit_is_checked_out_apart(tmp_path):
    folder = two_commits.check_out("HEAD", tmp_path)
    assert (folder / "src" / "perception_r1" / "cli.py").exists()
