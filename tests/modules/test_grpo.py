import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import scipy.stats
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import perception_r1.modules.grpo as grpo_module
from perception_r1.data.loading import Batch
from perception_r1.errors import UserError
from perception_r1.modules import GRPO
from perception_r1.modules.base import MAX_SKIPPED_IN_A_ROW
from perception_r1.policy.load import LoraConfig
from perception_r1.policy.policy import Policy
from tests.modules.run_sharded import Sometimes, exact
from tests.modules.toy import Gradients, Log, Lottery, fit, make_data, make_module, make_trainer, trained_weights
from tests.policy import oracle


class Weights(Callback):
    """The trained weights after every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(trained_weights(pl_module))


class Poison(Callback):
    """Makes a gradient of the second step infinite."""

    def on_train_start(self, trainer, pl_module):
        head = pl_module.policy.model.lm_head.weight
        head.register_hook(lambda grad: grad * (float("inf") if trainer.global_step == 1 else 1.0))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoil_loss(monkeypatch, steps, value=float("nan")):
    """Make the loss of some steps `value`."""
    plain = GRPO.update

    def update(self, *arguments):
        def spoilt(*args, **kwargs):
            micro_batches = grpo_loss(*args, **kwargs)
            factor = value if self.global_step in steps else 1.0
            return type(micro_batches)(
                loss=micro_batches.loss * factor, kl_sum=micro_batches.kl_sum, num_clipped=micro_batches.num_clipped
            )

        monkeypatch.setattr(grpo_module, "grpo_loss", spoilt)
        return plain(self, *arguments)

    grpo_loss = grpo_module.grpo_loss
    monkeypatch.setattr(GRPO, "update", update)


def test_a_step_logs_reward_components_and_what_completions_are_like(folder, tmp_path):
    log = Log()
    fit(folder, tmp_path, callbacks=[log])
    wanted = {"reward", "reward/luck", "reward_std", "frac_reward_zero_std", "loss", "kl", "clip_fraction", "grad_norm"}
    wanted |= {"lr", "entropy", "completion_length", "truncation_rate", "length", "skipped_steps"}
    for step in (1, 2):
        assert {f"train/{name}" for name in wanted} <= set(log.steps[step])
        assert 0 < log.steps[step]["train/reward"] < 1
        assert log.steps[step]["train/grad_norm"] > 0
    assert [log.steps[step]["train/lr"] for step in (1, 2)] == pytest.approx([5e-4, 1e-3])


def test_training_changes_the_policy_and_not_the_reference(folder, tmp_path):
    module, _ = fit(folder, tmp_path)
    start = Policy.load(module.policy_config)
    assert same(dict(module.reference.named_parameters()), dict(start.named_parameters()))
    assert not any(torch.equal(value, start.get_parameter(name)) for name, value in trained_weights(module).items())


def test_the_policy_samples_in_evaluation_mode_and_learns_in_training_mode(folder, tmp_path, monkeypatch):
    modes = []
    for name in ("prefill", "forward"):
        plain = getattr(Policy, name)
        spy = lambda self, *a, plain=plain, **k: modes.append(self.model.training) or plain(self, *a, **k)  # noqa: E731
        monkeypatch.setattr(Policy, name, spy)
    fit(folder, tmp_path, make_module(folder, kl_coef=0.0))
    assert modes == [False, True, False, True]


def test_the_same_seed_trains_the_same_and_another_does_not(folder, tmp_path):
    logs = [Log(), Log(), Log()]
    runs = [
        fit(folder, tmp_path, make_module(folder, seed=seed), [log])[0]
        for seed, log in zip((1, 1, 2), logs, strict=True)
    ]
    assert same(trained_weights(runs[0]), trained_weights(runs[1]))
    assert logs[0].steps == logs[1].steps
    assert not same(trained_weights(runs[0]), trained_weights(runs[2]))


def test_with_one_update_per_rollout_the_ratio_is_exactly_one(folder, tmp_path, monkeypatch):
    ratios = []
    plain = grpo_module.grpo_loss

    def spy(logprobs, old_logprobs, *args, **kwargs):
        ratios.append(float((logprobs - old_logprobs).abs().max().detach()))
        return plain(logprobs, old_logprobs, *args, **kwargs)

    monkeypatch.setattr(grpo_module, "grpo_loss", spy)
    fit(folder, tmp_path, make_module(folder))
    assert ratios == [0.0, 0.0]
    ratios.clear()
    _, trainer = fit(folder, tmp_path, make_module(folder, num_iterations=2), max_steps=4)
    assert [ratio == 0 for ratio in ratios] == [True, False, True, False]
    assert trainer.global_step == 4


def test_the_first_gradient_is_that_of_a_loop_over_completions(folder, tmp_path, monkeypatch):
    """The whole step, rebuilt from rollout and rewards with plain arithmetic."""
    seen = {}
    plain = GRPO.make_experience

    def make_experience(self, prompts, rollout, advantages, *more):
        seen.update(prompts=prompts, rollout=rollout)
        return plain(self, prompts, rollout, advantages, *more)

    monkeypatch.setattr(GRPO, "make_experience", make_experience)
    gradients, task = Gradients(), Lottery()
    module = make_module(folder, max_grad_norm=1e9)
    fit(folder, tmp_path, module, [gradients], max_steps=1)
    policy = Policy.load(module.policy_config)
    loss = torch.zeros(())
    texts = policy.processor.decode(seen["rollout"].completions)
    rewards = torch.tensor([task.score(text.removesuffix("<|im_end|>"), None).reward for text in texts]).view(2, 4)
    for row, completion in enumerate(seen["rollout"].completions):
        group = rewards[row // 4]
        advantage = (group[row % 4] - group.mean()) / (group.std() + 1e-4)
        logprobs = policy(seen["prompts"].select([row // 4]), [completion], 1.0)[0]
        loss = loss - advantage * logprobs.mean() / 8
    loss.backward()
    for name, parameter in policy.named_parameters():
        expected = gradients.first[f"policy.{name}"]
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_micro_batches_change_no_gradient(folder, tmp_path, monkeypatch, kl_coef):
    """Whole groups apart, or groups split over their completions."""
    num_parts = []
    plain = GRPO.update
    spy = lambda self, experience, *a: num_parts.append(len(experience.micro_batches)) or plain(self, experience, *a)  # noqa: E731
    monkeypatch.setattr(GRPO, "update", spy)

    def first(budget):
        gradients = Gradients()
        module = make_module(folder, micro_batch_tokens=budget, kl_coef=kl_coef)
        fit(folder, tmp_path, module, [gradients], max_steps=1, precision="64-true", data=make_data(batch_size=3))
        return gradients.first

    whole = first(None)
    budgets = {150: 3, 1: 12}
    for budget in budgets:
        for name, gradient in first(budget).items():
            scale = max(float(whole[name].abs().max()), 1e-9)
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6 * scale, msg=name)
    assert num_parts == [1, *budgets.values()]


def test_mixed_precision_reaches_every_weight(folder, tmp_path):
    def first(precision):
        gradients = Gradients()
        fit(folder, tmp_path, make_module(folder), [gradients], max_steps=1, precision=precision)
        return gradients.first

    full, mixed = first("32-true"), first("bf16-mixed")
    assert full.keys() == mixed.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in mixed.values())


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_without_kl_penalty_no_reference_is_loaded(folder, tmp_path, monkeypatch, lora):
    loads = []
    plain = Policy.load.__func__
    monkeypatch.setattr(Policy, "load", classmethod(lambda cls, *a, **k: loads.append(k) or plain(cls, *a, **k)))
    module, _ = fit(folder, tmp_path, make_module(folder, kl_coef=0.0, policy={"lora": lora}))
    assert module.reference is None
    assert len(loads) == 1


def test_an_adapter_is_its_own_reference(folder, tmp_path):
    log = Log()
    module, _ = fit(folder, tmp_path, make_module(folder, policy={"lora": LoraConfig(r=2)}), [log], max_steps=4)
    assert module.reference is None
    assert log.steps[1]["train/kl"] == 0.0
    assert log.steps[4]["train/kl"] > 0.0
    start = Policy.load(module.policy_config, is_trained=False)
    frozen = {name.replace(".base_layer", ""): value for name, value in module.policy.model.named_parameters()}
    for name, value in start.model.named_parameters():
        assert torch.equal(frozen[name], value), name


def test_a_reference_may_have_another_type(folder, tmp_path):
    log = Log()
    module, _ = fit(folder, tmp_path, make_module(folder, reference_dtype="bfloat16"), [log], max_steps=1)
    assert {weight.dtype for weight in module.reference.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in module.policy.parameters()} == {torch.float32}
    assert 0.0 < log.steps[1]["train/kl"] < 1e-3  # before any update: rounding alone


def test_patches_count_in_the_budget_where_the_vision_tower_is_trained(folder):
    module = make_module(folder, tokens_per_patch=0.5, micro_batch_tokens=100)
    module.policy = Policy.load(module.policy_config)
    prompts = module.policy.encode([oracle.chat("a"), oracle.chat("bb")], [[oracle.noise(56, 56)]] * 2)
    assert prompts.num_patches == [16, 16]
    assert module.prompt_sizes(prompts) == [tokens + 8 for tokens in prompts.lengths]
    assert module.prompt_sizes(module.policy.encode_images(prompts)) == prompts.lengths
    module.policy.model.model.visual.requires_grad_(False)
    assert module.prompt_sizes(prompts) == prompts.lengths


def test_only_a_fit_loads_the_reference(folder, tmp_path):
    module = make_module(folder)
    _, trainer = fit(folder, tmp_path, module, max_steps=1)
    assert module.reference is not None
    fresh = make_module(folder)
    trainer.validate(fresh, datamodule=make_data(), verbose=False)
    assert fresh.reference is None


def test_groups_of_equal_rewards_move_nothing_and_are_counted(folder, tmp_path):
    log = Log()
    module = make_module(folder, task=Lottery(spread=0.0), kl_coef=0.0)
    module.optimizer_factory = torch.optim.SGD
    fit(folder, tmp_path, module, [log])
    assert log.steps[2]["train/frac_reward_zero_std"] == 1.0
    assert log.steps[2]["train/grad_norm"] == 0.0
    assert same(trained_weights(module), dict(Policy.load(module.policy_config).named_parameters()))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_counted_and_named(folder, tmp_path, monkeypatch, capsys, what):
    module, weights, log = make_module(folder), Weights(), Log()
    if what == "loss":
        spoil_loss(monkeypatch, {1})
    _, trainer = fit(folder, tmp_path, module, [weights, log, *([Poison()] if what == "gradient" else [])], max_steps=3)
    assert same(weights.steps[1], weights.steps[0])
    assert not same(weights.steps[2], weights.steps[1])
    assert all(bool(value.isfinite().all()) for value in weights.steps[2].values())
    assert module.num_skipped_steps == 1
    assert [log.steps[step]["train/skipped_steps"] for step in (1, 2, 3)] == [0, 1, 1]
    assert trainer.global_step == 3
    assert f"Step 1: the {what} is not finite; the update is skipped." in capsys.readouterr().out


def test_too_many_skipped_updates_in_a_row_stop_training(folder, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, set(range(1, 99)))
    module = make_module(folder)
    with pytest.raises(UserError, match=f"{MAX_SKIPPED_IN_A_ROW} updates in a row were not finite"):
        fit(folder, tmp_path, module, max_steps=40)
    assert module.num_skipped_steps == MAX_SKIPPED_IN_A_ROW


def test_memory_does_not_grow_from_step_to_step(folder, tmp_path):
    counts = {}

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step in (3, 8):
                gc.collect()
                counts[trainer.global_step] = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    fit(folder, tmp_path, callbacks=[Count()], max_steps=8)
    assert counts[8] <= counts[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"trainer\.gradient_clip_val has no effect here; set model\.max_grad_norm"),
        (
            {"accumulate_grad_batches": 2},
            r"trainer\.accumulate_grad_batches has no effect here; set data\.global_batch_size",
        ),
        ({"precision": "16-true"}, "16-true is not supported"),
        ({"max_steps": -1}, r"Set trainer\.max_steps or .*max_epochs"),
    ],
)
def test_trainer_settings_without_effect_are_refused(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        fit(folder, tmp_path, **options)


class Sharded(DDPStrategy):
    """Stands for those that shard the model, as DeepSpeed's does."""


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, Sharded])
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_strategy_that_would_train_apart_is_refused_in_every_verb(folder, tmp_path, strategy, verb):
    trainer, module = make_trainer(tmp_path, strategy=strategy()), make_module(folder)
    with pytest.raises(UserError, match=f"trainer.strategy {strategy.__name__} is not supported; use auto, ddp"):
        getattr(trainer, verb)(module, make_data())
    assert not hasattr(module, "policy")
    with pytest.raises(UserError, match="or fsdp2, with which it has a share"):
        make_module(Path("none")).check_trainer(make_trainer(tmp_path, strategy=strategy(), devices=2))
    for name in ("ddp", "zero1", "fsdp2"):
        make_module(Path("none")).check_trainer(make_trainer(tmp_path, strategy=name, devices=2))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(torch.optim.AdamW, lr=-1.0), r"model\.optimizer cannot be made: Invalid learning rate: -1\.0"),
        (partial(torch.optim.AdamW, betas=(2.0, 0.9)), "model.optimizer cannot be made: Invalid beta parameter"),
        (partial(torch.optim.SGD, lr=0.1, nesterov=True), "cannot be made: Nesterov momentum requires a momentum"),
        (partial(torch.optim.SGD, momentum_=1), "cannot be made: .*unexpected keyword argument 'momentum_'"),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_one_sentence_before_anything_is_loaded(
    folder, tmp_path, optimizer, message
):
    module = make_module(folder)
    module.optimizer_factory = optimizer
    with pytest.raises(UserError, match=message) as error:
        fit(folder, tmp_path, module)
    assert "\n" not in str(error.value)
    assert not hasattr(module, "policy")
    make_trainer(tmp_path).validate(module, make_data(), verbose=False)  # which needs none


