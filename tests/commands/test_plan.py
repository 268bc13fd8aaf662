"""`perception-r1 plan`: every recipe from the shapes in the repository, with few layers so that it takes seconds."""

import json

import pytest

from perception_r1.cli import main
from perception_r1.commands.plan import CARDS, read
from perception_r1.planning import policy
from perception_r1.planning.report import GB
from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

memory = program("memory")
RUNS = [(recipe, trained) for recipe in memory.RECIPES for trained in memory.TRAINED]


def committed():
    return json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def shallow(monkeypatch):
    """The models in their width, with two layers."""
    whole = policy.read_config

    def cut(name):
        config = whole(name)
        config.text_config.num_hidden_layers = config.vision_config.depth = 2
        config.text_config.layer_types = ["full_attention"] * 2
        if hasattr(config.vision_config, "fullatt_block_indexes"):
            config.vision_config.fullatt_block_indexes = [1]
        if hasattr(config.vision_config, "deepstack_visual_indexes"):
            config.vision_config.deepstack_visual_indexes = [0]
        return config

    monkeypatch.setattr(policy, "read_config", cut)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "trained"), RUNS)
def test_every_recipe_can_be_planned_from_shapes_alone(shallow, recipe, trained):
    plan = read(memory.options_of(recipe, trained)).plan()
    phases = [peak.phase for peak in plan.peaks]
    frozen = ["vision"] * (trained == "LoRA")  # the tower, whose features are then the same in every pass
    assert phases == ["evaluate", *frozen, "prefill", "decode", "reference", "forward", "backward", "update", "save"]
    kinds = {kind for peak in plan.peaks for kind, size in peak.kinds.items() if size}
    assert {"weights", "gradients", "moments", "caches", "activations", "logits"} <= kinds
    whole = {"reference", "generation copy"}  # an adapter is switched off, and weights in bfloat16 are read in place
    assert whole & kinds == (set() if trained == "LoRA" else whole)
    assert ("gathered" in kinds) == ("fsdp2" in trained)
    assert plan.prompt.num_image_tokens == 1260  # 980 x 1008 pixels, the most below 1,000,000 in tokens of 28 x 28


@pytest.mark.slow
def test_the_table_says_which_card_has_the_memory(shallow, capsys):
    arguments = ["plan", *memory.options_of("counting", "all weights"), "--cards", "24", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 GB: does not fit; " in printed
    assert "24 GB: fits, with " in printed
    assert "1 GB: no setting is enough" in printed


@pytest.mark.slow
def test_advice_is_planned_too(shallow, capsys):
    plan = read(memory.options_of("counting", "all weights")).plan()
    card = plan.highest.bytes / GB - 0.1
    arguments = ["plan", *memory.options_of("counting", "all weights"), "--cards", f"{card}"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "It fits" in printed
    assert "--model.policy.gradient_checkpointing true" in printed


def test_several_devices_exchange_gradients_in_buckets(shallow):
    options = ["--task", "counting", "--model", "qwen2_vl_2b", "--trainer.devices", "2", "--data.num_val", "2"]
    plan = read(options).plan()
    backward = next(peak for peak in plan.peaks if peak.phase == "backward")
    weights = backward.kinds["weights"]
    assert backward.kinds["DDP buckets"] == pytest.approx(weights, rel=1e-3)


@pytest.mark.slow
def test_a_split_group_takes_the_gradients_of_its_layers_twice_where_devices_exchange_them(shallow):
    options = ["--task", "detection", "--model", "qwen2_5_vl_3b", "--data", "coco", "--recipe", "detection"]
    options += ["--model.micro_batch_tokens", "1500", "--model.max_new_tokens", "32"]
    each = [["--trainer.devices", f"{count}", "--data.global_batch_size", f"{2 * count}"] for count in (1, 2)]
    one, two = (read([*options, *more]).plan() for more in each)
    backward = [next(peak for peak in plan.peaks if peak.phase == "backward") for plan in (one, two)]
    more = backward[1].bytes - backward[0].bytes - backward[1].kinds["DDP buckets"]
    layer = 2 * 2048 * (2048 + 256) + 3 * 2048 * 11008  # weights of attention and of the MLP
    assert more == pytest.approx(2 * layer * 4, rel=0.01)


@pytest.mark.slow
def test_what_devices_divide_is_counted_by_its_share(shallow):
    options = [
        "--task",
        "counting",
        "--model",
        "qwen2_vl_2b",
        "--trainer.devices",
        "4",
        "--data.global_batch_size",
        "4",
    ]
    plans = {name: read([*options, "--trainer.strategy", name]).plan() for name in ("ddp", "zero1", "fsdp2")}
    at_rest = {name: next(peak.kinds for peak in plan.peaks if peak.phase == "save") for name, plan in plans.items()}
    for kind in ("weights", "reference", "moments"):
        ddp, zero1, fsdp2 = (at_rest[name][kind] for name in plans)
        assert zero1 == (pytest.approx(ddp / 4, rel=1e-3) if kind == "moments" else ddp)
        assert fsdp2 == pytest.approx(ddp / 4, rel=1e-3)
    update = [next(peak.kinds for peak in plan.peaks if peak.phase == "update") for plan in plans.values()]
    gradients = [kinds["gradients"] for kinds in update]
    assert gradients == pytest.approx([gradients[0], gradients[0], gradients[0] / 4], rel=1e-3)
    decoding = next(peak.kinds for peak in plans["fsdp2"].peaks if peak.phase == "decode")
    weights = at_rest["ddp"]["weights"]  # a rollout gathers all of them
    assert decoding["gathered"] == pytest.approx(weights, rel=1e-4)


def test_supervised_training_is_planned_without_generation(shallow):
    plan = read(["--task", "counting", "--model", "qwen3_vl_2b", "--variant", "sft", "--data.num_val", "2"]).plan()
    assert [peak.phase for peak in plan.peaks] == ["evaluate", "forward", "backward", "update", "save"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cards", "0"], "--cards are sizes in GB"),
        (["--model", "/nowhere/at/all"], "There is no model folder"),
        (["--data.global_batch_size", "3", "--trainer.devices", "2"], "cannot be shared evenly by 2 devices"),
        (["--trainer.strategy", "ddp_spawn"], "plan does not know the strategy ddp_spawn; use ddp, zero1 or fsdp2"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(capsys, arguments, message):
    assert main(["plan", "--task", "counting", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_every_recipe_fits_a_card_of_80_gb():
    need = {(row["recipe"], row["trained"]): max(row["phases"].values()) / GB for row in committed()}
    assert list(need) == RUNS
    assert max(need.values()) < 80


def test_the_documentation_shows_the_committed_table():
    assert memory.rows_table(committed()) in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert CARDS == (24, 48, 80, 141)


@pytest.mark.hours
@pytest.mark.parametrize(
    "row", committed() if (RESULTS / "memory.json").exists() else [], ids=lambda row: row["recipe"]
)
def test_the_committed_table_is_that_of_the_present_code(row):
    assert memory.plan(row["recipe"], row["trained"])["phases"] == row["phases"]
