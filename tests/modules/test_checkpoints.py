import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from perception_r1.callbacks.checkpoints import next_log_step, repair_last
from perception_r1.engines import NativeEngine
from perception_r1.engines.base import EngineError
from perception_r1.errors import UserError
from perception_r1.modules import GRPO, SFT
from perception_r1.policy.checkpoint import verify
from perception_r1.policy.checkpoint_file import DamagedCheckpointError, save_file
from perception_r1.policy.load import LoraConfig
from perception_r1.tasks.grounding import Grounding
from tests.modules.toy import Checkpoints, Log, Lottery, fit, make_data, make_module, trained_weights

VALIDATION = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
ADAPTER = {"policy": {"lora": LoraConfig(r=2, lora_dropout=0.1)}}
TEACHING = {"task": Grounding()}


class Terminate(Callback):
    """Sends SIGTERM in the middle of a step: before an optimiser step of this number."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder, tmp_path, kind=GRPO, *, callbacks=(), max_steps=6, version=0, ckpt_path=None, data=None, **options):
    log, module = Log(), make_module(folder, kind, **options)
    torch.manual_seed(version if ckpt_path else 0)
    data = data or make_data(module.task, num_train=8)  # four batches an epoch: the run crosses a border
    kept = [log, *callbacks, Checkpoints()]
    options = {"max_steps": max_steps, "version": version, "ckpt_path": ckpt_path, "data": data} | VALIDATION
    _, trainer = fit(folder, tmp_path, module, kept, **options)
    return module, trainer, log


def last(tmp_path, version):
    return tmp_path / f"version_{version}" / "checkpoints" / "last.ckpt"


def load(path):
    return torch.load(path, weights_only=False)


def assert_same(one, other):
    """Equal bit by bit, at any depth."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def assert_same_end(tmp_path, one, other):
    one, other = load(last(tmp_path, one)), load(last(tmp_path, other))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(one[key], other[key])


def assert_same_training(log, expected, steps):
    """Equal metrics of training; those of the last validation are not there until there is another one."""

    def training(steps):
        return {step: {k: v for k, v in kept.items() if k.startswith("train/")} for step, kept in steps.items()}

    assert training(log.steps) == training({step: expected.steps[step] for step in steps})


@pytest.mark.parametrize(
    ("kind", "options", "stop"),
    [(GRPO, {}, 3), (GRPO, ADAPTER, 3), (SFT, TEACHING, 3), (SFT, TEACHING | ADAPTER, 4)],
    ids=["grpo", "grpo-lora", "sft", "sft-lora-epoch"],
)
def test_a_resumed_run_ends_exactly_as_one_that_was_never_stopped(folder, tmp_path, kind, options, stop):
    options = options | {"decay": "constant"}
    whole, _, log = run(folder, tmp_path, kind, version=0, **options)
    run(folder, tmp_path, kind, version=1, max_steps=stop, **options)
    resumed, trainer, second = run(folder, tmp_path, kind, version=2, ckpt_path=last(tmp_path, 1), **options)
    assert trainer.global_step == 6
    assert_same(trained_weights(resumed), trained_weights(whole))
    assert_same_end(tmp_path, 0, 2)
    assert_same_training(second, log, range(stop + 1, 7))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "saved"), [(2, 4), (6, 8)])
def test_a_run_stopped_by_sigterm_between_two_updates_finishes_its_step_and_goes_on_exactly(
    folder, tmp_path, step, saved
):
    """The first time a validation follows that step, and is finished; the second time an epoch ends there, too."""
    options = {"num_iterations": 2, "max_steps": 12}
    whole, first, log = run(folder, tmp_path, version=0, **options)
    with pytest.raises(SIGTERMException):
        run(folder, tmp_path, version=1, callbacks=[Terminate(step)], **options)
    assert load(last(tmp_path, 1))["global_step"] == saved
    resumed, trainer, second = run(folder, tmp_path, version=2, ckpt_path=last(tmp_path, 1), **options)
    assert trainer.global_step == 12
    assert_same(trained_weights(resumed), trained_weights(whole))
    assert_same_end(tmp_path, 0, 2)
    assert_same_training(second, log, range(saved + 2, 14, 2))
    assert trainer.callback_metrics["val/reward/luck"] == first.callback_metrics["val/reward/luck"]