def test_an_optimiser_that_refuses_the_weights_of_the_model_is_one_sentence(folder, tmp_path):
    module = make_module(folder)
    module.optimizer_factory = torch.optim.Muon  # takes matrices alone
    with pytest.raises(UserError, match=r"model\.optimizer cannot be made: Muon only supports 2D parameters"):
        fit(folder, tmp_path, module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"sampler_correction_cap": 0.0}, r"sampler_correction_cap is 0\.0"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_pos and sapo_temperature_neg must be above 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"clip_eps_low": 1.1}, "clip_eps_low"),
        ({"clip_eps_high": -0.1}, "clip_eps_high"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_module(Path("none"), **options)


def test_validation_is_greedy_and_counts_every_sample_once(folder, tmp_path):
    module = make_module(folder)
    _, trainer = fit(
        folder, tmp_path, module, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None
    )
    data = make_data()
    data.setup("validate")
    scored_completions = [module.score_greedy(Batch([sample])) for sample in data.samples("val")]
    assert len(scored_completions) == 4
    luck = [scored.score.components["luck"] for group in scored_completions for scored in group]
    assert float(trainer.callback_metrics["val/reward/luck"]) == pytest.approx(sum(luck) / 4)


def test_a_validation_says_how_long_it_took_and_its_share_of_the_run(folder, tmp_path):
    module = make_module(folder)
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    _, trainer = fit(folder, tmp_path, module, max_steps=3, **options)
    logged = trainer.callback_metrics
    spent = module.phase_seconds
    assert 0 < float(logged["val/seconds"]) < spent["validation"]  # three validations
    assert float(logged["val/frac_seconds"]) == pytest.approx(spent["validation"] / sum(spent.values()), rel=1e-6)
    assert module.validation_share == pytest.approx(float(logged["val/frac_seconds"]), rel=1e-6)
    assert "train/seconds/validation" not in logged
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, make_data(), verbose=False)
    assert "val/frac_seconds" not in trainer.callback_metrics


