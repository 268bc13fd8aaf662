"""Prompts that taught nothing sit out an epoch of a real training."""

import pytest
import torch
from lightning.pytorch import Callback

from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.callbacks.online_curriculum import OnlineCurriculum
from perception_r1.errors import UserError
from perception_r1.modules import GRPO, SFT
from tests.modules.test_resampling import Rarely
from tests.modules.toy import Log, fit, make_data, make_module, trained_weights


class Seen(Callback):
    """Which prompts every step showed, and which of them taught something."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ids = [sample.id for sample in batch]
        self.steps.append(list(zip(ids, outputs["has_taught"].tolist(), strict=True)))


def module_of(folder, **options):
    return make_module(folder, GRPO, task=Rarely(), kl_coef=0.0, decay="constant", group_size=2, **options)


def train(folder, out, module, callbacks, **options):
    data = make_data(module.task, num_train=8, batch_size=4)
    return fit(folder, out, module, callbacks, data=data, **options)


def test_the_second_epoch_shows_only_what_taught_something_in_the_first(folder, tmp_path):
    seen, log = Seen(), Log()
    train(folder, tmp_path, module_of(folder), [OnlineCurriculum(enabled=True), seen, log], max_steps=6)
    epochs = [[pair for step in seen.steps[start : start + 2] for pair in step] for start in (0, 2, 4)]
    first = dict(epochs[0])
    assert len(first) == 8
    dull = {name for name, taught in first.items() if taught == 0}
    assert 0 < len(dull) < 8
    assert {name for name, _ in epochs[1]} == set(first) - dull
    assert dull <= {name for name, _ in epochs[2]}
    shares = [step["train/frac_prompts_resting"] for step in log.steps.values()]
    assert shares[:4] == [0, 0, *[pytest.approx(len(dull) / 8)] * 2]


def test_a_prompt_of_the_reserve_that_was_not_rolled_out_is_not_judged(folder, tmp_path):
    seen = Seen()
    train(folder, tmp_path, module_of(folder, num_prompts=1), [seen], max_steps=2)
    values = [value for step in seen.steps for _, value in step]
    assert -1 in values
    assert {0, 1} & set(values)


def test_a_resumed_run_is_the_run_that_was_not_stopped(folder, tmp_path):
    ends = []
    for name, stops in (("whole", (7,)), ("resumed", (1, 3, 6, 7))):
        ids = []
        for steps in stops:
            module, seen = module_of(folder), Seen()
            last = tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
            options = {"max_steps": steps, "ckpt_path": last if last.exists() else None}
            train(folder, tmp_path / name, module, [OnlineCurriculum(enabled=True), seen, Checkpoints()], **options)
            ids += seen.steps
        ends.append((ids, trained_weights(module)))
    (whole, weights), (resumed, others) = ends
    assert whole == resumed
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_it_changes_nothing_unless_asked_for(folder, tmp_path):
    steps = []
    for callbacks in ([], [OnlineCurriculum()]):
        seen = Seen()
        train(folder, tmp_path, module_of(folder), [*callbacks, seen], max_steps=5)
        steps.append(seen.steps)
    assert steps[0] == steps[1]


def test_a_training_without_groups_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="needs GRPO and the data of one task"):
        fit(folder, tmp_path, make_module(folder, SFT), [OnlineCurriculum(enabled=True)])
