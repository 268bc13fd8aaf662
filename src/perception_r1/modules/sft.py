"""Supervised fine-tuning as a LightningModule: the same data, prompts and codecs, loss on the answer's tokens only.

It warms the embedded policy up and is the paper's SFT baseline.
"""

import time
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from perception_r1.modules.base import LRSchedulerConfig, PolicyModule
from perception_r1.modules.encoding import encode_prompts, encode_targets
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.packing import plan_micro_batches
from perception_r1.records import LoadedSample
from perception_r1.task import Task


class SFT(PolicyModule):
    """Teach the ideal answers by cross-entropy, averaged over all answer tokens of a batch.

    Args:
        task: The task of the data module; the command line hands it over.
        policy: Which model is trained, and what of it.
        optimizer: Optimiser of the trainable weights.
        lr_scheduler: Learning rate over the steps.
        max_new_tokens: Longest completion in validation, end token included.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_batch_tokens: Tokens of prompts and answers computed at once; null: the whole batch. It changes memory,
            not results.
        eval_batch_tokens: Places for tokens of prompts and completions that an evaluation holds at once; null: the
            whole batch of the data module.
        seed: Seed of dropout; a resumed run continues its sequence.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerConfig,
        max_new_tokens: int = 768,
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

    def training_step(self, batch: list[LoadedSample[Any]], batch_idx: int) -> None:
        """Cross-entropy of the ideal answers, one optimiser step."""
        started = time.perf_counter()
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)  # dropout of an adapter, if any
        with self.phase("encode"):
            prompts = encode_prompts(self.policy, self.task, batch)
            answers = encode_targets(self.policy, self.task, batch, prompts)
        lengths = [len(answer) for answer in answers]
        micro_batches = plan_micro_batches(prompts.lengths, lengths, range(len(batch)), self.micro_batch_tokens)
        total = 0.0
        for index, micro_batch in enumerate(micro_batches):
            with self.accumulation(is_last=index + 1 == len(micro_batches)):
                with self.phase("policy_forward"):
                    logprobs = self.policy(
                        prompts.select(micro_batch.prompts), [answers[row] for row in micro_batch.rows]
                    )
                    loss = -logprobs.sum() / sum(lengths)
                with self.phase("backward"):
                    self.manual_backward(loss)
            total += float(loss.detach())
        with self.phase("optimizer"):
            metrics = self.apply_gradients(total)
        self.log_train(
            metrics
            | {
                "loss": total,
                "answer_length": sum(lengths) / len(batch),
                "seconds/step": time.perf_counter() - started,
            }
        )