def test_a_validation_of_a_fit_says_how_sure_its_means_are(folder, tmp_path):
    module = make_module(folder)
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    _, trainer = fit(folder, tmp_path, module, max_steps=1, **options)
    data = make_data()
    data.setup("validate")
    rewards = [module.score_greedy(Batch([sample]))[0].score.reward for sample in data.samples("val")]
    assert len(set(rewards)) > 1
    margin = float(trainer.callback_metrics["val/margin_of_error/reward"])
    assert margin == pytest.approx(scipy.stats.sem(rewards) * scipy.stats.t.ppf(0.975, len(rewards) - 1))
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, make_data(), verbose=False)
    assert "val/margin_of_error/reward" not in trainer.callback_metrics


class Towers(Callback):
    """The pictures that each run of the vision towers of policy and reference saw."""

    def __init__(self):
        self.seen = {"policy": [], "reference": []}

    def on_train_start(self, trainer, pl_module):
        for name, runs in self.seen.items():
            if getattr(pl_module, name) is not None:
                spy = lambda module, args, kwargs, runs=runs: runs.append(len(kwargs["grid_thw"]))  # noqa: E731
                getattr(pl_module, name).model.model.visual.register_forward_pre_hook(spy, with_kwargs=True)


@pytest.mark.parametrize("policy", [{"freeze_vision": True}, {"lora": LoraConfig(r=2)}], ids=["frozen", "adapter"])
@pytest.mark.parametrize("budget", [None, 1])
def test_a_vision_tower_that_is_not_trained_sees_each_picture_once_in_a_step(folder, tmp_path, policy, budget):
    towers, log = Towers(), Log()
    module = make_module(folder, policy=policy, micro_batch_tokens=budget, num_iterations=2)
    fit(folder, tmp_path, module, [towers, log], max_steps=4)
    assert towers.seen == {"policy": [2, 2], "reference": []}
    assert log.steps[4]["train/kl"] > 0


