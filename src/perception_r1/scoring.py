"""From a completion to its score: the one place where model text is scored, in training, validation and offline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perception_r1.codecs import Codec
from perception_r1.records import ImageSize, Sample, Score
from perception_r1.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredCompletion:
    """One completion and everything that is known about it.

    Attributes:
        sample: The sample it answers.
        image_size: The sizes of the sample's image.
        completion: The decoded text, special tokens and end token included.
        prediction: The task's own record of what the text says; None when it is no answer.
        score: Reward, components and metrics.
        num_tokens: Length of the completion in tokens, its end token included; 0 where only text is at hand.
        is_truncated: The completion ran into the length limit before an end token.
    """

    sample: Sample[Any]
    image_size: ImageSize
    completion: str
    prediction: Any
    score: Score
    num_tokens: int = 0
    is_truncated: bool = False


def score_completions(
    task: Task[Any, Any],
    codec: Codec,
    *,
    samples: Sequence[Sample[Any]],
    image_sizes: Sequence[ImageSize],
    completions: Sequence[str],
    lengths: Sequence[int] | None = None,
    truncated: Sequence[bool] | None = None,
    is_evaluation: bool = False,
) -> list[ScoredCompletion]:
    """Parse and score completions; the sequences run in parallel, one entry per completion.

    In evaluation the scores also hold the task's `eval_metrics`.

    Raises:
        ValueError: The sequences differ in length.
    """
    count = len(completions)
    scored_completions = []
    for sample, image_size, completion, num_tokens, is_truncated in zip(
        samples, image_sizes, completions, lengths or [0] * count, truncated or [False] * count, strict=True
    ):
        prediction = task.parse_completion(completion, codec, image_size)
        score = task.score(prediction, sample.target)
        if is_evaluation:
            score = replace(score, metrics={**score.metrics, **task.eval_metrics(prediction, sample.target)})
        scored_completions.append(
            ScoredCompletion(
                sample=sample,
                image_size=image_size,
                completion=completion,
                prediction=prediction,
                score=score,
                num_tokens=num_tokens,
                is_truncated=is_truncated,
            )
        )
    return scored_completions
