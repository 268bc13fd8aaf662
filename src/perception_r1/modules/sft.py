"""Supervised fine-tuning as a LightningModule: the same data, prompts and codecs, loss on the answer's tokens only.

It is the paper's SFT baseline.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from perception_r1.data.loading import Batch
from perception_r1.modules.base import PolicyModule
from perception_r1.modules.encoding import encode_targets
from perception_r1.policy.batch import PromptBatch


class SFT(PolicyModule):
    """Teach the ideal answers by cross-entropy, averaged over all answer tokens of a batch, on all devices together."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Cross-entropy of the ideal answers, one optimiser step."""
        started = time.perf_counter() - batch.seconds
        self.count_seconds("data", batch.seconds)
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)  # dropout of an adapter, if any
        with self.phase("encode"):
            prompts = self.encode(batch)
            answers = encode_targets(self.policy, self.task, batch.samples, prompts)
        total = float(self.accumulate_gradients(prompts, answers))  # waits for the device, once
        with self.phase("optimizer"):
            metrics = self.apply_gradients(total)
        self.log_train(
            metrics
            | {
                "loss": total,
                "answer_length": sum(map(len, answers)) / len(batch),
                "seconds/step": time.perf_counter() - started,
            }
        )

    def accumulate_gradients(self, prompts: PromptBatch, answers: Sequence[Tensor]) -> Tensor:
        """Forward and backward of every micro-batch; the sum of their losses, for which nothing has to wait."""
        lengths = [len(answer) for answer in answers]
        num_tokens = self.mean_over_devices(sum(lengths))
        micro_batches = self.plan_micro_batches(prompts, lengths, range(len(prompts)))
        num_empty_passes = self.num_empty_passes(len(micro_batches))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            with self.accumulation(is_last=index + 1 == len(micro_batches)):
                with self.phase("policy_forward"):
                    rows = [answers[row] for row in micro_batch.rows]
                    loss = -self.policy(prompts.select(micro_batch.prompts), rows).sum() / num_tokens
                with self.phase("backward"):
                    self.manual_backward(loss)
                total += loss.detach()
        for _ in range(num_empty_passes):
            self.empty_pass(prompts, answers)
        return total
