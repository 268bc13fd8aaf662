"""Supervised fine-tuning as a LightningModule: the same data, prompts and codecs, loss on the answer's tokens only.

It warms the embedded policy up and is the paper's SFT baseline.
"""

import time
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from perception_r1.errors import UserError
from perception_r1.modules.base import PolicyModule, ScheduleConfig
from perception_r1.policy.load import PolicyConfig
from perception_r1.records import Sample
from perception_r1.task import Task


class SFT(PolicyModule):
    """Teach the ideal answers by cross-entropy, averaged over all answer tokens of a batch.

    Args:
        task: The task of the data module; the command line hands it over.
        policy: Which model is trained, and what of it.
        optimizer: Optimiser of the trainable weights.
        schedule: Learning rate over the steps.
        max_new_tokens: Longest completion in validation, end token included.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_batch_size: Samples computed at once; null: the whole batch. It changes memory, not results.
        seed: Seed of dropout; a resumed run continues its sequence.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        schedule: ScheduleConfig,
        max_new_tokens: int = 768,
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
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError("micro_batch_size must be 1 or more.")
        self.micro_batch_size = micro_batch_size

    def training_step(self, batch: list[Sample[Any]], batch_idx: int) -> None:
        """Cross-entropy of the ideal answers, one optimiser step."""
        started = time.perf_counter()
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)  # dropout of an adapter, if any
        with self.phase("encode"):
            prompts = self.policy.encode(self.task, batch)
            answers = self.policy.encode_answers(self.task, batch, prompts)
        num_tokens = sum(len(answer) for answer in answers)
        size = self.micro_batch_size or len(batch)
        total = 0.0
        for start in range(0, len(batch), size):
            chosen = range(start, min(start + size, len(batch)))
            with self.phase("policy_forward"):
                logprobs = self.policy(prompts.select(chosen), answers[start : start + size])
                loss = -logprobs.sum() / num_tokens
            with self.phase("backward"):
                self.manual_backward(loss)
            total += float(loss.detach())
        with self.phase("optimizer"):
            figures = self.apply_gradients(total)
        self.log_train(
            figures
            | {
                "loss": total,
                "answer_length": num_tokens / len(batch),
                "seconds/step": time.perf_counter() - started,
            }
        )
