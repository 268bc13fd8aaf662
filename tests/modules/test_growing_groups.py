"""Groups that grow over a run."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.errors import UserError
from perception_r1.modules import GRPO
from tests.modules.test_checkpoints import assert_same, last
from tests.modules.toy import Checkpoints, Log, Lottery, fit, make_module, trained_weights


def planned(first: int, final: int, num_steps: int) -> list[int]:
    """The size of each step of a run."""
    return [
        GRPO.planned_group_size(
            SimpleNamespace(group_size=first, final_group_size=final, num_steps=num_steps, global_step=step)
        )
        for step in range(num_steps)
    ]


def test_sizes_by_hand():
    assert planned(2, 4, 6) == [2, 2, 3, 3, 4, 4]
    assert planned(4, 2, 7) == [4, 4, 4, 3, 3, 2, 2]
    assert planned(8, 8, 3) == [8, 8, 8]
    assert planned(2, 8, 1) == [2]


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 60))
def test_every_size_from_first_to_final_has_its_equal_share_of_the_steps(first, final, more):
    num_sizes = abs(final - first) + 1
    sizes = planned(first, final, num_sizes + more)
    assert sizes == sorted(sizes, reverse=final < first)
    assert (sizes[0], sizes[-1]) == (first, final)
    counts = [sizes.count(size) for size in set(sizes)]
    assert len(counts) == num_sizes
    assert max(counts) - min(counts) <= 1


def run(folder, tmp_path, version, *, max_steps=6, stop=None, ckpt_path=None, **options):
    log = Log()
    module = make_module(folder, **({"group_size": 2, "final_group_size": 4, "decay": "constant"} | options))
    if stop is not None:  # as a run that is killed: its length stays what was planned
        module.num_planned_steps = lambda: max_steps
    callbacks = [log, Checkpoints()]
    kept = {"version": version, "limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(folder, tmp_path, module, callbacks, max_steps=stop or max_steps, ckpt_path=ckpt_path, **kept)
    return module, log.steps


def test_the_group_grows_is_logged_and_a_resumed_run_goes_on_growing(folder, tmp_path):
    whole, steps = run(folder, tmp_path, 0)
    assert [steps[step]["train/group_size"] for step in range(1, 7)] == [2, 2, 3, 3, 4, 4]
    run(folder, tmp_path, 1, stop=3)
    resumed, rest = run(folder, tmp_path, 2, ckpt_path=last(tmp_path, 1))
    assert [rest[step]["train/group_size"] for step in range(4, 7)] == [3, 4, 4]
    assert_same(trained_weights(resumed), trained_weights(whole))


def test_the_size_is_fixed_within_a_step_of_several_updates(folder, tmp_path, monkeypatch):
    seen = []
    real = GRPO.update

    def update(module, experience, *logprobs):
        seen.append((module.global_step, len(experience.completions)))
        return real(module, experience, *logprobs)

    monkeypatch.setattr(GRPO, "update", update)
    run(folder, tmp_path, 0, num_iterations=2)
    # two prompts; the planned size changes after the second and the fourth update
    assert seen == [(0, 4), (1, 4), (2, 6), (3, 6), (4, 8), (5, 8)]
    seen.clear()
    run(folder, tmp_path, 1, num_iterations=3)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 6), (4, 6), (5, 6)]


def test_without_a_final_size_groups_stay(folder, tmp_path):
    _, steps = run(folder, tmp_path, 0, final_group_size=None, max_steps=2)
    assert [steps[step]["train/group_size"] for step in (1, 2)] == [2, 2]


def test_a_final_size_of_one_is_refused(folder):
    with pytest.raises(UserError, match="final_group_size is 1; a completion is compared with its group"):
        make_module(folder, final_group_size=1)


def test_a_task_scores_by_the_progress_of_the_run(folder, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Rising(Lottery):
        scale: float = 1.0

        def at_progress(self, progress):
            return replace(self, scale=1 + progress)

        def score(self, prediction, target):
            score = super().score(prediction, target)
            return replace(score, reward=self.scale)

    _, steps = run(folder, tmp_path, 0, task=Rising(), max_steps=4, final_group_size=None)
    assert [steps[step]["train/reward"] for step in range(1, 5)] == [1, 1.25, 1.5, 1.75]
    run(folder, tmp_path, 1, task=Rising(), max_steps=4, stop=2, final_group_size=None)
    _, rest = run(folder, tmp_path, 2, task=Rising(), max_steps=4, final_group_size=None, ckpt_path=last(tmp_path, 1))
    assert [rest[step]["train/reward"] for step in (3, 4)] == [1.5, 1.75]
