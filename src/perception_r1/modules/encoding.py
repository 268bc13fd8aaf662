"""Samples of a task as the policy reads and learns them; the policy itself knows chats, images and texts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from perception_r1.data.encoding import PromptEncoder
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.policy import Policy
from perception_r1.records import Sample
from perception_r1.task import AnyTask, task_of


def prompt_encoder(policy: Policy, task: AnyTask) -> PromptEncoder:
    """How samples of a task become prompts of a policy."""
    return PromptEncoder(processor=policy.processor, task=task, max_prompt_length=policy.max_prompt_length)


def encode_prompts(policy: Policy, task: AnyTask, samples: Sequence[Sample[Any]]) -> PromptBatch:
    """Prompts for samples, on the policy's device; raises as `PromptEncoder` does."""
    return policy.receive(prompt_encoder(policy, task)(samples))


def encode_targets(policy: Policy, task: AnyTask, samples: Sequence[Sample[Any]], prompts: PromptBatch) -> list[Tensor]:
    """Token ids of the ideal answer to each of these prompts; raises as `Policy.encode_targets` does."""
    pairs = zip(samples, prompts.image_sizes, strict=True)
    return policy.encode_targets(
        [task_of(task, sample).target_text(sample, policy.codec, image_size) for sample, image_size in pairs]
    )
