"""Groups that teach nothing are replaced by others from the reserve of the batch, within its bounds."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.errors import UserError
from perception_r1.modules import GRPO
from perception_r1.modules.resampling import Round, sample_until_informative
from perception_r1.policy.rollout import Rollout
from tests.modules.toy import Log, Lottery, fit, make_data, make_module, trained_weights
from tests.policy import oracle

G = 2


def made_round(rewards):
    """One group of two for each pair of rewards; everything carries the number of its prompt or row."""
    numbers = [number for number, _ in rewards]
    prompts = SimpleNamespace(numbers=numbers)
    prompts.select = lambda indices: SimpleNamespace(numbers=[numbers[i] for i in indices])
    rows = [(number, k) for number, _ in rewards for k in range(G)]
    return Round(
        samples=numbers,
        prompts=prompts,
        rollout=Rollout(
            completions=[torch.tensor(row) for row in rows],
            logprobs=[torch.tensor(row) for row in rows],
            is_truncated=[False] * len(rows),
            entropies=[torch.tensor(row) for row in rows],
        ),
        scored_completions=[
            SimpleNamespace(score=SimpleNamespace(reward=reward)) for _, group in rewards for reward in group
        ],
    )


def naive(groups, wanted, least):
    """Which prompts are rolled out and which are learnt from, one at a time."""
    is_good = [torch.tensor(group).double().std() > least and group[0] != group[1] for group in groups]
    rolled = min(wanted, len(groups))
    while sum(is_good[:rolled]) < wanted and rolled < len(groups):
        rolled = min(len(groups), rolled + wanted - sum(is_good[:rolled]))
    good = [index for index in range(rolled) if is_good[index]]
    weak = [index for index in range(rolled) if not is_good[index]]
    return rolled, sorted((good + weak)[:wanted])


values = st.sampled_from([0.0, 0.1, 0.125, 1.0])


@given(groups=st.lists(st.tuples(values, values), min_size=1, max_size=12), data=st.data())
def test_groups_that_teach_are_learnt_from_first_and_the_number_never_changes(groups, data):
    wanted = data.draw(st.integers(1, len(groups)))
    least = data.draw(st.sampled_from([0.0, 0.05]))
    calls = []

    def roll_out(indices):
        calls.append(list(indices))
        return made_round([(index, groups[index]) for index in indices])

    join_prompts = pytest.MonkeyPatch()
    with join_prompts.context() as patch:
        patch.setattr("perception_r1.modules.resampling.PromptBatch", JoinedPrompts)
        chosen, found = sample_until_informative(roll_out, len(groups), num_prompts=wanted, min_reward_std=least)
    rolled, expected = naive(groups, wanted, least)
    assert [index for call in calls for index in call] == list(range(rolled)) == found.samples
    assert chosen.samples == chosen.prompts.numbers == expected
    assert [int(row[0]) for row in chosen.rollout.completions] == [index for index in expected for _ in range(G)]
    assert chosen.rewards == [reward for index in expected for reward in groups[index]]


class JoinedPrompts:
    @staticmethod
    def concat(parts):
        numbers = [number for part in parts for number in part.numbers]
        return SimpleNamespace(
            numbers=numbers, select=lambda indices: SimpleNamespace(numbers=[numbers[index] for index in indices])
        )


def test_joined_prompts_are_those_of_the_parts(folder):
    from perception_r1.policy.load import PolicyConfig
    from perception_r1.policy.policy import Policy

    policy = Policy.load(PolicyConfig(name=str(folder))).eval()
    whole = oracle.encode(policy.processor, [0, 1, 2])
    for prompts in (whole, policy.encode_images(whole)):
        again = type(whole).concat([prompts.select([0]), prompts.select([1, 2])])
        assert again.lengths == whole.lengths
        assert again.image_grids == whole.image_grids
        assert all(torch.equal(*pair) for pair in zip(again.pixel_values, whole.pixel_values, strict=True))
        assert (again.image_features is None) is (prompts.image_features is None)


class Costs(Callback):
    """What each step logged, with times."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *args):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Rarely(Lottery):
    """Pays only for texts of an even length: many groups are all alike."""

    def score(self, prediction, target):
        score = super().score(prediction, target)
        return type(score)(reward=float(len(prediction) % 7 == 0), components=score.components, metrics=score.metrics)


def module_of(folder, **options):
    return make_module(folder, GRPO, task=Rarely(), kl_coef=0.0, decay="constant", group_size=2, **options)


def test_a_step_rolls_out_no_more_than_it_needs_and_no_more_than_the_batch(folder, tmp_path):
    log, costs = Log(), Costs()
    module = module_of(folder, num_prompts=2)
    fit(folder, tmp_path, module, [log, costs], max_steps=4, data=make_data(module.task, batch_size=8))
    for step, cost in zip(log.steps.values(), costs.steps, strict=True):  # G is 2
        num_written = step["train/num_prompts"] * 2 * step["train/completion_length"]
        assert cost["train/tokens_per_second"] * cost["train/seconds/step"] == pytest.approx(num_written, rel=1e-4)
    counts = [step["train/num_prompts"] for step in log.steps.values()]
    assert all(2 <= number <= 8 for number in counts)
    assert max(counts) > 2


@pytest.mark.slow
def test_with_nothing_to_spare_it_is_the_step_without(folder, tmp_path):
    weights = []
    for options in ({}, {"num_prompts": 2}, {"num_prompts": 9}):
        module = module_of(folder, **options)
        fit(folder, tmp_path, module, max_steps=3, data=make_data(module.task, batch_size=2))
        weights.append(trained_weights(module))
    for other in weights[1:]:
        assert all(torch.equal(other[name], value) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_resumed_run_rolls_out_the_same(folder, tmp_path):
    ends = []
    for name, stops in (("whole", (5,)), ("resumed", (2, 5))):
        for steps in stops:
            module = module_of(folder, num_prompts=2, min_reward_std=0.1)
            last = tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
            options = {"max_steps": steps, "ckpt_path": last if last.exists() else None}
            data = make_data(module.task, batch_size=4)
            fit(folder, tmp_path / name, module, [Checkpoints()], data=data, **options)
        ends.append(trained_weights(module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_prompts": 0}, "num_prompts is 0"), ({"min_reward_std": -1.0}, "min_reward_std is -1.0")],
)
def test_numbers_out_of_range_are_refused(folder, options, words):
    with pytest.raises(UserError, match=words):
        module_of(folder, **options)