@pytest.mark.parametrize(
    ("budget", "of_policy", "of_reference"), [(None, [2, 2], [2]), (1, [2, 1, 1, 1, 1], [1, 1])], ids=["whole", "parts"]
)
def test_a_vision_tower_that_is_trained_runs_in_rollout_reference_and_every_update(
    folder, tmp_path, budget, of_policy, of_reference
):
    """Where a step is one micro-batch, the first update learns from what the rollout has computed."""
    towers = Towers()
    module = make_module(folder, micro_batch_tokens=budget, num_iterations=2)
    fit(folder, tmp_path, module, [towers])
    assert towers.seen == {"policy": of_policy, "reference": of_reference}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_coef": 0.0, "task": Sometimes()},
        {"policy": {"lora": LoraConfig(r=2)}},
        {"policy": {"freeze_vision": True}},
        {"num_iterations": 2},
        {"micro_batch_tokens": 400, "group_size": 60},
        {"micro_batch_tokens": 400, "group_size": 60, "kl_coef": 0.0, "task": Sometimes()},
    ],
    ids=["full", "without some groups", "adapter", "frozen vision", "two updates", "parts", "parts of some groups"],
)
def test_what_the_rollout_has_computed_of_prompts_teaches_as_what_the_update_computes(
    folder, tmp_path, monkeypatch, options
):
    plain, shared = GRPO.prompt_states, []
    last = 4 if "task" in options or "num_iterations" in options else 2

    def see(self, prompts):
        states = plain(self, prompts)
        shared.append(states is not None)
        return states

    def ends(name):
        torch.manual_seed(0)  # of an adapter's first weights
        log, module = Log(), make_module(folder, **options)
        with exact():
            fit(folder, tmp_path / name, module, [log], max_steps=last, precision="64-true")
        return trained_weights(module), log.steps[last]

    monkeypatch.setattr(GRPO, "prompt_states", see)
    once, log = ends("once")
    assert shared == [True] * (last // options.get("num_iterations", 1))
    assert log["train/tokens/packed"] > options.get("micro_batch_tokens", 0)  # so that these are parts
    monkeypatch.setattr(GRPO, "computes_alike_in_training", False)
    twice, other = ends("twice")
    assert not shared[-1]
    assert log["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-6)
    assert once.keys() == twice.keys()
    for name, value in once.items():
        torch.testing.assert_close(value, twice[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": {"gradient_checkpointing": True}},
        {"policy": {"lora": LoraConfig(r=2, lora_dropout=0.1)}},
        {"micro_batch_tokens": 50},
    ],
    ids=["checkpointing", "dropout", "micro-batches"],
)
def test_the_update_computes_prompts_itself_where_it_must(folder, tmp_path, monkeypatch, options):
    plain, found = GRPO.prompt_states, []

    def see(self, *args):
        found.append(plain(self, *args))
        return found[-1]

    monkeypatch.setattr(GRPO, "prompt_states", see)
    fit(folder, tmp_path, make_module(folder, **options), max_steps=1)
    assert found == [None]


def test_with_a_reserve_the_update_computes_prompts_itself(folder, tmp_path, monkeypatch):
    """Since only later it is known which of them it learns from."""
    seen = []
    monkeypatch.setattr(GRPO, "prompt_states", lambda self, *args: seen.append(args))
    fit(folder, tmp_path, make_module(folder, num_prompts=1), max_steps=1)
    assert seen == []
    fit(folder, tmp_path, make_module(folder, num_prompts=2), max_steps=1)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "pulled", "prompts_packed"),
    [
        ({}, [0, 1], [0, 1]),
        ({"micro_batch_tokens": 1}, [0, 1], [0, 1]),
        ({"kl_coef": 0.0}, [1], [1]),
        ({"kl_coef": 0.0}, [], []),
    ],
    ids=["whole", "split", "one group", "nothing to learn"],
)
def test_a_step_logs_what_sharing_prompts_saves(folder, tmp_path, monkeypatch, options, pulled, prompts_packed):
    def make_experience(self, prompts, rollout, advantages, *more):
        seen.update(prompts=prompts, completions=rollout.completions)
        has_pull = torch.tensor([prompt in pulled for prompt in range(2)])
        return plain(self, prompts, rollout, advantages * has_pull.repeat_interleave(4), *more)

    plain, seen = GRPO.make_experience, {}
    monkeypatch.setattr(GRPO, "make_experience", make_experience)
    _, trainer = fit(folder, tmp_path, make_module(folder, **options), max_steps=1)
    lengths, completions = seen["prompts"].lengths, seen["completions"]
    assert lengths[0] != lengths[1]
    written = sum(len(completion) for prompt in pulled for completion in completions[4 * prompt : 4 * prompt + 4])
    packed = float(trainer.callback_metrics["train/tokens/packed"])
    repeated = float(trainer.callback_metrics["train/tokens/repeated"])
    assert packed == written + sum(lengths[prompt] for prompt in prompts_packed)
    assert repeated == written + sum(4 * lengths[prompt] for prompt in pulled)


