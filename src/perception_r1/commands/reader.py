"""How a model reads, before its weights are loaded: its codec, its processor, and which samples it cannot take."""

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
    """Codec and processor of a model; the embedded one (None: any other model) is built for the occasion.

    Raises:
        UserError: The model has no usable processor.
    """
    with TemporaryDirectory() as folder:
        name = policy.name if embedded is None else folder
        if embedded is not None:
            build_unwarmed(Path(folder), embedded, data.synthetic(batch_size=1), seed=seed)
        processor = Processor.load(name, min_pixels=policy.min_pixels, max_pixels=policy.max_pixels)
        return CODECS[CODEC_BY_FAMILY[model_family(name)]], processor


def sample_check(processor: Processor, task: Task[Any, Any], max_prompt_length: int | None) -> SampleCheck:
    """Refuses samples whose prompt the model cannot take; for `TaskDataModule.check_sample`."""
    return partial(_check_sample, processor, task, max_prompt_length)


def _check_sample(processor: Processor, task: Task[Any, Any], max_tokens: int | None, sample: Sample[Any]) -> None:
    processor.check_prompt(task.messages(sample), width=sample.width, height=sample.height, max_tokens=max_tokens)