def test_a_run_that_dies_inside_a_step_keeps_the_checkpoint_before_and_goes_on_exactly(folder, tmp_path):
    class Fail(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 5:
                raise RuntimeError("out of memory")

    options = {"num_iterations": 2, "max_steps": 8}
    whole, _, log = run(folder, tmp_path, version=0, **options)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(folder, tmp_path, version=1, callbacks=[Fail()], **options)
    assert load(last(tmp_path, 1))["global_step"] == 4  # that of the validation after two batches
    resumed, _, second = run(folder, tmp_path, version=2, ckpt_path=last(tmp_path, 1), **options)
    assert_same(trained_weights(resumed), trained_weights(whole))
    assert_same_end(tmp_path, 0, 2)
    assert_same_training(second, log, [6, 8])


class FailingEngine(NativeEngine):
    """Fails at a rollout, counted from 0."""

    def __init__(self, number):
        self.number = number

    def generate(self, policy, prompts, *, group_size, **options):
        self.number -= group_size > 1
        if self.number < 0:
            raise EngineError("No server has answered.")
        return super().generate(policy, prompts, group_size=group_size, **options)


@pytest.mark.parametrize("number", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3, 4))])
def test_a_run_whose_engine_fails_saves_what_was_before_that_step(folder, tmp_path, number):
    """The step after one, after a validation, and at the border of an epoch."""
    options = {"num_iterations": 2, "max_steps": 12}
    whole, _, log = run(folder, tmp_path, version=0, **options)
    with pytest.raises(EngineError):
        run(folder, tmp_path, version=1, engine=FailingEngine(number), **options)
    assert load(last(tmp_path, 1))["global_step"] == 2 * number
    resumed, trainer, second = run(folder, tmp_path, version=2, ckpt_path=last(tmp_path, 1), **options)
    assert trainer.global_step == 12
    assert_same(trained_weights(resumed), trained_weights(whole))
    assert_same_end(tmp_path, 0, 2)
    assert_same_training(second, log, range(2 * number + 2, 14, 2))


