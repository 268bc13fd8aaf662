"""Advantages of a step by the options of GRPO: terms of the reward, and running scales of tasks."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perception_r1.errors import UserError
from perception_r1.grpo.advantages import group_advantages, reward_to_go_advantages
from perception_r1.modules import GRPO
from perception_r1.modules import advantages as advantages_module
from perception_r1.modules.advantages import Advantages
from perception_r1.modules.resampling import Round
from perception_r1.records import LabelledBox, Score
from perception_r1.task import Mixture
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection, DetectionPrediction, DetectionTarget
from perception_r1.tasks.grounding import Grounding, GroundingPrediction, GroundingTarget
from perception_r1.tasks.ocr import Ocr, OcrTarget
from tests.modules.toy import Lottery, fit, make_module

ALONE = SimpleNamespace(mean_over_devices=torch.tensor, trainer=SimpleNamespace(world_size=1), policy=None)
"""What a module knows of the other devices where there are none."""


def options(**changed):
    return {"estimator": "grpo", "scale_rewards": "group", "credit_assignment": "completion"} | changed


def scored(rewards, sources, reward_terms=()):
    return [
        SimpleNamespace(sample=SimpleNamespace(source=source), score=Score(reward=reward, reward_terms=reward_terms))
        for reward, source in zip(rewards, sources, strict=True)
    ]


def compute(advantages, completions, group_size, module=ALONE):
    """As in a run in double precision."""
    samples = completions[::group_size]
    found = Round(samples=samples, prompts=None, rollout=None, scored_completions=completions)
    return advantages.compute(module, found, advantages.task)


def compute_on_two(make, halves, group_size):
    """The same where each half of the completions is on a device of its own."""
    told: list[list[float]] = [[], []]
    for _ in range(5):  # until what one tells the other depends on nothing that it does not know yet
        found, before = [], [list(numbers) for numbers in told]
        for device in (0, 1):
            told[device].clear()

            def mean(number, device=device, before=before):
                told[device].append(number)
                others, place = before[1 - device], len(told[device]) - 1
                return torch.tensor((number + (others[place] if place < len(others) else number)) / 2)

            module = SimpleNamespace(mean_over_devices=mean, trainer=SimpleNamespace(world_size=2), policy=None)
            found.append(compute(make(), halves[device], group_size, module))
    return found


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_reward_is_the_sum_of_its_terms():
    box = (0.1, 0.1, 0.5, 0.5)
    for weight in (1.0, 2.5):
        task = Grounding(iou_weight=weight, format_weight=0.5)
        prediction = GroundingPrediction(boxes=((0.1, 0.1, 0.5, 0.4),), label="cup", is_well_formed=True)
        score = task.score(prediction, GroundingTarget(box=box))
        assert sum(weight * value for weight, value in score.reward_terms) == pytest.approx(score.reward)
    cat, dog = LabelledBox(label="cat", box=box), LabelledBox(label="dog", box=(0.5, 0.5, 0.9, 0.9))
    prediction = DetectionPrediction(objects=(cat,), num_listed=2, is_exact=True)
    score = Detection(categories=("cat", "dog")).score(prediction, DetectionTarget(objects=(cat, dog)))
    assert sum(weight * value for weight, value in score.reward_terms) == pytest.approx(score.reward) != 0
    assert Ocr().score("a", OcrTarget(text="ab")).reward_terms == ()


def test_gdpo_scales_each_term_and_then_the_batch():
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(6, 2, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 50.0])
    weights = (1.0, 0.1)
    completions = [
        SimpleNamespace(
            sample=SimpleNamespace(source=""),
            score=Score(reward=0.0, reward_terms=tuple(zip(weights, row, strict=True))),
        )
        for row in values.tolist()
    ]
    advantages = Advantages(Ocr(), **options(estimator="gdpo"))
    found = compute(advantages, completions, 3)
    summed = sum(weight * group_advantages(values[:, k], 3) for k, weight in enumerate(weights))
    torch.testing.assert_close(found, summed / (summed.std() + 1e-4))


def test_tasks_with_other_numbers_of_terms_go_side_by_side():
    completions = scored([0.2, 0.4], ["ocr", "ocr"]) + scored([1.0, 3.0], ["where"] * 2, ((1.0, 0.5), (2.0, 1.0)))
    advantages = Advantages(Mixture(tasks={"ocr": Ocr(), "where": Grounding()}), **options(estimator="gdpo"))
    found = compute(advantages, completions, 2)
    assert float(found[0]) == pytest.approx(-float(found[1]), rel=1e-5)
    assert found[0] < 0
    assert found[2:].tolist() == [0.0, 0.0]  # its terms are the same


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_batch_has_one_scale_for_each_task_whatever_the_number_of_devices(estimator):
    task = Mixture(tasks={"a": Ocr(), "b": Counting()})
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(1))
    rewards[4:8] *= 50
    names = ["a"] * 4 + ["b"] * 4 + ["a"] * 4
    completions = scored(rewards.tolist(), names)
    plain = group_advantages(rewards, 2, estimator=estimator, scale="none")
    stds = {
        name: statistics.stdev(r for r, n in zip(rewards.tolist(), names, strict=True) if n == name) for name in "ab"
    }
    expected = plain / (torch.tensor([stds[name] for name in names]) + 1e-4)

    def make():
        return Advantages(task, **options(scale_rewards="batch", estimator=estimator))

    torch.testing.assert_close(compute(make(), completions, 2), expected)
    halves = completions[:6], completions[6:]  # the second device has no completion of b
    torch.testing.assert_close(torch.cat(compute_on_two(make, halves, 2)), expected)


def test_boxes_have_one_scale_for_the_batch_of_all_devices(monkeypatch):
    gained = [[0.0, 1.0, 1.5], [0.0, 0.5, 0.25], [0.0, 0.1, 0.2, 0.3], [0.0, 0.15, 0.1]]
    completions = scored([row[-1] for row in gained], range(4))

    def boxes(task, policy, found, *, scale, dtype):
        rows = [gained[each.sample.source] for each in found.scored_completions]
        assert scale == "none"
        parts = reward_to_go_advantages(rows, 2, scale="none")
        return [torch.tensor(row) for row in parts], [torch.arange(len(row)) for row in parts]

    monkeypatch.setattr(advantages_module, "box_advantages", boxes)
    monkeypatch.setattr(advantages_module, "part_of", lambda task, source: "")

    def make():
        return Advantages(Counting(), **options(scale_rewards="batch", credit_assignment="box"))

    plain = reward_to_go_advantages(gained, 2, scale="none")
    size = math.sqrt(statistics.mean(value**2 for row in plain for value in row)) + 1e-4
    expected = [[value / size for value in row] for row in plain]
    one = compute(make(), completions, 2)
    two = [row for half in compute_on_two(make, (completions[:2], completions[2:]), 2) for row in half]
    for found in (one, two):
        for row, numbers in zip(found, expected, strict=True):
            assert row[: len(numbers)].tolist() == pytest.approx(numbers, rel=1e-6)


def test_a_first_step_of_equal_rewards_does_not_blow_up_later_ones():
    advantages = Advantages(Ocr(), **options(scale_rewards="task"))
    compute(advantages, scored([0.5, 0.5], ["", ""]), 2)
    draw, rewards = torch.Generator().manual_seed(0), [0.5, 0.5]
    for _ in range(10):
        new = torch.rand(2, generator=draw).tolist()
        rewards += new
        found = compute(advantages, scored(new, ["", ""]), 2)
    assert float(found[0]) == pytest.approx((new[0] - new[1]) / 2 / statistics.pstdev(rewards), rel=1e-3)


def test_the_scale_of_a_task_is_the_running_deviation_of_its_rewards():
    task = Mixture(tasks={"a": Ocr(), "b": Counting()})
    advantages = Advantages(task, **options(scale_rewards="task"))
    draw = torch.Generator().manual_seed(1)
    moments: dict[str, list[float]] = {}
    shown: dict[str, list[list[float]]] = {}
    for step in range(4):
        names = ["a", "a", "b", "b", "a", "a"] if step != 2 else ["a"] * 6
        rewards = torch.rand(6, generator=draw, dtype=torch.float64) * torch.tensor(
            [10.0 if n == "b" else 1.0 for n in names]
        )
        for name in set(names):
            own = [reward for reward, each in zip(rewards.tolist(), names, strict=True) if each == name]
            new = [statistics.mean(own), statistics.mean(value**2 for value in own)]
            shown.setdefault(name, []).append(new)
            moments[name] = [statistics.mean(each) for each in zip(*shown[name], strict=True)]  # so few weigh the same
        if step == 2:  # a resume in between
            state = advantages.state_dict()
            advantages = Advantages(task, **options(scale_rewards="task"))
            advantages.load_state_dict(state)
        found = compute(advantages, scored(rewards.tolist(), names), 2)
        plain = group_advantages(rewards, 2, scale="none")
        stds = [(moments[name][1] - moments[name][0] ** 2) ** 0.5 for name in names]
        torch.testing.assert_close(found, plain / (torch.tensor(stds).double() + 1e-4), rtol=1e-5, atol=0)


def test_a_run_goes_on_with_the_scales_that_it_had(folder, tmp_path):
    module = make_module(folder, scale_rewards="task", task=Lottery())
    fit(folder, tmp_path, module, max_steps=2)
    checkpoint = {"run": {}}
    module.on_save_checkpoint(checkpoint)
    assert list(checkpoint["run"]["advantages"]["moments"]) == [""]
    fresh = make_module(folder, scale_rewards="task", task=Lottery())
    checkpoint |= {"state_dict": {}, "pytorch-lightning_version": "2"}
    fresh.advantages.load_state_dict(checkpoint["run"]["advantages"])
    assert fresh.advantages.state_dict() == module.advantages.state_dict()


@pytest.mark.parametrize(("coef", "top"), [(0.5, 1.0), (0.0, 0.4), (0.5, 0.4)])
def test_entropy_decides_token_by_token(coef, top):
    rollout = SimpleNamespace(
        completions=[torch.zeros(2), torch.zeros(3)],
        logprobs=[torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -0.25, -4.0])],
        entropies=[torch.tensor([1.5, 0.5]), torch.tensor([0.75, 0.25, 2.0])],
    )
    advantages = Advantages(Ocr(), **options(scale_rewards="none", entropy_coef=coef, top_entropy_quantile=top))
    completions = scored([1.0, 0.0], ["ocr", "ocr"])
    found = Round(samples=[0], prompts=None, rollout=rollout, scored_completions=completions)
    is_kept = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) if top < 1 else torch.ones(2, 3)  # two of five
    bonus = torch.tensor([[-0.5, 1.5, 0.0], [-0.25, 0.0, 2.0]])
    expected = torch.tensor([[0.5], [-0.5]]) * is_kept + coef * bonus
    expected[0, 2] = 0.0  # behind the end
    torch.testing.assert_close(advantages.compute(ALONE, found, Ocr()), expected, rtol=0, atol=0)


def test_truncated_completions_teach_nothing_where_they_are_masked(folder, tmp_path):
    seen = []

    class Watched(GRPO):
        """Every other completion is taken for one that was cut."""

        def make_experience(self, prompts, rollout, advantages, *more):
            cut = [row % 2 == 1 for row in range(len(rollout.completions))]
            lengths = [1 + row % 3 for row in range(len(cut))]
            shorter = [tokens[:n] for tokens, n in zip(rollout.completions, lengths, strict=True)]
            logprobs = [values[:n] for values, n in zip(rollout.logprobs, lengths, strict=True)]
            changed = replace(rollout, completions=shorter, logprobs=logprobs, is_truncated=cut)
            seen.append((lengths, super().make_experience(prompts, changed, advantages, *more)))
            return super().make_experience(prompts, rollout, advantages, *more)

    for loss_type in ("grpo", "dapo"):
        module = make_module(folder, Watched, mask_truncated_completions=True, loss_type=loss_type)
        fit(folder, tmp_path, module, max_steps=1)
        lengths, experience = seen[-1]
        for row, weight in enumerate(experience.weights.tolist()):
            whole = 1 / lengths[row] / len(lengths) if loss_type == "grpo" else 1 / sum(lengths[::2])
            assert weight == pytest.approx(0 if row % 2 else whole)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="top_entropy_quantile is 0; it must be above 0"):
        make_module(Path("none"), GRPO, top_entropy_quantile=0)
    with pytest.raises(UserError, match="gdpo has scales of its own; leave scale_rewards at group"):
        make_module(Path("none"), GRPO, advantage_estimator="gdpo", scale_rewards="batch")
