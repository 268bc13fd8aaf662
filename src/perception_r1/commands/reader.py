"""How a model reads, before its weights are loaded: its codec, its processor, and which samples it cannot take."""

from functools import partial
from typing import Any

from perception_r1.codecs import Codec
from perception_r1.data.samples import SampleCheck
from perception_r1.policy.load import PolicyConfig, load_processor, model_family
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample
from perception_r1.task import Task


def load_reader(policy: PolicyConfig) -> tuple[Codec, Processor]:
    """Codec and processor of a model.

    Raises:
        UserError: The model has no usable processor.
    """
    processor = load_processor(policy.name, min_pixels=policy.min_pixels, max_pixels=policy.max_pixels)
    return model_family(policy.name).codec, processor


def sample_check(processor: Processor, task: Task[Any, Any], max_prompt_length: int | None) -> SampleCheck:
    """Refuses samples whose prompt the model cannot take; for `TaskDataModule.check_sample`."""
    return partial(_check_sample, processor, task, max_prompt_length)


def _check_sample(processor: Processor, task: Task[Any, Any], max_tokens: int | None, sample: Sample[Any]) -> None:
    processor.check_prompt(task.messages(sample), width=sample.width, height=sample.height, max_tokens=max_tokens)
