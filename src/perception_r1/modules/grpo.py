"""GRPO as a LightningModule: roll out, score, compare within the group, update.

`training_step` is the algorithm; the arithmetic is in `perception_r1/grpo.py`, the network in `perception_r1/policy/`.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest).
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from perception_r1.errors import UserError
from perception_r1.grpo import LossType, group_advantages, grpo_loss, has_zero_std, token_weights
from perception_r1.modules.base import LRSchedulerConfig, PolicyModule, tag_metrics
from perception_r1.modules.encoding import encode_prompts
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.packing import MicroBatch, plan_micro_batches
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import Rollout
from perception_r1.records import LoadedSample
from perception_r1.scoring import ScoredCompletion, score_completions
from perception_r1.task import Task


@dataclass(kw_only=True, slots=True)
class Experience:
    """Scored completions, ready to be learnt from, possibly several times.

    Attributes:
        prompts: B prompts.
        completions: N token id tensors, the G completions of a prompt after one another.
        advantages: [N].
        weights: [N] weight of each token of a completion in the loss.
        parts: What is computed at once; together they hold every completion from which something can be learnt.
        old_logprobs: Per part [n, T]: of the policy that wrote the completions; filled by the first update.
        reference_logprobs: Per part [n, T]: of the frozen reference; filled by the first update.
    """

    prompts: PromptBatch
    completions: list[Tensor]
    advantages: Tensor
    weights: Tensor
    micro_batches: list[MicroBatch]
    old_logprobs: list[Tensor] = field(default_factory=list)
    reference_logprobs: list[Tensor] = field(default_factory=list)


class GRPO(PolicyModule):
    """Group relative policy optimisation with rule-based rewards (Perception-R1, arXiv 2504.07954).

    Args:
        task: The task of the data module; the command line hands it over.
        policy: Which model is trained, and what of it.
        optimizer: Optimiser of the trainable weights.
        lr_scheduler: Learning rate over the steps.
        group_size: Completions of each prompt (G), compared with each other.
        final_group_size: The group grows (or shrinks) evenly to this size over the run; null keeps it as it is.
        temperature: Of sampling; log-probabilities use the same.
        max_new_tokens: Longest completion, end token included.
        kl_coef: Weight of the KL penalty towards the policy before training (beta); 0: no reference is loaded or run.
        clip_eps_low: The probability ratio is clipped below at 1 - clip_eps_low.
        clip_eps_high: The probability ratio is clipped above at 1 + clip_eps_high.
        num_iterations: Optimiser steps on each batch of completions (mu).
        loss_type: How token losses are averaged: per completion and then over completions (grpo), over all tokens
            (dapo), or summed over a constant length (dr_grpo).
        scale_rewards: Divide advantages by the standard deviation of their group.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_batch_tokens: Tokens of prompts and completions computed at once, each prompt counted once; null computes
            the batch in one piece. A group that is larger by itself is split over its completions. It changes memory,
            not results.
        eval_batch_tokens: Places for tokens of prompts and completions that an evaluation holds at once; null: the
            whole batch of the data module.
        seed: Seed of sampling and dropout; a resumed run continues their sequence.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerConfig,
        group_size: int = 8,
        final_group_size: int | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 768,
        kl_coef: float = 0.04,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        num_iterations: int = 1,
        loss_type: LossType = "grpo",
        scale_rewards: bool = True,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int | None = None,
        eval_batch_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            task,
            policy=policy,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            max_new_tokens=max_new_tokens,
            max_grad_norm=max_grad_norm,
            micro_batch_tokens=micro_batch_tokens,
            eval_batch_tokens=eval_batch_tokens,
            seed=seed,
        )
        for name, size in {"group_size": group_size, "final_group_size": final_group_size}.items():
            if size is not None and size < 2:
                raise UserError(f"{name} is {size}; a completion is compared with its group, so use 2 or more.")
        if temperature <= 0:
            raise UserError(f"temperature is {temperature}; sampling needs a value above 0 (validation is greedy).")
        if num_iterations < 1:
            raise UserError(f"num_iterations is {num_iterations}; it must be 1 or more.")
        if kl_coef < 0 or not 0 <= clip_eps_low < 1 or clip_eps_high < 0:
            raise UserError("kl_coef and clip_eps_high must not be negative, and clip_eps_low must lie in [0, 1).")
        self.initial_group_size = group_size
        self.final_group_size = group_size if final_group_size is None else final_group_size
        self.group_size = group_size
        self.temperature = temperature
        self.kl_coef = kl_coef
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.num_iterations = num_iterations
        self.loss_type: LossType = loss_type
        self.scale_rewards = scale_rewards
        self.reference: Policy | None = None

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps per batch of the data module."""
        return self.num_iterations

    def configure_model(self) -> None:
        """Load the policy and, where a fit needs it, the frozen reference: with an adapter the policy is its own."""
        super().configure_model()
        is_needed = self.trainer.state.fn == TrainerFn.FITTING and self.kl_coef > 0 and self.policy_config.lora is None
        if is_needed and self.reference is None:
            self.reference = Policy.load(self.policy_config, is_trained=False)

    def training_step(self, batch: list[LoadedSample[Any]], batch_idx: int) -> None:
        """Roll out, score, compare within the group, update, log."""
        started = time.perf_counter()
        self.group_size = self.planned_group_size()
        seconds_before = dict(self.phase_seconds)
        with self.phase("encode"):
            prompts = encode_prompts(self.policy, self.task, batch)
        if self.policy.is_vision_frozen:  # then rollout, reference and loss see the same features
            with self.phase("vision"):
                prompts = self.policy.encode_images(prompts)
        rollout = self.generate(prompts)
        with self.phase("reward"):
            scored_completions = self.score_rollout(batch, prompts, rollout)
        rewards = torch.tensor([scored.score.reward for scored in scored_completions], device=self.device)
        advantages = group_advantages(rewards, self.group_size, scale=self.scale_rewards)
        experience = self.make_experience(prompts, rollout, advantages)
        for _ in range(self.num_iterations):
            metrics = self.update(experience)
        metrics |= {"advantage_std": float(advantages.std()), "logprob_mismatch": logprob_mismatch(rollout, experience)}
        self.log_step(rollout, scored_completions, rewards, metrics)
        self.log_cost(rollout, experience, seconds_before, time.perf_counter() - started)

    def planned_group_size(self) -> int:
        """G of the step that comes next: every size from first to final has the same number of steps."""
        growth = self.final_group_size - self.initial_group_size
        num_sizes = abs(growth) + 1
        passed = min(num_sizes - 1, num_sizes * self.global_step // max(1, self.num_steps))
        return self.initial_group_size + (passed if growth > 0 else -passed)

    def generate(self, prompts: PromptBatch) -> Rollout:
        """G completions of each prompt, from seeds that depend on the run's seed and the step alone."""
        rollout_index = self.global_step // self.num_iterations
        first = (rollout_index * self.trainer.world_size + self.global_rank) * len(prompts)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        torch.manual_seed(seeds[0])  # dropout of an adapter, if any
        self.policy.eval()
        with self.phase("prefill"):
            cache = self.policy.prefill(prompts)
        with self.phase("decode"):
            rollout = self.policy.generate(
                cache,
                group_size=self.group_size,
                max_new_tokens=self.max_new_tokens,
                seeds=seeds,
                temperature=self.temperature,
            )
        self.policy.train()
        return rollout

    def score_rollout(
        self, samples: Sequence[LoadedSample[Any]], prompts: PromptBatch, rollout: Rollout
    ) -> list[ScoredCompletion]:
        """Judge every completion against its prompt's target."""
        rows = [index for index in range(len(samples)) for _ in range(self.group_size)]
        return score_completions(
            self.task,
            self.policy.codec,
            samples=[samples[row] for row in rows],
            image_sizes=[prompts.image_sizes[row] for row in rows],
            completions=self.policy.processor.decode(rollout.completions),
            lengths=[len(completion) for completion in rollout.completions],
            truncated=rollout.is_truncated,
        )

    def make_experience(self, prompts: PromptBatch, rollout: Rollout, advantages: Tensor) -> Experience:
        """Bundle what the updates need.

        A group without any advantage pulls nowhere; without KL penalty its gradient is exactly zero, so it is left out.
        """
        lengths = [len(completion) for completion in rollout.completions]
        has_pull = advantages.view(-1, self.group_size).abs().amax(1) > 0
        chosen = [prompt for prompt in range(len(prompts)) if self.kl_coef > 0 or bool(has_pull[prompt])]
        if not chosen and self.trainer.world_size > 1:
            chosen = [0]  # the other devices wait for a backward pass
        tokens = torch.tensor(lengths, device=self.device)
        return Experience(
            prompts=prompts,
            completions=rollout.completions,
            advantages=advantages,
            weights=token_weights(
                tokens,
                loss_type=self.loss_type,
                max_new_tokens=self.max_new_tokens,
                num_tokens=self.trainer.strategy.reduce(tokens.sum().float(), reduce_op="mean"),
            ),
            micro_batches=plan_micro_batches(prompts.lengths, lengths, chosen, self.micro_batch_tokens),
        )

    def update(self, experience: Experience) -> dict[str, float]:
        """One optimiser step on the whole experience, part by part."""
        sums = {"loss": 0.0, "kl": 0.0, "clipped": 0.0}
        num_tokens = 0
        for index, micro_batch in enumerate(experience.micro_batches):
            with self.accumulation(is_last=index + 1 == len(experience.micro_batches)):
                num_tokens += self._add_gradients(experience, index, micro_batch, sums)
        with self.phase("optimizer"):
            metrics = self.apply_gradients(sums["loss"])
        per_token = {"kl": sums["kl"] / max(1, num_tokens), "clip_fraction": sums["clipped"] / max(1, num_tokens)}
        return metrics | {"loss": sums["loss"]} | per_token

    def _add_gradients(
        self, experience: Experience, index: int, micro_batch: MicroBatch, sums: dict[str, float]
    ) -> int:
        """Add the gradients of a part; the first update also fixes old and reference log-probabilities."""
        prompts = experience.prompts.select(micro_batch.prompts)
        completions = [experience.completions[row] for row in micro_batch.rows]
        is_first = len(experience.old_logprobs) == index
        if is_first and self.kl_coef > 0:
            with self.phase("reference"):
                experience.reference_logprobs.append(self.reference_logprobs(prompts, completions))
        with self.phase("policy_forward"):
            logprobs = self.policy(prompts, completions, self.temperature)  # [n, T]
        if is_first:
            experience.old_logprobs.append(logprobs.detach())
        lengths = torch.tensor([len(completion) for completion in completions], device=self.device)
        output = grpo_loss(
            logprobs,
            experience.old_logprobs[index],
            experience.reference_logprobs[index] if self.kl_coef > 0 else None,
            advantages=experience.advantages[micro_batch.rows],
            weights=experience.weights[micro_batch.rows],
            is_token=torch.arange(logprobs.shape[1], device=self.device) < lengths[:, None],
            clip_eps_low=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
            kl_coef=self.kl_coef,
        )
        with self.phase("backward"):
            self.manual_backward(output.loss)
        sums["loss"] += float(output.loss.detach())
        sums["kl"] += float(output.kl_sum)
        sums["clipped"] += float(output.num_clipped)
        return int(lengths.sum())

    @torch.no_grad()
    def reference_logprobs(self, prompts: PromptBatch, completions: Sequence[Tensor]) -> Tensor:
        """[n, T] log-probabilities under the policy before training."""
        context = self.policy.without_adapter() if self.reference is None else nullcontext(self.reference)
        with context as reference:
            return reference(prompts, completions, self.temperature)

    def log_step(
        self,
        rollout: Rollout,
        scored_completions: Sequence[ScoredCompletion],
        rewards: Tensor,
        metrics: dict[str, float],
    ) -> None:
        """Reward and its spread, every component and task metric, and how the completions look."""
        self.train_scores.update(scores=[scored.score for scored in scored_completions])
        self.log_dict(tag_metrics("train", self.train_scores.compute(), self.task), batch_size=1)
        self.train_scores.reset()
        spread = rewards.view(-1, self.group_size).std(1)
        num_tokens = [len(completion) for completion in rollout.completions]
        self.log_train(
            metrics
            | {
                "group_size": float(self.group_size),
                "reward_std": spread.mean(),
                "frac_reward_zero_std": has_zero_std(rewards, self.group_size).float().mean(),
                "entropy": rollout.entropy,
                "completion_length": sum(num_tokens) / len(num_tokens),
                "truncation_rate": sum(rollout.is_truncated) / len(num_tokens),
            }
        )

    def log_cost(self, rollout: Rollout, experience: Experience, before: dict[str, float], total: float) -> None:
        """Seconds of each phase of this step, written tokens per second, and what sharing prompts saves."""
        seconds = {name: value - before.get(name, 0.0) for name, value in self.phase_seconds.items()}
        num_tokens = sum(len(completion) for completion in rollout.completions)
        prompts = experience.prompts.lengths
        packed = sum(prompts[prompt] for micro_batch in experience.micro_batches for prompt in micro_batch.prompts)
        repeated = sum(
            prompts[row // self.group_size] for micro_batch in experience.micro_batches for row in micro_batch.rows
        )
        written = sum(
            len(rollout.completions[row]) for micro_batch in experience.micro_batches for row in micro_batch.rows
        )
        self.log_train(
            {f"seconds/{name}": value for name, value in seconds.items()}
            | {"seconds/step": total, "tokens_per_second": num_tokens / total}
            | {"tokens/packed": float(packed + written), "tokens/repeated": float(repeated + written)}
        )


def logprob_mismatch(rollout: Rollout, experience: Experience) -> float:
    """Mean distance between the log-probabilities of the sampler and those of the first training pass.

    Rounding makes it, about 1e-6 in float32 and 1e-2 in bfloat16; more means that the two do not compute the same.
    """
    pairs = [
        (rollout.logprobs[row], logprobs[place])
        for micro_batch, logprobs in zip(experience.micro_batches, experience.old_logprobs, strict=True)
        for place, row in enumerate(micro_batch.rows)
    ]
    gaps = [(sampled - trained[: len(sampled)]).abs() for sampled, trained in pairs]
    return float(torch.cat(gaps).mean()) if gaps else 0.0