@pytest.mark.parametrize("policy", [{}, {"freeze_vision": True}])
def test_a_step_logs_the_seconds_of_its_phases(folder, tmp_path, policy):
    _, trainer = fit(folder, tmp_path, make_module(folder, policy=policy))
    seconds = {
        name.removeprefix("train/seconds/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("train/seconds/")
    }
    phases = {"data", "encode", "prefill", "decode", "reward", "reference", "policy_forward", "backward", "optimizer"}
    assert set(seconds) == phases | {"step"} | ({"vision"} if policy else set())
    assert min(seconds.values()) > 0
    assert sum(value for name, value in seconds.items() if name != "step") <= seconds["step"]


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_the_sampling_gap_is_the_mean_distance_between_sampler_and_first_update(
    folder, tmp_path, monkeypatch, budget, shift
):
    def sample(self, *args):
        rollout = plain(self, *args)
        turns = [shift * (-1) ** row for row in range(len(rollout.logprobs))]
        return replace(rollout, logprobs=[row + turn for row, turn in zip(rollout.logprobs, turns, strict=True)])

    plain, log = GRPO.generate, Log()
    monkeypatch.setattr(GRPO, "generate", sample)
    fit(folder, tmp_path, make_module(folder, micro_batch_tokens=budget, num_iterations=2), [log])
    assert log.steps[2]["train/logprob_mismatch"] == pytest.approx(shift, abs=1e-5)


def test_in_mixed_precision_the_sampling_gap_stays_small(folder, tmp_path):
    log = Log()
    fit(folder, tmp_path, callbacks=[log], precision="bf16-mixed")
    assert 1e-5 < log.steps[1]["train/logprob_mismatch"] < 0.05


def test_mixed_precision_points_every_gradient_where_full_precision_does(folder, tmp_path, monkeypatch):
    """After a rollout in the same autocast context, whose casts of the weights know nothing of gradients."""
    plain, rollouts = GRPO.generate, []

    def sample(self, *args):
        rollouts.append(plain(self, *args))
        return rollouts[0]

    monkeypatch.setattr(GRPO, "generate", sample)

    def first(precision):
        gradients = Gradients()
        fit(folder, tmp_path, make_module(folder), [gradients], max_steps=1, precision=precision)
        return gradients.first

    full, mixed = first("32-true"), first("bf16-mixed")
    assert rollouts[1].logprobs[0].isfinite().all()
    assert len(rollouts) == 2
    assert full.keys() == mixed.keys()
    for name, gradient in full.items():
        alike = torch.cosine_similarity(gradient.flatten(), mixed[name].flatten(), dim=0)
        assert float(alike) > 0.9, name


def test_a_step_samples_learns_and_compares_in_the_same_nucleus(folder, tmp_path):
    log = Log()
    fit(folder, tmp_path, make_module(folder, top_p=0.7), [log], max_steps=1)
    assert log.steps[1]["train/logprob_mismatch"] < 1e-5
    assert log.steps[1]["train/kl"] == pytest.approx(0, abs=1e-9)
    assert log.steps[1]["train/grad_norm"] > 0
    wide = Log()
    fit(folder, tmp_path, make_module(folder), [wide], max_steps=1)
    assert log.steps[1]["train/entropy"] < wide.steps[1]["train/entropy"]


@pytest.mark.parametrize("budget", [None, 1])
def test_a_sampler_that_computes_what_training_computes_needs_no_correction(folder, tmp_path, budget):
    def gradients(**options):
        log, kept = Log(), {}
        module = make_module(folder, micro_batch_tokens=budget, **options)
        step = module.apply_gradients

        def keep(loss):
            kept.update(
                {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
            )
            return step(loss)

        module.apply_gradients = keep
        fit(folder, tmp_path, module, [log], max_steps=1)
        return kept

    plain, corrected = gradients(), gradients(sampler_correction="sequence_truncate")
    assert len(plain) > 60
    for name, gradient in plain.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(corrected[name], gradient, rtol=0, atol=1e-4 * scale)
    masked = gradients(sampler_correction="sequence_mask", sampler_correction_cap=1e-6, kl_coef=0.0)
    assert all(not gradient.any() for gradient in masked.values())
