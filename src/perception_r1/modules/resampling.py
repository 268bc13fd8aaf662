"""More prompts where a group of completions teaches nothing: which groups a step learns from.

Legend: B prompts, G completions per prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout
from perception_r1.records import Sample
from perception_r1.scoring import ScoredCompletion


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Some prompts with their scored completions.

    Attributes:
        samples: B samples.
        prompts: The same, encoded.
        rollout: B * G completions.
        scored_completions: The same, scored.
        states: What the rollout has computed of the prompts, if an update can learn from it.
    """

    samples: Sequence[Sample[Any]]
    prompts: PromptBatch
    rollout: Rollout
    scored_completions: Sequence[ScoredCompletion]
    states: PromptStates | None = None

    @property
    def rewards(self) -> list[float]:
        """B * G rewards."""
        return [scored.score.reward for scored in self.scored_completions]

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.scored_completions) // len(self.samples)

    def spreads(self) -> Tensor:
        """[B] standard deviation of the rewards of each group, exactly 0 where all are the same."""
        groups = torch.tensor(self.rewards, dtype=torch.float64).view(len(self.samples), -1)
        return groups.std(1).masked_fill(groups.amax(1) == groups.amin(1), 0.0)

    def select(self, indices: Sequence[int]) -> "Round":
        """The groups with these numbers, in this order."""
        size = self.group_size
        rows = [row for index in indices for row in range(index * size, (index + 1) * size)]
        rollout = self.rollout
        return Round(
            samples=[self.samples[index] for index in indices],
            prompts=self.prompts.select(indices),
            rollout=Rollout(
                completions=[rollout.completions[row] for row in rows],
                logprobs=[rollout.logprobs[row] for row in rows],
                is_truncated=[rollout.is_truncated[row] for row in rows],
                entropies=[rollout.entropies[row] for row in rows],
            ),
            scored_completions=[self.scored_completions[row] for row in rows],
            states=None if self.states is None else self.states.select(indices),
        )


def sample_until_informative(
    roll_out: Callable[[range], Round], num_available: int, *, num_prompts: int, min_reward_std: float
) -> tuple[Round, Round]:
    """Roll prompts out until enough of their groups teach something, or none is left.

    Args:
        roll_out: Rolls out the prompts with these numbers.
        num_available: How many prompts there are.
        num_prompts: Groups that are wanted; `num_available` or fewer.
        min_reward_std: Groups whose rewards have no larger standard deviation teach nothing.

    Returns:
        The groups to learn from, always `num_prompts` of them and as many on every device: those that teach something,
        and only where these are too few the first of the others; and all that were rolled out.
    """
    rounds: list[Round] = []
    first, missing = 0, num_prompts
    while missing > 0 and first < num_available:
        end = min(num_available, first + missing)
        rounds.append(roll_out(range(first, end)))
        missing -= int((rounds[-1].spreads() > min_reward_std).sum())
        first = end
    found = join(rounds)
    is_weak = (found.spreads() <= min_reward_std).tolist()
    chosen = sorted(range(len(is_weak)), key=lambda index: (is_weak[index], index))[:num_prompts]
    return found.select(sorted(chosen)), found


def join(rounds: Sequence[Round]) -> Round:
    """Several rounds as one, which no longer know what has been computed of their prompts."""
    if len(rounds) == 1:
        return rounds[0]
    rollouts = [each.rollout for each in rounds]
    return Round(
        samples=list(chain.from_iterable(each.samples for each in rounds)),
        prompts=PromptBatch.concat([each.prompts for each in rounds]),
        rollout=Rollout(
            completions=list(chain.from_iterable(rollout.completions for rollout in rollouts)),
            logprobs=list(chain.from_iterable(rollout.logprobs for rollout in rollouts)),
            is_truncated=list(chain.from_iterable(rollout.is_truncated for rollout in rollouts)),
            entropies=list(chain.from_iterable(rollout.entropies for rollout in rollouts)),
        ),
        scored_completions=list(chain.from_iterable(each.scored_completions for each in rounds)),
    )