def test_a_checkpoint_holds_what_is_trained_and_no_more(folder, tmp_path):
    module, _, _ = run(folder, tmp_path, version=0, max_steps=1)
    assert module.reference is not None
    names = set(load(last(tmp_path, 0))["state_dict"])
    assert names == {name for name in module.policy.state_dict(prefix="policy.")}
    adapted, _, _ = run(folder, tmp_path, version=1, max_steps=1, policy={"lora": LoraConfig(r=2)})
    names = set(load(last(tmp_path, 1))["state_dict"])
    assert names == {f"policy.{name}" for name in trained_weights(adapted)}
    assert all("lora_" in name for name in names)
    run(folder, tmp_path, version=2, max_steps=1, policy={"freeze_vision": True})
    names = set(load(last(tmp_path, 2))["state_dict"])
    assert names
    assert not any(".visual." in name for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(next(iter(state))), "misses 1 entries, first policy"),
        (lambda state: state.update(extra=torch.zeros(1)), "has unexpected 1 entries, first extra"),
        (lambda state: state.clear(), "misses"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(folder, tmp_path, change, message):
    run(folder, tmp_path, version=0, max_steps=1)
    checkpoint = load(last(tmp_path, 0))
    change(checkpoint["state_dict"])
    save_file(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, version=1, ckpt_path=tmp_path / "changed.ckpt")


def test_a_checkpoint_of_another_program_is_an_error(folder, tmp_path):
    run(folder, tmp_path, version=0, max_steps=1)
    checkpoint = load(last(tmp_path, 0))
    del checkpoint["run"]
    save_file(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not written by a run of this program"):
        run(folder, tmp_path, version=1, ckpt_path=tmp_path / "other.ckpt")


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(folder, tmp_path):
    """Whose loader was a batch ahead of its step, and which knew nothing of validations that were cut."""
    whole, _, _ = run(folder, tmp_path, version=0, decay="constant")
    run(folder, tmp_path, version=1, max_steps=3, decay="constant")
    checkpoint = load(last(tmp_path, 1))
    del checkpoint["callbacks"]["Checkpoints"]["cut"]
    loops = checkpoint["loops"]["fit_loop"]
    loops["state_dict"]["combined_loader"][0] |= {"epoch": 0, "num_batches": 4}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = 2
    save_file(checkpoint, tmp_path / "earlier.ckpt")
    assert next_log_step(tmp_path / "earlier.ckpt") == 3
    resumed, _, _ = run(folder, tmp_path, version=2, ckpt_path=tmp_path / "earlier.ckpt", decay="constant")
    assert_same(trained_weights(resumed), trained_weights(whole))


def test_a_checkpoint_of_full_training_does_not_fit_an_adapter(folder, tmp_path):
    run(folder, tmp_path, version=0, max_steps=1)
    with pytest.raises(UserError, match="another model, adapter or frozen part"):
        run(folder, tmp_path, version=1, ckpt_path=last(tmp_path, 0), policy={"lora": LoraConfig(r=2)})


def test_a_checkpoint_of_another_training_is_an_error(folder, tmp_path):
    run(folder, tmp_path, SFT, version=0, max_steps=1, **TEACHING)
    with pytest.raises(UserError, match="is of another training, SFT of grounding, and this one is GRPO of grounding"):
        run(folder, tmp_path, version=1, ckpt_path=last(tmp_path, 0), **TEACHING)


def test_a_damaged_checkpoint_is_not_gone_on_from(folder, tmp_path):
    run(folder, tmp_path, version=0, max_steps=1)
    content = bytearray(last(tmp_path, 0).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"flipped\.ckpt is damaged"):
        run(folder, tmp_path, version=1, ckpt_path=tmp_path / "flipped.ckpt")


def test_a_checkpoint_of_lightnings_own_is_an_error(folder, tmp_path):
    run(folder, tmp_path, version=0, max_steps=1)
    torch.save(load(last(tmp_path, 0)), tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match="not written by a run of this program"):
        run(folder, tmp_path, version=1, ckpt_path=tmp_path / "plain.ckpt")


class Kept(Callback):
    """Which steps the checkpoints on the disk are of when a validation is over, and whether they are whole."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        folder = last(Path(trainer.log_dir).parent, 0).parent
        for path in folder.glob("*"):
            verify(path)
        kept = [folder / name for name in ("previous.ckpt", "last.ckpt")]
        self.steps.append([load(path)["global_step"] for path in kept if path.exists()])


def test_the_checkpoint_before_is_kept_while_a_run_goes_on(folder, tmp_path):
    kept = Kept()
    run(folder, tmp_path, callbacks=[kept], max_steps=8, data=make_data(Lottery(), num_train=32))
    assert kept.steps == [[], [], [2], [2], [2, 4], [2, 4], [4, 6], [4, 6]]
    assert sorted(path.name for path in last(tmp_path, 0).parent.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_end(folder, tmp_path, damage):
    whole, _, _ = run(folder, tmp_path, version=0, max_steps=8)
    with pytest.raises(SIGTERMException):
        run(folder, tmp_path, version=1, max_steps=8, callbacks=[Terminate(6)])
    path = last(tmp_path, 1)
    assert [load(path.with_name(name))["global_step"] for name in ("previous.ckpt", "last.ckpt")] == [6, 7]
    damage(path)
    repair_last(path)
    resumed, _, _ = run(folder, tmp_path, version=1, max_steps=8, ckpt_path=path)
    assert_same(trained_weights(resumed), trained_weights(whole))
    assert_same_end(tmp_path, 0, 1)


def test_counters_survive_a_resume(folder, tmp_path):
    class Skip(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            pl_module.num_skipped_steps = 7

    first, _, _ = run(folder, tmp_path, version=0, max_steps=2, callbacks=[Skip()])
    second, _, _ = run(folder, tmp_path, version=1, max_steps=4, ckpt_path=last(tmp_path, 0))
    assert second.num_skipped_steps == 7
    assert second.phase_seconds["decode"] > first.phase_seconds["decode"]


@pytest.mark.parametrize(("primary_metric", "tag"), [("reward/luck", "val/reward/luck"), ("length", "val/length")])
def test_the_best_checkpoint_is_that_of_the_best_validation(folder, tmp_path, monkeypatch, primary_metric, tag):
    class Metrics(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.callback_metrics[tag].fill_({2: 0.1, 4: 0.9, 6: 0.5}[trainer.global_step])

    monkeypatch.setattr(Lottery, "primary_metric", primary_metric)
    run(folder, tmp_path, version=0, callbacks=[Metrics()])
    assert load(last(tmp_path, 0))["global_step"] == 6
    best = last(tmp_path, 0).with_name("best.ckpt")
    assert load(best)["global_step"] == 4
    assert best.stat().st_size < last(tmp_path, 0).stat().st_size / 2  # which has AdamW's moments besides
    with pytest.raises(UserError, match=r"holds weights alone, as best\.ckpt does; training goes on from last\.ckpt"):
        run(folder, tmp_path, version=1, ckpt_path=best)
