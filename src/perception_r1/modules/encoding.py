"""Samples of a task as the policy reads and learns them; the policy itself knows chats, images and texts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.policy import Policy
from perception_r1.records import LoadedSample
from perception_r1.task import AnyTask, task_of


def encode_prompts(policy: Policy, task: AnyTask, samples: Sequence[LoadedSample[Any]]) -> PromptBatch:
    """Prompts for samples whose images are loaded; raises as `Policy.encode` does."""
    chats = [task_of(task, sample).messages(sample) for sample in samples]
    return policy.encode(chats, [[sample.image] for sample in samples])


def encode_targets(
    policy: Policy, task: AnyTask, samples: Sequence[LoadedSample[Any]], prompts: PromptBatch
) -> list[Tensor]:
    """Token ids of the ideal answer to each of these prompts; raises as `Policy.encode_targets` does."""
    pairs = zip(samples, prompts.image_sizes, strict=True)
    return policy.encode_targets(
        [task_of(task, sample).target_text(sample, policy.codec, image_size) for sample, image_size in pairs]
    )
