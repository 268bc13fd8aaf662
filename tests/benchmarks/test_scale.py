"""What scale.py computes: beside operations that torch counts, and as the documentation shows it."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perception_r1.planning.meter import MemoryMeter
from perception_r1.planning.policy import ShapePolicy
from perception_r1.planning.prompts import LongestPrompt
from perception_r1.policy.load import PolicyConfig
from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

scale = program("scale")


def test_the_operations_of_a_prompt_are_those_that_torch_counts():
    load = scale.Load(num_prompts=1)
    policy = ShapePolicy.load(PolicyConfig(name=scale.NAMES["2B"]))
    policy.meter = MemoryMeter("meta")
    tokens = load.patches // 4
    prompt = LongestPrompt(num_text_tokens=load.prompt_tokens - tokens, grid=(1, 70, 72), merge_size=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.prefill(prompt.batch(policy, 1))
    assert prompt.num_tokens == load.prompt_tokens
    found = scale.flops(scale.read(scale.NAMES["2B"]), load)["prompts"]
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_decoding_is_bound_by_weights_until_there_are_many_rows():
    card, load = scale.Card(), scale.Load(num_prompts=1, prompt_tokens=1, patches=4, completion_tokens=1)
    numbers = {"language": 10**9, "head": 0, "vision": 1, "total": 10**9, "width": 1, "kv_bytes": 0, "vision_width": 1}
    model = scale.Model(**numbers)
    few, many = (scale.Load(**(vars(load) | {"group_size": size})) for size in (8, 1000))
    assert scale.seconds(model, few, card, 1, "ddp")["decode"] == pytest.approx(2e9 / 3.35e12)
    assert scale.seconds(model, many, card, 1, "ddp")["decode"] == pytest.approx(1000 * 2e9 / 989e12)
    exchange = [scale.seconds(model, few, card, count, "ddp")["exchange"] for count in (1, 2, 1024)]
    assert exchange == pytest.approx([0, 2 * 4e9 / 2 / 450e9, 2 * 4e9 * 1023 / 1024 / 400e9])


def test_the_committed_results_are_those_of_the_present_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scale.py", "--results", str(tmp_path / "scale.json")])
    assert scale.main() == 0
    found = json.loads((tmp_path / "scale.json").read_text())
    committed = json.loads((RESULTS / "scale.json").read_text(encoding="utf-8"))
    assert found == committed
    assert {row["strategy"] for row in found["rows"]} == {"ddp", "fsdp2", None}
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for each in capsys.readouterr().out.strip().split("\n\n"):
        assert each in page
