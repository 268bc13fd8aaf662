"""From scored completions to advantages, by the options of `GRPO`; the arithmetic is in `perception_r1/grpo/`."""

import math
from collections.abc import Iterable, Mapping, Sequence
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
        self._moments: dict[str, tuple[float, float, int]] = {}

    def compute(self, module: PolicyModule, found: Round, task: AnyTask) -> Tensor:
        """[N] advantages of completions, or [N, T] of their tokens, on the CPU.

        Args:
            module: What is trained; it knows the other devices.
            found: The completions to compare.
            task: What scored them.
        """
        dtype = at_least_fp32(torch.get_default_dtype())  # that of a trainer in pure bf16 would round rewards
        rewards, scored_completions = torch.tensor(found.rewards, dtype=dtype), found.scored_completions
        names = [part_of(self.task, scored.sample.source) for scored in scored_completions]
        scale: GroupScale = "group" if self.scale_rewards == "group" else "none"
        spreads: Mapping[str, float] = {}
        if self.credit_assignment == "box":
            parts, owners = box_advantages(task, module.policy, found, scale=scale, dtype=dtype)
            advantages = pad_sequence([row[owner] for row, owner in zip(parts, owners, strict=True)], batch_first=True)
            if self.scale_rewards == "batch":
                spreads = batch_spreads(module, tasks_of(self.task), names, parts, is_centred=True)
        elif self.estimator == "gdpo":
            advantages = normalized_terms(*_terms(scored_completions, dtype), found.group_size)
            spreads = batch_spreads(module, tasks_of(self.task), names, advantages)
        else:
            advantages = group_advantages(rewards, found.group_size, estimator=self.estimator, scale=scale)
            if self.scale_rewards == "batch":
                spreads = batch_spreads(module, tasks_of(self.task), names, rewards)
        if self.scale_rewards == "task":
            spreads = self._running_spreads(module, names, rewards)
        if spreads:
            divisors = torch.tensor([spreads[name] + STD_FLOOR if spreads[name] else 1.0 for name in names])
            advantages = advantages / divisors.to(dtype).view(-1, *[1] * (advantages.ndim - 1))
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

    def _running_spreads(self, module: PolicyModule, names: Sequence[str], rewards: Tensor) -> Mapping[str, float]:
        """Running standard deviation of the rewards of each task, this step included: a mean over steps at first."""
        for name in tasks_of(self.task):
            own = rewards[torch.tensor([each == name for each in names])].double()
            sums = [float(own.sum()), float(own.square().sum()), float(len(own))]
            first, second, count = (float(module.mean_over_devices(value)) for value in sums)
            if count > 0:
                old_first, old_second, num_steps = self._moments.get(name, (0.0, 0.0, 0))
                decay = min(_DECAY, 1 - 1 / (num_steps + 1))
                self._moments[name] = (
                    decay * old_first + (1 - decay) * first / count,
                    decay * old_second + (1 - decay) * second / count,
                    num_steps + 1,
                )
        return {name: max(0.0, second - first**2) ** 0.5 for name, (first, second, _) in self._moments.items()}


def _terms(scored_completions: Sequence[ScoredCompletion], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, K] values of the terms of each reward and their weights; of tasks with fewer terms the last ones are 0."""
    reward_terms = [scored.score.reward_terms or ((1.0, scored.score.reward),) for scored in scored_completions]
    values = [torch.tensor([value for _, value in each], dtype=dtype) for each in reward_terms]
    weights = [torch.tensor([weight for weight, _ in each], dtype=dtype) for each in reward_terms]
    return pad_sequence(values, batch_first=True), pad_sequence(weights, batch_first=True)


def batch_spreads(
    module: PolicyModule,
    tasks: Iterable[str],
    names: Sequence[str],
    values: Iterable[Tensor],
    *,
    is_centred: bool = False,
) -> Mapping[str, float]:
    """Standard deviation of the values of each task in this step, on all devices.

    Args:
        module: It knows the other devices.
        tasks: Names of all tasks.
        names: N of them: whose each completion is.
        values: Those of each completion.
        is_centred: They have mean 0 in every group, so this is their root mean square.
    """
    found, rows = {}, list(values)
    for task in tasks:
        own = torch.cat(
            [torch.zeros(0), *(row.flatten() for row, name in zip(rows, names, strict=True) if name == task)]
        )
        count = float(module.mean_over_devices(float(len(own))))
        mean = 0.0 if is_centred or not count else float(module.mean_over_devices(float(own.sum()))) / count
        squares = float(module.mean_over_devices(float((own - mean).square().sum())))
        lost = 0.0 if is_centred else 1 / module.trainer.world_size  # what the mean has cost
        found[task] = math.sqrt(squares / (count - lost)) if count > lost else 0.0
    return found


def box_advantages(
    task: AnyTask, policy: Policy, found: Round, *, scale: GroupScale, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages of each box, and to which box each token belongs, on the CPU.

    Args:
        task: What scored.
        policy: The policy that wrote, for its codec and its tokens.
        found: N completions.
        scale: See `reward_to_go_advantages`.
        dtype: Of the advantages.

    Returns:
        Of each of N completions the advantages of its parts, and the part of each of its tokens, counted from 0.
    """
    prefixes = [prefix_rewards(task, policy.codec, scored) for scored in found.scored_completions]
    gained = [[*(reward for _, reward in each), total] for each, total in zip(prefixes, found.rewards, strict=True)]
    owners = []
    for completion, each in zip(found.rollout.completions, prefixes, strict=True):
        ends = torch.tensor([end for end, _ in each[1:]])
        starts = torch.tensor([0, *policy.processor.token_ends(completion)[:-1]])  # it may hold the end of its box
        owners.append(torch.searchsorted(ends, starts, right=True))
    advantages = reward_to_go_advantages(gained, found.group_size, scale=scale)
    return [torch.tensor(row, dtype=dtype) for row in advantages], owners
