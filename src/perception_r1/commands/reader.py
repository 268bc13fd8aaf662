"""How a model reads, before its weights are loaded: its codec, its processor, and which prompts it cannot take."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perception_r1.codecs import CODECS, Codec
from perception_r1.data.module import TaskDataModule
from perception_r1.data.samples import SampleCheck
from perception_r1.embedded.warmup import EmbeddedConfig, build_unwarmed
from perception_r1.policy.load import CODEC_BY_FAMILY, PolicyConfig, model_family
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample
from perception_r1.task import Task


def load_reader(
    policy: PolicyConfig, embedded: EmbeddedConfig | None, data: TaskDataModule, *, seed: int
) -> tuple[Codec, Processor]:
    """Codec and processor of a model.

    Args:
        policy: The model.
        embedded: The embedded policy, which is built for the occasion; None for any other model.
        data: The data module, whose synthetic scenes make the vocabulary of the embedded policy.
        seed: Of the embedded policy.

    Raises:
        UserError: The model has no usable processor.
    """
    with TemporaryDirectory() as folder:
        name = policy.name
        if embedded is not None:
            name = folder
            build_unwarmed(Path(folder), embedded, data.synthetic(batch_size=1), seed=seed)
        processor = Processor.load(name, min_pixels=policy.min_pixels, max_pixels=policy.max_pixels)
        return CODECS[CODEC_BY_FAMILY[model_family(name)]], processor


def sample_check(processor: Processor, task: Task[Any, Any], max_prompt_length: int | None) -> SampleCheck:
    """A check of samples for `TaskDataModule.check_sample`: refuses those whose prompt the model cannot take."""
    return partial(_check_sample, processor, task, max_prompt_length)


def _check_sample(
    processor: Processor, task: Task[Any, Any], max_prompt_length: int | None, sample: Sample[Any]
) -> None:
    chat = task.messages(sample)
    processor.check_prompt(chat, width=sample.width, height=sample.height, max_tokens=max_prompt_length)
