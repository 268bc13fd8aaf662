"""Samples as prompts, without a model: what workers do ahead of a step, and the module itself where there are none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perception_r1.data.loading import load_sample_image
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample
from perception_r1.task import AnyTask, task_of


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEncoder:
    """Makes prompts of samples, the same in every process.

    Attributes:
        processor: That of the model.
        task: The task or tasks of the samples.
        max_prompt_length: Longest prompt in tokens; None takes any.
    """

    processor: Processor
    task: AnyTask
    max_prompt_length: int | None = None

    def __call__(self, samples: Sequence[Sample[Any]]) -> PromptBatch:
        """Prompts as `Processor.encode_bytes` makes them; images that are not loaded are read, and not kept.

        Raises:
            UserError: An image cannot be read, or a prompt is too long.
        """
        return self.processor.encode_bytes(
            [task_of(self.task, sample).messages(sample) for sample in samples],
            [[load_sample_image(sample).image] for sample in samples],
            max_tokens=self.max_prompt_length,
        )
