"""GRPO as a LightningModule: roll out, score, compare within the group, update.

`training_step` is the algorithm; the arithmetic is in `perception_r1/grpo.py`, the network in `perception_r1/policy/`.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest).
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from perception_r1.errors import UserError
from perception_r1.grpo import Aggregation, group_advantages, grpo_loss, is_equal_group, token_weights
from perception_r1.modules.base import PolicyModule, ScheduleConfig, tag_figures
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import Rollout
from perception_r1.records import Sample
from perception_r1.scoring import Outcome, judge
from perception_r1.task import Task


@dataclass(kw_only=True, slots=True)
class Experience:
    """Scored completions, ready to be learnt from, possibly several times.

    Attributes:
        prompts: B prompts.
        completions: N token id tensors, the G completions of a prompt after one another.
        advantages: [N].
        weights: [N] weight of each token of a completion in the loss.
        old_logprobs: Per micro-batch [n, T]: of the policy that wrote the completions; filled by the first update.
        reference_logprobs: Per micro-batch [n, T]: of the frozen reference; filled by the first update.
    """

    prompts: PromptBatch
    completions: list[Tensor]
    advantages: Tensor
    weights: Tensor
    old_logprobs: dict[int, Tensor]
    reference_logprobs: dict[int, Tensor]


class GRPO(PolicyModule):
    """Group relative policy optimisation with rule-based rewards (Perception-R1, arXiv 2504.07954).

    Args:
        task: The task of the data module; the command line hands it over.
        policy: Which model is trained, and what of it.
        optimizer: Optimiser of the trainable weights.
        schedule: Learning rate over the steps.
        group_size: Completions of each prompt (G), compared with each other.
        temperature: Of sampling; log-probabilities use the same.
        max_new_tokens: Longest completion, end token included.
        kl_coef: Weight of the KL penalty towards the policy before training (beta); 0: no reference is loaded or run.
        clip_low: The probability ratio is clipped below at 1 - clip_low.
        clip_high: The probability ratio is clipped above at 1 + clip_high.
        updates_per_rollout: Optimiser steps on each batch of completions (mu).
        aggregation: How token losses are averaged: per completion and then over completions (grpo), over all tokens
            (dapo), or summed over a constant length (dr_grpo).
        scale_advantages: Divide advantages by the standard deviation of their group.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_batch_size: Prompts, with all their completions, computed at once; null computes the batch in one piece.
            It changes memory, not results.
        seed: Seed of sampling and dropout; a resumed run continues their sequence.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        schedule: ScheduleConfig,
        group_size: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 768,
        kl_coef: float = 0.04,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        updates_per_rollout: int = 1,
        aggregation: Aggregation = "grpo",
        scale_advantages: bool = True,
        max_grad_norm: float = 1.0,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            task,
            policy=policy,
            optimizer=optimizer,
            schedule=schedule,
            max_new_tokens=max_new_tokens,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
        if group_size < 2:
            raise UserError(f"group_size is {group_size}; a completion is compared with its group, so use 2 or more.")
        if temperature <= 0:
            raise UserError(f"temperature is {temperature}; sampling needs a value above 0 (validation is greedy).")
        if updates_per_rollout < 1 or (micro_batch_size is not None and micro_batch_size < 1):
            raise UserError("updates_per_rollout and micro_batch_size must be 1 or more.")
        if kl_coef < 0 or not 0 <= clip_low < 1 or clip_high < 0:
            raise UserError("kl_coef and clip_high must not be negative, and clip_low must lie in [0, 1).")
        self.group_size = group_size
        self.temperature = temperature
        self.kl_coef = kl_coef
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.updates_per_rollout = updates_per_rollout
        self.aggregation: Aggregation = aggregation
        self.scale_advantages = scale_advantages
        self.micro_batch_size = micro_batch_size
        self.reference: Policy | None = None

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps per batch of the data module."""
        return self.updates_per_rollout

    def configure_model(self) -> None:
        """Load the policy and, where a fit needs it, the frozen reference: with an adapter the policy is its own."""
        super().configure_model()
        is_needed = self.trainer.state.fn == TrainerFn.FITTING and self.kl_coef > 0 and self.policy_config.lora is None
        if is_needed and self.reference is None:
            self.reference = Policy.load(self.policy_config, is_trained=False)

    def training_step(self, batch: list[Sample[Any]], batch_idx: int) -> None:
        """Roll out, score, compare within the group, update, log."""
        started = time.perf_counter()
        seconds_before = dict(self.phase_seconds)
        with self.phase("encode"):
            prompts = self.policy.encode(self.task, batch)
        with self.phase("rollout"):
            rollout = self.sample(prompts)
        with self.phase("reward"):
            outcomes = self.score(batch, prompts, rollout)
        rewards = torch.tensor([outcome.score.reward for outcome in outcomes], device=self.device)
        advantages = group_advantages(rewards, self.group_size, scale=self.scale_advantages)
        experience = self.remember(prompts, rollout, advantages)
        for _ in range(self.updates_per_rollout):
            figures = self.update(experience)
        self.log_step(rollout, outcomes, rewards, figures | {"advantage_std": float(advantages.std())})
        self.log_seconds(rollout, seconds_before, time.perf_counter() - started)

    def sample(self, prompts: PromptBatch) -> Rollout:
        """G completions of each prompt, from seeds that depend on the run's seed and the step alone."""
        rollout_index = self.global_step // self.updates_per_rollout
        first = (rollout_index * self.trainer.world_size + self.global_rank) * len(prompts)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        torch.manual_seed(seeds[0])  # dropout of an adapter, if any
        self.policy.eval()
        rollout = self.policy.roll_out(
            prompts,
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            seeds=seeds,
            temperature=self.temperature,
        )
        self.policy.train()
        return rollout

    def score(self, samples: Sequence[Sample[Any]], prompts: PromptBatch, rollout: Rollout) -> list[Outcome]:
        """Judge every completion against its prompt's target."""
        rows = [index for index in range(len(samples)) for _ in range(self.group_size)]
        return judge(
            self.task,
            self.policy.codec,
            samples=[samples[row] for row in rows],
            frames=[prompts.frames[row] for row in rows],
            completions=self.policy.processor.decode(rollout.completions),
            lengths=[len(completion) for completion in rollout.completions],
            truncated=rollout.is_truncated,
        )

    def remember(self, prompts: PromptBatch, rollout: Rollout, advantages: Tensor) -> Experience:
        """Bundle what the updates need."""
        lengths = torch.tensor([len(completion) for completion in rollout.completions], device=self.device)
        return Experience(
            prompts=prompts,
            completions=rollout.completions,
            advantages=advantages,
            weights=token_weights(
                lengths,
                aggregation=self.aggregation,
                max_new_tokens=self.max_new_tokens,
                num_tokens=self.trainer.strategy.reduce(lengths.sum().float(), reduce_op="mean"),
            ),
            old_logprobs={},
            reference_logprobs={},
        )

    def update(self, experience: Experience) -> dict[str, float]:
        """One optimiser step on the whole experience, in micro-batches of whole groups.

        A group without any advantage pulls nowhere; without KL penalty its gradient is exactly zero, so it is left out.
        Not so on several devices, which must all make the same number of backward passes.
        """
        has_pull = experience.advantages.view(-1, self.group_size).abs().amax(1) > 0
        is_complete = self.kl_coef > 0 or self.trainer.world_size > 1
        prompts = [i for i in range(len(experience.prompts)) if is_complete or bool(has_pull[i])]
        size = self.micro_batch_size or max(1, len(prompts))
        totals = {"loss": 0.0, "kl": 0.0, "clipped": 0.0}
        num_tokens = 0
        for start in range(0, len(prompts), size):
            num_tokens += self._accumulate(experience, start, prompts[start : start + size], totals)
        with self.phase("optimizer"):
            figures = self.apply_gradients(totals["loss"])
        per_token = {"kl": totals["kl"] / max(1, num_tokens), "clipped_share": totals["clipped"] / max(1, num_tokens)}
        return figures | {"loss": totals["loss"]} | per_token

    def _accumulate(self, experience: Experience, key: int, chosen: list[int], totals: dict[str, float]) -> int:
        """Add the gradients of some groups; the first update also fixes old and reference log-probabilities."""
        rows = [i * self.group_size + g for i in chosen for g in range(self.group_size)]
        prompts = experience.prompts.select(chosen)
        completions = [experience.completions[row] for row in rows]
        if self.kl_coef > 0 and key not in experience.reference_logprobs:
            with self.phase("reference"):
                experience.reference_logprobs[key] = self.reference_logprobs(prompts, completions)
        with self.phase("policy_forward"):
            logprobs = self.policy(prompts, completions, self.temperature)  # [n, T]
        old_logprobs = experience.old_logprobs.setdefault(key, logprobs.detach())
        lengths = torch.tensor([len(completion) for completion in completions], device=self.device)
        parts = grpo_loss(
            logprobs,
            old_logprobs,
            experience.reference_logprobs.get(key),
            advantages=experience.advantages[rows],
            weights=experience.weights[rows],
            is_token=torch.arange(logprobs.shape[1], device=self.device) < lengths[:, None],
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coef=self.kl_coef,
        )
        with self.phase("backward"):
            self.manual_backward(parts.loss)
        totals["loss"] += float(parts.loss.detach())
        totals["kl"] += float(parts.kl_sum)
        totals["clipped"] += float(parts.clipped_sum)
        return int(lengths.sum())

    @torch.no_grad()
    def reference_logprobs(self, prompts: PromptBatch, completions: Sequence[Tensor]) -> Tensor:
        """[n, T] log-probabilities under the policy before training."""
        context = self.policy.without_adapter() if self.reference is None else nullcontext(self.reference)
        with context as reference:
            return reference(prompts, completions, self.temperature)

    def log_step(
        self, rollout: Rollout, outcomes: Sequence[Outcome], rewards: Tensor, figures: dict[str, float]
    ) -> None:
        """Reward and its spread, every term and task metric, and how the completions look."""
        self.train_scores.update(scores=[outcome.score for outcome in outcomes])
        self.log_dict(tag_figures("train", self.train_scores.compute(), self.task), batch_size=1)
        self.train_scores.reset()
        spread = rewards.view(-1, self.group_size).std(1)
        num_tokens = [len(completion) for completion in rollout.completions]
        self.log_train(
            figures
            | {
                "reward_std": spread.mean(),
                "zero_variance_groups": is_equal_group(rewards, self.group_size).float().mean(),
                "entropy": rollout.entropy,
                "completion_length": sum(num_tokens) / len(num_tokens),
                "truncated_share": sum(rollout.is_truncated) / len(num_tokens),
            }
        )

    def log_seconds(self, rollout: Rollout, before: dict[str, float], total: float) -> None:
        """Seconds of each phase of this step, and written tokens per second."""
        seconds = {name: value - before.get(name, 0.0) for name, value in self.phase_seconds.items()}
        num_tokens = sum(len(completion) for completion in rollout.completions)
        self.log_train(
            {f"seconds/{name}": value for name, value in seconds.items()}
            | {"seconds/step": total, "tokens_per_second": num_tokens / total}
        )
