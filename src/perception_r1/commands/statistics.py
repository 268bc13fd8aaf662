"""What a data set is to a model: sizes, tokens, objects, and in how many ways its objects can be matched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import gammaln, logsumexp

from perception_r1.codecs import Codec
from perception_r1.data.sources import Source
from perception_r1.errors import UserError
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample, Split
from perception_r1.task import Task


@dataclass(kw_only=True, slots=True)
class DatasetStatistics:
    """Numbers about samples, one entry per sample unless said otherwise.

    Attributes:
        widths: Of the images, in pixels.
        heights: Of the images, in pixels.
        images: Names of the different images.
        prompt_tokens: Of the prompts, images included.
        answer_tokens: Of the ideal answers, end token included; only of samples that have one.
        num_objects: Objects to match.
        num_refused: Samples whose image the model cannot take.
        num_without_answer: Samples whose data does not say enough for an answer (a count without points).
    """

    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    prompt_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    num_objects: list[int] = field(default_factory=list)
    num_refused: int = 0
    num_without_answer: int = 0


def collect_statistics(
    samples: Iterable[Sample[Any]], task: Task[Any, Any], codec: Codec, processor: Processor
) -> DatasetStatistics:
    """Go through samples once; no image is opened."""
    found = DatasetStatistics()
    for sample in samples:
        found.widths.append(sample.width)
        found.heights.append(sample.height)
        found.images.add(sample.id if isinstance(sample.image, Image.Image) else str(sample.image))
        found.num_objects.append(task.num_objects(sample.target))
        try:
            image_size = processor.image_size(sample.width, sample.height)
            found.prompt_tokens.append(processor.num_prompt_tokens(task.messages(sample), image_size))
        except UserError:
            found.num_refused += 1
            continue
        try:
            answer = task.target_text(sample, codec, image_size)
            found.answer_tokens.append(len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1)
        except UserError:
            found.num_without_answer += 1
    return found


def shared_images(sources: Mapping[Split, Mapping[str, Source]]) -> list[str]:
    """Sentences about images that are trained and also validated or tested on; an image is known by its file.

    Args:
        sources: Of each split, by name.
    """
    trained = {name: _files(source) for name, source in sources.get("train", {}).items()}
    others = [(split, *item) for split, named in sources.items() if split != "train" for item in named.items()]
    sentences = []
    for split, name, source in others:
        images = _files(source)
        for trained_name, known in trained.items():
            if shared := len(images & known):
                of = f"{shared} of the {len(images)} images of {name or 'the file'} ({split})"
                sentences.append(f"{of} are in {trained_name or 'the file'} (train) too")
    return sentences


def _files(source: Source) -> set[Path]:
    return {row.image for row in source if isinstance(row.image, Path)}


def spread(values: Sequence[int]) -> str:
    """Least, median and most.

    >>> spread([3, 1, 2])
    '1, 2, 3'
    """
    return f"{min(values)}, {median(values):g}, {max(values)}" if values else "-"


def share_over(values: Sequence[int], limit: int | None) -> float | None:
    """Share of values over a limit; None without a limit or values.

    >>> share_over([1, 2, 3, 4], 3)
    0.25
    """
    return sum(value > limit for value in values) / len(values) if values and limit is not None else None


def log10_mean_factorial(counts: Sequence[int]) -> float:
    """log10 of the mean of n! over the counts: the paper's perceptual perplexity, which overflows as a number.

    >>> round(10 ** log10_mean_factorial([3, 4]))
    15
    """
    return float((logsumexp(gammaln(np.add(counts, 1))) - np.log(len(counts))) / np.log(10))
