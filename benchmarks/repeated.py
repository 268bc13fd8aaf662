"""What others do, on top of this project's policy: each prompt, with its images, is repeated for every completion.

Rollouts come from `generate` of transformers, log-probabilities from an ordinary padded forward pass. The benchmarks
compare the engine with it; nothing in the package uses it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perception_r1.modules import GRPO
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.logits import process_logits
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import Rollout, SamplingParams


class RepeatedPolicy(Policy):
    """A policy that shares nothing between the completions of a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.set_attn_implementation({"text_config": "sdpa"})

    @property
    def is_vision_frozen(self) -> bool:
        """False: features are not kept either."""
        return False

    def prefill(self, prompts: PromptBatch, states: None = None) -> Any:
        """Nothing is computed ahead."""
        return prompts

    @torch.no_grad()
    def generate(self, prompts: Any, *, group_size: int, params: SamplingParams, seeds: Sequence[int]) -> Rollout:
        """`generate` on repeated prompts; it samples from torch's global random state, seeded with the first seed."""
        rows = _repeat(prompts, group_size)
        torch.manual_seed(seeds[0])
        inputs = self._inputs(rows)
        generated = self.model.generate(
            **inputs,
            do_sample=not params.is_greedy,
            temperature=params.temperature,
            top_k=0,
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            max_new_tokens=params.max_new_tokens,
            suppress_tokens=params.suppress_tokens.tolist(),
            eos_token_id=params.eos_token_ids.tolist(),
            pad_token_id=int(self.eos_token_ids[0]),
        )[:, inputs["input_ids"].shape[1] :].cpu()
        is_end = torch.isin(generated, self.eos_token_ids.cpu())
        has_ended = is_end.any(1)
        lengths = torch.where(has_ended, is_end.int().argmax(1) + 1, generated.shape[1]).tolist()
        completions = [row[:length] for row, length in zip(generated, lengths, strict=True)]
        return Rollout(
            completions=completions,
            logprobs=[torch.zeros(len(row), device=self.device) for row in completions],  # generate does not tell
            is_truncated=(~has_ended).tolist(),
            entropies=[torch.full((len(row),), float("nan"), device=self.device) for row in completions],
        )

    def forward(
        self,
        prompts: PromptBatch,
        completions: Sequence[Tensor],
        temperature: float = 1.0,
        top_p: float = 1.0,
        states: None = None,
    ) -> Tensor:
        """[N, T] log-probabilities from one padded pass over prompt and completion of every row; groups stay whole."""
        rows = _repeat(prompts, len(completions) // len(prompts))
        written = pad_sequence(list(completions), batch_first=True).to(self.device)  # [N, T]
        is_written = pad_sequence([torch.ones_like(row) for row in completions], batch_first=True).to(self.device)
        inputs = self._inputs(rows)
        behind = {
            "input_ids": written,
            "attention_mask": is_written,
            "mm_token_type_ids": torch.zeros_like(written).int(),
        }
        logits = self.model(
            **inputs | {name: torch.cat([inputs[name], values], 1) for name, values in behind.items()},
            logits_to_keep=written.shape[1] + 1,
            use_cache=False,
        ).logits[:, :-1]
        logits = process_logits(
            logits.flatten(0, 1),
            suppress_tokens=self.suppress_tokens,
            temperature=temperature,
            top_p=top_p,
            written=written.flatten(),
        ).view(logits.shape)
        return (logits.gather(-1, written[..., None])[..., 0] - logits.logsumexp(-1)) * is_written

    def _inputs(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """Prompts padded on the left, as transformers takes them."""
        ids = pad_sequence(list(prompts.input_ids), batch_first=True, padding_side="left")
        is_token = [torch.ones_like(row) for row in prompts.input_ids]
        inputs = {
            "input_ids": ids,
            "attention_mask": pad_sequence(is_token, batch_first=True, padding_side="left"),
            "mm_token_type_ids": (ids == self.processor.image_token_id).int(),
            "pixel_values": torch.cat(prompts.pixel_values),
            "image_grid_thw": torch.tensor(prompts.image_grids),
        }
        return {name: value.to(self.device) for name, value in inputs.items()}


class RepeatedGRPO(GRPO):
    """GRPO with that policy."""

    @property
    def computes_alike_in_training(self) -> bool:
        """False: nothing is computed ahead."""
        return False

    def configure_model(self) -> None:
        """Load policy and reference."""
        if not hasattr(self, "policy"):
            self.policy = RepeatedPolicy.load(self.policy_config)
            if self.kl_coef > 0 and self.policy_config.lora is None:
                self.reference = RepeatedPolicy.load(self.policy_config, is_trained=False)


def _repeat(prompts: PromptBatch, times: int) -> PromptBatch:
    return prompts.select([prompt for prompt in range(len(prompts)) for _ in range(times)])
