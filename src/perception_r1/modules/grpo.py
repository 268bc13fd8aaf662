"""GRPO as a LightningModule: roll out, score, compare within the group, update.

`training_step` is the algorithm; the arithmetic is in `perception_r1/grpo/`, the network in `perception_r1/policy/`.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest).
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perception_r1.data.loading import Batch
from perception_r1.errors import UserError
from perception_r1.grpo.loss import (
    ImportanceSamplingLevel,
    KLEstimator,
    LossConfig,
    LossType,
    Objective,
    SamplerCorrection,
    grpo_loss,
    sampler_weights,
    token_weights,
)
from perception_r1.modules.advantages import AdvantageEstimator, Advantages, CreditAssignment, ScaleRewards
from perception_r1.modules.base import PolicyModule
from perception_r1.modules.experience import Experience, logprob_mismatch
from perception_r1.modules.resampling import Round, sample_until_informative
from perception_r1.modules.shared_prompts import SharedPrompts
from perception_r1.modules.step_metrics import cost_metrics, sampling_metrics
from perception_r1.policy.batch import PromptBatch, to_device
from perception_r1.policy.load import Dtype, PolicyConfig
from perception_r1.policy.packing import MicroBatch
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout
from perception_r1.policy.sharding import unsharded
from perception_r1.scoring import score_completions
from perception_r1.task import AnyTask, Mixture, at_progress


class GRPO(PolicyModule):
    """Group relative policy optimisation with rule-based rewards (Perception-R1, arXiv 2504.07954).

    Args:
        task: That of the data module, or its mixture of several; the command line hands it over.
        group_size: Completions of each prompt (G), compared with each other.
        num_prompts: Prompts that a step and device learns from; where a batch has more, the others are a reserve, of
            which one is rolled out for each group that teaches nothing. null: all of the batch.
        min_reward_std: A group teaches nothing where the standard deviation of its rewards is no larger than this.
        final_group_size: The group grows (or shrinks) evenly to this size over the run; null keeps it as it is.
        temperature: Of sampling; log-probabilities use the same.
        top_p: Sample only from the most probable tokens that together reach this probability; log-probabilities, also
            those of the reference, are of the distribution that is left. 1 samples from all tokens.
        kl_coef: Weight of the KL penalty towards the policy before training (beta); 0: no reference is loaded or run.
        kl_estimator: Of that divergence: k3 (GRPO) or k2, see `kl_estimate`.
        kl_bias_correction: Multiply the estimates by the ratio, which makes the gradient of k3 that of the divergence.
        entropy_coef: Weight of a bonus for the entropy of every token; 0: none.
        top_entropy_quantile: Learn from the share of the tokens of a step and device that were drawn from the
            distributions with the largest entropy, 0.2 say (arXiv 2506.01939); 1: from all of them.
        mask_truncated_completions: Learn nothing from completions that ran into the length limit (DAPO).
        reference_dtype: Type of the reference's weights; null: that of the policy's. With passes in mixed precision
            bfloat16 halves their memory, and moves the reference's log-probabilities by about as much as rounding does
            in these passes anyway. An adapter has no reference beside it.
        clip_eps_low: The probability ratio is clipped below at 1 - clip_eps_low; 1: not at all.
        clip_eps_high: The probability ratio is clipped above at 1 + clip_eps_high.
        sampler_correction: Importance weights for an engine that does not compute what training computes (see
            `train/logprob_mismatch`): of tokens or of sequences, truncated or masked beyond the cap; null for none,
            which is right for the own engine.
        sampler_correction_cap: The largest of these weights.
        num_iterations: Optimiser steps on each batch of completions (mu).
        objective: What ratio and advantage make of a token: clip (GRPO, PPO), cispo, or sapo; see `grpo_loss`.
        importance_sampling_level: Ratios of tokens, or one for each completion (sequence: GSPO, with clip_eps_low and
            clip_eps_high of some ten thousandths). It matters from the second update on a batch on.
        sapo_temperature_pos: Of the gate of the objective sapo where the advantage is positive.
        sapo_temperature_neg: Of the gate of sapo elsewhere.
        loss_type: How token losses are averaged: per completion and then over completions (grpo), over all tokens
            (dapo), or summed over a constant length (dr_grpo).
        credit_assignment: Every token of a completion has its advantage (completion); or each box its own, by what the
            reward gained from it on (box, see `reward_to_go_advantages`). Answers without boxes have one advantage.
        advantage_estimator: Compare a reward with the mean of its group (grpo) or of the others in it (rloo), or
            compare each term of the reward by itself, on a scale of its own (gdpo).
        scale_rewards: Divide advantages by the standard deviation of their group, by that of the whole batch on all
            devices, by that of the rewards of their task over the last steps, some hundred (task), or by nothing (none,
            as Dr. GRPO).
        **kwargs: Those of `PolicyModule`.
    """

    def __init__(
        self,
        task: AnyTask,
        *,
        group_size: int = 8,
        num_prompts: int | None = None,
        min_reward_std: float = 0.0,
        final_group_size: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        kl_coef: float = 0.04,
        kl_estimator: KLEstimator = "k3",
        kl_bias_correction: bool = False,
        entropy_coef: float = 0.0,
        top_entropy_quantile: float = 1.0,
        mask_truncated_completions: bool = False,
        reference_dtype: Dtype | None = None,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        sampler_correction: SamplerCorrection | None = None,
        sampler_correction_cap: float = 3.0,
        num_iterations: int = 1,
        objective: Objective = "clip",
        importance_sampling_level: ImportanceSamplingLevel = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        loss_type: LossType = "grpo",
        credit_assignment: CreditAssignment = "completion",
        advantage_estimator: AdvantageEstimator = "grpo",
        scale_rewards: ScaleRewards = "group",
        **kwargs: Any,
    ) -> None:
        super().__init__(task, **kwargs)
        for name, size in {"group_size": group_size, "final_group_size": final_group_size}.items():
            if size is not None and size < 2:
                raise UserError(f"{name} is {size}; a completion is compared with its group, so use 2 or more.")
        if temperature <= 0:
            raise UserError(f"temperature is {temperature}; sampling needs a value above 0 (validation is greedy).")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1.")
        if num_iterations < 1:
            raise UserError(f"num_iterations is {num_iterations}; it must be 1 or more.")
        if num_prompts is not None and num_prompts < 1:
            raise UserError(f"num_prompts is {num_prompts}; it must be 1 or more, or null for all of a batch.")
        if min_reward_std < 0:
            raise UserError(f"min_reward_std is {min_reward_std}; it must not be negative.")
        self.num_prompts, self.min_reward_std = num_prompts, min_reward_std
        self.group_size = group_size
        self.final_group_size = group_size if final_group_size is None else final_group_size
        self.temperature = temperature
        self.top_p = top_p
        self.kl_coef = kl_coef
        self.mask_truncated_completions = mask_truncated_completions
        self.reference_dtype = reference_dtype
        if sampler_correction_cap <= 0:
            raise UserError(f"sampler_correction_cap is {sampler_correction_cap}; it must be above 0.")
        self.sampler_correction: SamplerCorrection | None = sampler_correction
        self.sampler_correction_cap = sampler_correction_cap
        self.num_iterations = num_iterations
        self.loss_type: LossType = loss_type
        self.loss_config = LossConfig(
            clip_eps_low=clip_eps_low,
            clip_eps_high=clip_eps_high,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_bias_correction=kl_bias_correction,
            objective=objective,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
        )
        self.advantages = Advantages(
            task,
            estimator=advantage_estimator,
            scale_rewards=scale_rewards,
            credit_assignment=credit_assignment,
            entropy_coef=entropy_coef,
            top_entropy_quantile=top_entropy_quantile,
        )
        self.reference: Policy | None = None
        if not self.engine.knows_entropies and (entropy_coef != 0 or top_entropy_quantile < 1):
            raise UserError(
                f"entropy_coef and top_entropy_quantile need entropies, which {type(self.engine).__name__} does not "
                "tell: leave them out, or use the engine of this package."
            )

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps per batch of the data module."""
        return self.num_iterations

    def configure_model(self) -> None:
        """Load the policy and, where a fit needs it, the frozen reference: with an adapter the policy is its own."""
        super().configure_model()
        config = self.reference_config
        if config is not None and self.reference is None and self.trainer.state.fn == TrainerFn.FITTING:
            self.reference = self.load_policy(config, is_trained=False)

    @property
    def reference_config(self) -> PolicyConfig | None:
        """Which model a fit compares the policy with; None where nothing is, or the policy without its adapter."""
        if self.kl_coef == 0 or self.policy_config.lora is not None:
            return None
        return replace(self.policy_config, dtype=self.reference_dtype or self.policy_config.dtype)

    def on_train_start(self) -> None:
        """Say it where a step costs more than users may expect."""
        family = self.policy.family
        if not family.shares_prompts:
            self.print(f"{family.name}: prompts cannot be shared, so training computes them once for each completion.")

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Roll out, score, compare within the group, update, log.

        Returns:
            "has_taught": [B] 1 where the group of a prompt taught something, 0 where not, -1 where not rolled out.
        """
        started, seconds_before = time.perf_counter() - batch.seconds, dict(self.phase_seconds)
        self.count_seconds("data", batch.seconds)
        group_size = self.planned_group_size()
        seeds = self.seeds(len(batch))
        torch.manual_seed(seeds[0])  # dropout of an adapter, if any
        num_prompts = min(self.num_prompts or len(batch), len(batch))

        def roll_out(indices: range) -> Round:
            own_seeds = [seeds[index] for index in indices]
            return self.roll_out(batch.select(indices), group_size, own_seeds, has_reserve=num_prompts < len(batch))

        with self.answering():
            chosen, found = sample_until_informative(
                roll_out, len(batch), num_prompts=num_prompts, min_reward_std=self.min_reward_std
            )
        self.engine.sleep()
        with self.phase("reward"):
            advantages = self.advantages.compute(self, chosen, self.scoring_task)
        experience = self.make_experience(chosen.prompts, chosen.rollout, advantages, chosen.states)
        reference_logprobs = self.reference_logprobs(experience)
        metrics, old_logprobs = self.update(experience, reference_logprobs)
        experience = replace(experience, states=None)  # those of weights that are no more
        for _ in range(self.num_iterations - 1):
            metrics, _ = self.update(experience, reference_logprobs, old_logprobs)
        mismatch = logprob_mismatch(chosen.rollout, experience.micro_batches, old_logprobs)
        metrics |= {"advantage_std": float(advantages.std()), "logprob_mismatch": mismatch}
        self.log_step(found, metrics)
        seconds = {name: value - seconds_before.get(name, 0.0) for name, value in self.phase_seconds.items()}
        total, is_shared = time.perf_counter() - started, self.policy.family.shares_prompts
        self.log_train(cost_metrics(found.rollout, experience, seconds, total, shares_prompts=is_shared))
        has_taught = torch.full((len(batch),), -1)
        has_taught[: len(found.samples)] = (found.spreads() > self.min_reward_std).long()
        return {"has_taught": has_taught}

    @property
    def scoring_task(self) -> AnyTask:
        """The task as it scores in the step that comes next."""
        return at_progress(self.task, self.global_step / max(1, self.num_steps))

    def planned_group_size(self) -> int:
        """G of the step that comes next: every size from first to final has the same number of steps."""
        growth = self.final_group_size - self.group_size
        num_sizes = abs(growth) + 1
        passed = min(num_sizes - 1, num_sizes * self.global_step // max(1, self.num_steps))
        return self.group_size + (passed if growth > 0 else -passed)

    def seeds(self, count: int) -> list[int]:
        """One for each prompt of a batch; those of all devices together are the same whatever their number."""
        total, rollout_index = count * self.trainer.world_size, self.global_step // self.num_iterations
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rollout_index * total)
        seeds: list[int] = torch.randint(2**62, (total,), generator=generator).tolist()
        return seeds[self.global_rank * count :][:count]

    def roll_out(self, batch: Batch, group_size: int, seeds: Sequence[int], *, has_reserve: bool) -> Round:
        """G scored completions of each sample, from one seed each, inside of `answering`.

        With a reserve, it is open which of them the step learns from.
        """
        with self.phase("encode"):
            prompts = self.encode(batch)
        if self.policy.is_vision_frozen:  # then rollout, reference and loss see the same features
            with self.phase("vision"):
                prompts = self.policy.encode_images(prompts)
        states = None if has_reserve else self.prompt_states(prompts)
        rollout = self.generate(prompts, group_size, seeds, states)
        with self.phase("reward"):
            scored = score_completions(self.scoring_task, self.parse(batch.samples, prompts, rollout))
        return Round(samples=batch.samples, prompts=prompts, rollout=rollout, scored_completions=scored, states=states)

    def prompt_states(self, prompts: PromptBatch) -> PromptStates | None:
        """Prompts computed for both the rollout and the first update, or None where each computes them for itself.

        They are shared where the passes are the same and all prompts take no more than half of a micro-batch, for they
        are held until the update is over.
        """
        budget = self.micro_batch_tokens
        if not self.computes_alike_in_training or (budget is not None and 2 * sum(self.prompt_sizes(prompts)) > budget):
            return None
        with self.phase("prefill"), torch.enable_grad():
            return self.policy.prompt_states(prompts)

    @property
    def computes_alike_in_training(self) -> bool:
        """Whether the rollout computes prompts as an update does: with the same weights, and nothing by chance."""
        if self.engine.has_own_weights or self.device_mesh is not None or not self.policy.family.shares_prompts:
            return False
        return not self.policy_config.gradient_checkpointing and not self.policy.has_dropout

    def generate(
        self, prompts: PromptBatch, group_size: int, seeds: Sequence[int], states: PromptStates | None = None
    ) -> Rollout:
        """G completions of each prompt, which may have been computed already."""
        params = self.policy.sampling_params(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p
        )
        return self.engine.generate(
            self.policy, prompts, group_size=group_size, params=params, seeds=seeds, states=states, phase=self.phase
        )

    def make_experience(
        self, prompts: PromptBatch, rollout: Rollout, advantages: Tensor, states: PromptStates | None = None
    ) -> Experience:
        """Bundle what the updates need; the advantages are on the CPU, for they decide what is computed.

        A group without any advantage pulls nowhere; without KL penalty its gradient is exactly zero, so it is left out.
        """
        lengths = [len(completion) for completion in rollout.completions]
        is_kept = [not (self.mask_truncated_completions and is_truncated) for is_truncated in rollout.is_truncated]
        num_kept = sum(length for length, is_one in zip(lengths, is_kept, strict=True) if is_one)
        has_pull = (advantages.view(len(prompts), -1).abs().amax(1) > 0).tolist()
        chosen = [prompt for prompt in range(len(prompts)) if self.kl_coef > 0 or has_pull[prompt]]
        micro_batches = self.plan_micro_batches(prompts, lengths, chosen, are_known=states is not None)
        return Experience(
            prompts=prompts,
            completions=rollout.completions,
            advantages=to_device(advantages, self.device),
            weights=token_weights(
                to_device(torch.tensor(lengths), self.device),
                loss_type=self.loss_type,
                max_new_tokens=self.max_new_tokens,
                num_tokens=self.mean_over_devices(max(1, num_kept)),
            )
            * to_device(torch.tensor(is_kept), self.device),
            sampled_logprobs=rollout.logprobs,
            micro_batches=micro_batches,
            states=states,
            num_empty_passes=self.num_empty_passes(len(micro_batches)),
        )

    @torch.no_grad()
    def reference_logprobs(self, experience: Experience) -> list[Tensor] | None:
        """[n, T] log-probabilities under the policy before training, per micro-batch; None without KL penalty."""
        if self.kl_coef == 0:
            return None
        context = self.policy.without_adapter() if self.reference is None else nullcontext(self.reference)
        with self.phase("reference"), context as reference, unsharded(reference):
            shared, logprobs = SharedPrompts(reference), []
            for micro_batch in experience.micro_batches:
                prompts, completions = experience.select(micro_batch)
                states = shared.states(prompts, micro_batch)
                logprobs.append(reference(prompts, completions, self.temperature, self.top_p, states))
            return logprobs

    def update(
        self, experience: Experience, reference_logprobs: list[Tensor] | None, old_logprobs: list[Tensor] | None = None
    ) -> tuple[dict[str, float], list[Tensor]]:
        """One optimiser step on the whole experience, micro-batch by micro-batch.

        Args:
            experience: What is learnt from.
            reference_logprobs: Those of `reference_logprobs`.
            old_logprobs: [n, T] of the policy that generated the completions, per micro-batch; None: that as it is now.

        Returns:
            What is logged, and the log-probabilities of the policy before this step, [n, T] per micro-batch.
        """
        sums, all_logprobs = self.accumulate_gradients(experience, reference_logprobs, old_logprobs)
        loss, kl, num_clipped = sums.tolist()  # waits for the device, once
        with self.phase("optimizer"):
            metrics = self.apply_gradients(loss)
        computed = [row for micro_batch in experience.micro_batches for row in micro_batch.rows]
        num_tokens = max(1, sum(len(experience.completions[row]) for row in computed))
        return metrics | {"loss": loss, "kl": kl / num_tokens, "clip_fraction": num_clipped / num_tokens}, all_logprobs

    def accumulate_gradients(
        self, experience: Experience, reference_logprobs: list[Tensor] | None, old_logprobs: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward of every micro-batch; nothing in it waits for the device.

        Returns:
            [3] sums of loss, KL and clipped tokens, and the log-probabilities, [n, T] per micro-batch.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        all_logprobs: list[Tensor] = []
        num_parts, in_one_pass = len(experience.micro_batches), self.exchanges_gradients()
        shared = SharedPrompts(self.policy, known=experience.states, num_parts=num_parts, in_one_pass=in_one_pass)
        for index, micro_batch in enumerate(experience.micro_batches):
            with self.accumulation(is_last=index + 1 == len(experience.micro_batches)):
                prompts, completions = experience.select(micro_batch)
                with self.phase("policy_forward"):
                    states = shared.states(prompts, micro_batch)
                    logprobs = self.policy(prompts, completions, self.temperature, self.top_p, states)  # [n, T]
                all_logprobs.append(logprobs.detach())
                tokens = torch.tensor([len(completion) for completion in completions])
                rows, lengths = (to_device(part, self.device) for part in (torch.tensor(micro_batch.rows), tokens))
                before = all_logprobs[index] if old_logprobs is None else old_logprobs[index]
                is_token = torch.arange(logprobs.shape[1], device=self.device) < lengths[:, None]
                output = grpo_loss(
                    logprobs,
                    before,
                    None if reference_logprobs is None else reference_logprobs[index],
                    advantages=experience.advantages[rows],
                    weights=experience.weights[rows],
                    is_token=is_token,
                    config=self.loss_config,
                    importance_weights=self.importance_weights(experience, micro_batch, before, is_token),
                )
                with self.phase("backward"):
                    for loss in shared.losses(output.loss, micro_batch):
                        self.manual_backward(loss)
                sums += torch.stack([output.loss.detach(), output.kl_sum, output.num_clipped])
        for _ in range(experience.num_empty_passes):
            self.empty_pass(experience.prompts, experience.completions)
        return sums, all_logprobs

    def importance_weights(
        self, experience: Experience, micro_batch: MicroBatch, old_logprobs: Tensor, is_token: Tensor
    ) -> Tensor | None:
        """Those of `sampler_weights` for a micro-batch; None without correction."""
        if self.sampler_correction is None:
            return None
        sampled = pad_sequence([experience.sampled_logprobs[row] for row in micro_batch.rows], batch_first=True)
        cap = self.sampler_correction_cap
        return sampler_weights(old_logprobs, sampled, is_token, correction=self.sampler_correction, cap=cap)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next advantages depend on, besides the counters of the run."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["run"]["advantages"] = self.advantages.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take both up again."""
        super().on_load_checkpoint(checkpoint)
        self.advantages.load_state_dict(checkpoint["run"].get("advantages", {"moments": {}}))

    def log_step(self, found: Round, metrics: Mapping[str, float]) -> None:
        """Reward, every component and task metric, and how the completions are, of all prompts."""
        self.train_metrics.update(found.scored_completions)
        values = {tag: value for tag, value in self.train_metrics.compute().items() if not value.isnan()}
        self.log_dict(values, batch_size=1)
        self.train_metrics.reset()
        if isinstance(self.task, Mixture):  # whose metrics are those of each task
            metrics = {**metrics, "reward": statistics.fmean(found.rewards)}
        self.log_train({**metrics, **sampling_metrics(found, self.engine.knows_entropies)})
