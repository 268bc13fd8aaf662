"""What a step of GRPO logs about its completions and its cost.

Legend: B prompts, G completions per prompt.
"""

import statistics
from collections.abc import Mapping

import torch

from perception_r1.grpo.advantages import has_zero_std
from perception_r1.modules.base import VALIDATION
from perception_r1.modules.experience import Experience
from perception_r1.modules.resampling import Round
from perception_r1.policy.rollout import Rollout


def sampling_metrics(found: Round, knows_entropies: bool) -> dict[str, float]:
    """How all completions of a step are, and how much their rewards differ.

    Args:
        found: All that were rolled out.
        knows_entropies: Whether the engine tells entropies; where not, the log-probabilities estimate them.
    """
    rollout, rewards = found.rollout, torch.tensor(found.rewards, dtype=torch.float64)
    entropies = torch.cat(rollout.entropies) if knows_entropies else -torch.cat(rollout.logprobs)
    return {
        "group_size": float(found.group_size),
        "num_prompts": float(len(found.samples)),
        "reward_std": float(rewards.view(-1, found.group_size).std(1).mean()),
        "frac_reward_zero_std": float(has_zero_std(rewards, found.group_size).float().mean()),
        "entropy": float(entropies.mean()),
        "completion_length": statistics.fmean(map(len, rollout.completions)),
        "truncation_rate": statistics.fmean(rollout.is_truncated),
    }


def cost_metrics(
    rollout: Rollout, experience: Experience, seconds: Mapping[str, float], total: float, *, shares_prompts: bool
) -> dict[str, float]:
    """Seconds of each phase, written tokens per second, and what sharing prompts saves.

    Args:
        rollout: All completions of the step, also those of the reserve.
        experience: What the step learns from.
        seconds: Of each phase in this step.
        total: Seconds of the whole step.
        shares_prompts: Whether the passes compute a prompt once for all of its completions.
    """
    prompt_lengths = experience.prompts.lengths
    lengths = [len(completion) for completion in experience.completions]
    group_size = len(lengths) // len(prompt_lengths)
    rows = [row for micro_batch in experience.micro_batches for row in micro_batch.rows]
    written = sum(lengths[row] for row in rows)
    computed = [prompt for batch in experience.micro_batches if batch.part == 0 for prompt in batch.prompts]
    repeated = sum(prompt_lengths[row // group_size] for row in rows)
    packed = sum(prompt_lengths[prompt] for prompt in computed) if shares_prompts else repeated
    return {
        **{f"seconds/{name}": value for name, value in seconds.items() if name != VALIDATION},
        "seconds/step": total,
        "tokens_per_second": sum(map(len, rollout.completions)) / total,
        "tokens/packed": float(packed + written),
        "tokens/repeated": float(repeated + written),
    }
