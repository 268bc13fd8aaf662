"""From scored completions to advantages, by the options of `GRPO`; the arithmetic is in `perception_r1/grpo/`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perception_r1.errors import UserError
from perception_r1.grpo.advantages import (
    STD_FLOOR,
    GroupScale,
    entropy_bonus,
    group_advantages,
    is_uncertain,
    normalized_terms,
    reward_to_go_advantages,
)
from perception_r1.modules.base import PolicyModule
from perception_r1.modules.resampling import Round
from perception_r1.policy.policy import Policy
from perception_r1.policy.precision import at_least_fp32
from perception_r1.policy.rollout import Rollout
from perception_r1.scoring import ScoredCompletion, prefix_rewards
from perception_r1.task import AnyTask, part_of, tasks_of

AdvantageEstimator = Literal["grpo", "rloo", "gdpo"]
ScaleRewards = Literal["group", "batch", "task", "none"]
CreditAssignment = Literal["completion", "box"]

_DECAY = 0.99
"""Of the running moments of a task's rewards, per step."""


class Advantages:
    """What every completion of a step, or each of its tokens, is worth beside its group.

    Args:
        task: What the run is trained on.
        estimator: See `GRPO`.
        scale_rewards: See `GRPO`.
        credit_assignment: See `GRPO`.
        entropy_coef: See `GRPO`.
        top_entropy_quantile: See `GRPO`.

    Raises:
        UserError: An option is out of range, or they do not go together.
    """

    def __init__(
        self,
        task: AnyTask,
        *,
        estimator: AdvantageEstimator,
        scale_rewards: ScaleRewards,
        credit_assignment: CreditAssignment,
        entropy_coef: float = 0.0,
        top_entropy_quantile: float = 1.0,
    ) -> None:
        if credit_assignment == "box" and (estimator != "grpo" or any(each.think for each in tasks_of(task).values())):
            raise UserError("credit_assignment box goes with advantage_estimator grpo, and not with think.")
        if estimator == "gdpo" and scale_rewards != "group":
            raise UserError("advantage_estimator gdpo has scales of its own; leave scale_rewards at group.")
        if not 0 < top_entropy_quantile <= 1:
            raise UserError(f"top_entropy_quantile is {top_entropy_quantile}; it must be above 0 and at most 1.")
        self.task = task
        self.entropy_coef, self.top_entropy_quantile = entropy_coef, top_entropy_quantile
        self.estimator, self.scale_rewards, self.credit_assignment = estimator, scale_rewards, credit_assignment
        self._moments: dict[str, tuple[float, float]] = {}

    def compute(self, module: PolicyModule, found: Round, task: AnyTask) -> Tensor:
        """[N] advantages of completions, or [N, T] of their tokens, on the CPU.

        Args:
            module: What is trained; it knows the other devices.
            found: The completions to compare.
            task: What scored them.
        """
        dtype = at_least_fp32(torch.get_default_dtype())  # that of a trainer in pure bf16 would round rewards
        rewards, scored_completions = torch.tensor(found.rewards, dtype=dtype), found.scored_completions
        scale: GroupScale = "none" if self.scale_rewards == "task" else self.scale_rewards
        if self.credit_assignment == "box":
            advantages = box_advantages(task, module.policy, found, scale=scale, dtype=dtype)
        elif self.estimator == "gdpo":
            compared = normalized_terms(*_terms(scored_completions, dtype), found.group_size)
            advantages = compared / (module.std_over_devices(compared) + STD_FLOOR)
        else:
            advantages = group_advantages(
                rewards,
                found.group_size,
                estimator=self.estimator,
                scale=scale,
                batch_std=module.std_over_devices(rewards) if scale == "batch" else None,
            )
        if self.scale_rewards == "task":
            stds = self._task_stds(module, scored_completions, rewards)
            advantages = advantages / (stds + STD_FLOOR).view(-1, *[1] * (advantages.ndim - 1))
        if self.entropy_coef or self.top_entropy_quantile < 1:
            advantages = self._by_entropy(advantages, found.rollout)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a resume."""
        return {"moments": dict(self._moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        self._moments = dict(state["moments"])

    def _by_entropy(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """[N, T] from [N] or [N, T]."""
        lengths = [len(completion) for completion in rollout.completions]
        rows = [row.expand(n) if row.ndim == 0 else row[:n] for row, n in zip(advantages, lengths, strict=True)]
        flat, logprobs, entropies = (
            torch.cat(list(each)).cpu() for each in (rows, rollout.logprobs, rollout.entropies)
        )
        if self.top_entropy_quantile < 1:
            flat = flat * is_uncertain(entropies, self.top_entropy_quantile)
        flat = flat + self.entropy_coef * entropy_bonus(logprobs, entropies)
        return pad_sequence(flat.split(lengths), batch_first=True)

    def _task_stds(
        self, module: PolicyModule, scored_completions: Sequence[ScoredCompletion], rewards: Tensor
    ) -> Tensor:
        """[N] running standard deviation of the rewards of each completion's task, this step included."""
        names = [part_of(self.task, scored.sample.source) for scored in scored_completions]
        for name in tasks_of(self.task):
            own = rewards[torch.tensor([each == name for each in names])].double()
            sums = [float(own.sum()), float(own.square().sum()), float(len(own))]
            first, second, count = (float(module.mean_over_devices(value)) for value in sums)
            if count > 0:
                new = first / count, second / count
                old = self._moments.get(name, new)
                self._moments[name] = (
                    _DECAY * old[0] + (1 - _DECAY) * new[0],
                    _DECAY * old[1] + (1 - _DECAY) * new[1],
                )
        stds = {name: max(0.0, second - first**2) ** 0.5 for name, (first, second) in self._moments.items()}
        return torch.tensor([stds[name] for name in names], dtype=rewards.dtype)


def _terms(scored_completions: Sequence[ScoredCompletion], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, K] values of the terms of each reward and their weights; of tasks with fewer terms the last ones are 0."""
    reward_terms = [scored.score.reward_terms or ((1.0, scored.score.reward),) for scored in scored_completions]
    values = [torch.tensor([value for _, value in each], dtype=dtype) for each in reward_terms]
    weights = [torch.tensor([weight for weight, _ in each], dtype=dtype) for each in reward_terms]
    return pad_sequence(values, batch_first=True), pad_sequence(weights, batch_first=True)


def box_advantages(task: AnyTask, policy: Policy, found: Round, *, scale: GroupScale, dtype: torch.dtype) -> Tensor:
    """[N, T] advantages of tokens, on the CPU: each has that of the box to which it belongs.

    Args:
        task: What scored.
        policy: The policy that wrote, for its codec and its tokens.
        found: N completions.
        scale: See `reward_to_go_advantages`.
        dtype: Of the advantages.
    """
    prefixes = [prefix_rewards(task, policy.codec, scored) for scored in found.scored_completions]
    gained = [[*(reward for _, reward in each), total] for each, total in zip(prefixes, found.rewards, strict=True)]
    rows = []
    advantages = reward_to_go_advantages(gained, found.group_size, scale=scale)
    for completion, each, parts in zip(found.rollout.completions, prefixes, advantages, strict=True):
        ends = torch.tensor([end for end, _ in each[1:]])
        starts = torch.tensor([0, *policy.processor.token_ends(completion)[:-1]])  # it may hold the end of its box
        rows.append(torch.tensor(parts, dtype=dtype)[torch.searchsorted(ends, starts, right=True)])
    return pad_sequence(rows, batch_first=True)
