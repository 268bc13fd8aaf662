"""A plan is what the run's own tensors take: counted while a real step trains on the CPU."""

import json

import pytest

from perception_r1.errors import UserError
from perception_r1.modules import SFT
from perception_r1.planning.measure import resting_memory
from perception_r1.planning.meter import MemoryMeter
from perception_r1.planning.report import check_memory
from perception_r1.policy.load import LoraConfig
from perception_r1.policy.policy import Policy
from tests.benchmarks.programs import RESULTS, program
from tests.modules.toy import make_module
from tests.readme import ROOT

memory_check = program("memory_check")
SMALL = memory_check.SHAPE.__class__(
    prompt_tokens=100,
    picture=(6, 6),
    hidden=128,
    intermediate=256,
    layers=3,
    heads=2,
    kv_heads=2,
    vocabulary=1024,
    vision_hidden=64,
    vision_layers=2,
    vision_heads=2,
)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "model"
    memory_check.make_folder(folder, SMALL)
    return folder


class CountedPhases(memory_check.PhasePeaks):
    """Bytes of real tensors in every phase of the last step."""

    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        for policy in (pl_module.policy, pl_module.reference):
            if policy is not None:
                self.meter.claim([*policy.parameters(), *policy.buffers()], "weights")
        pl_module.phase = lambda name: self.meter.phase(memory_check.PHASES.get(name, name))

    def on_train_batch_start(self, *args):
        self.meter.peaks.clear()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in memory_check.CASES if case not in memory_check.DEVICES])
def test_a_plan_is_what_the_tensors_of_a_real_step_take(random_folder, monkeypatch, case):
    monkeypatch.setattr(memory_check, "SHAPE", SMALL)
    planned = memory_check.planned(random_folder, case)
    module, meter = memory_check.make_module(random_folder, case), MemoryMeter("cpu", SMALL.vocabulary)
    module.policy_class = memory_check.FixedBuffers
    data = memory_check.Prompts(random_folder, memory_check.NUM_PROMPTS)
    with meter:
        memory_check.make_trainer([CountedPhases(meter)]).fit(module, datamodule=data)
    for phase in memory_check.PHASES.values():
        assert planned[phase] * 2**20 == pytest.approx(meter.peaks[phase].bytes, rel=0.05), phase


def test_committed_plans_are_within_a_tenth_of_what_processes_took():
    rows = json.loads((RESULTS / "memory_check.json").read_text(encoding="utf-8"))["rows"]
    assert {row["trained"] for row in rows} == set(memory_check.CASES)
    assert memory_check.rows_table(rows) in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["planned_mib"] / row["measured_mib"] == pytest.approx(1, abs=0.1), row


def test_what_a_fit_holds_at_rest_follows_from_its_weights(folder):
    module = make_module(folder)
    sizes = resting_memory(module)
    weights = sizes["weights"]
    trained = sum(weight.nbytes for weight in Policy.load(module.policy_config).parameters())
    assert sizes == {"weights": weights, "gradients": trained, "moments": 2 * trained, "reference": trained}
    assert not hasattr(module, "policy")
    half = resting_memory(make_module(folder, reference_dtype="bfloat16"))
    assert half["reference"] * 2 == trained
    assert resting_memory(make_module(folder, kl_coef=0.0))["reference"] == 0
    assert resting_memory(make_module(folder, SFT))["reference"] == 0


def test_an_adapter_has_few_gradients_and_no_reference(folder):
    sizes = resting_memory(make_module(folder, policy={"lora": LoraConfig(r=2)}))
    assert 0 < sizes["gradients"] * 20 < sizes["weights"]
    assert (sizes["moments"], sizes["reference"]) == (2 * sizes["gradients"], 0)


def test_a_device_without_room_for_the_weights_is_refused_in_a_sentence(folder):
    module = make_module(folder)
    need = sum(resting_memory(module).values())
    check_memory(module, need)
    with pytest.raises(UserError, match=r"GB before the first batch \(weights 0\.0, gradients 0\.0, .*--variant lora"):
        check_memory(module, need - 1)
