"""From a completion to its score: the one place where model text is read, in training, evaluation and offline.

completion --parse_completions--> prediction --score_prediction--> Score
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from perception_r1.codecs import Codec
from perception_r1.records import ImageSize, Sample, Score
from perception_r1.task import MAX_TEXT, AnyTask, Task, task_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedCompletion:
    """One completion and what it says.

    Attributes:
        sample: The sample it answers.
        image_size: The sizes of the sample's image.
        completion: The decoded text, special tokens and end token included.
        prediction: The task's own record of what the text says; None when it is no answer.
        num_tokens: Length of the completion in tokens, its end token included; 0 where only text is at hand.
        is_truncated: The completion ran into the length limit before an end token.
    """

    sample: Sample[Any]
    image_size: ImageSize
    completion: str
    prediction: Any
    num_tokens: int = 0
    is_truncated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredCompletion(ParsedCompletion):
    """One completion and everything that is known about it: its score holds reward, components and metrics."""

    score: Score


def parse_completions(
    task: AnyTask,
    codec: Codec,
    *,
    samples: Sequence[Sample[Any]],
    image_sizes: Sequence[ImageSize],
    completions: Sequence[str],
    lengths: Sequence[int] | None = None,
    truncated: Sequence[bool] | None = None,
) -> list[ParsedCompletion]:
    """Read completions; the sequences run in parallel, one entry per completion.

    Raises:
        ValueError: The sequences differ in length.
    """
    count = len(completions)
    columns = samples, image_sizes, completions, lengths or [0] * count, truncated or [False] * count
    return [
        ParsedCompletion(
            sample=sample,
            image_size=image_size,
            completion=completion,
            prediction=task_of(task, sample).parse_completion(completion, codec, image_size),
            num_tokens=num_tokens,
            is_truncated=is_truncated,
        )
        for sample, image_size, completion, num_tokens, is_truncated in zip(*columns, strict=True)
    ]


def score_prediction(task: Task[Any, Any], prediction: Any, target: Any, *, is_evaluation: bool = False) -> Score:
    """The score of one prediction; in evaluation its metrics include the task's `eval_metrics`."""
    score = task.score(prediction, target)
    if is_evaluation:
        score = replace(score, metrics={**score.metrics, **task.eval_metrics(prediction, target)})
    return score


def score_completions(
    task: AnyTask, completions: Sequence[ParsedCompletion], *, is_evaluation: bool = False
) -> list[ScoredCompletion]:
    """Score completions against the targets of their samples; see `score_prediction`."""
    return [
        ScoredCompletion(
            **{field.name: getattr(parsed, field.name) for field in fields(ParsedCompletion)},
            score=score_prediction(
                task_of(task, parsed.sample), parsed.prediction, parsed.sample.target, is_evaluation=is_evaluation
            ),
        )
        for parsed in completions
    ]


def prefix_rewards(task: AnyTask, codec: Codec, completion: ParsedCompletion) -> list[tuple[int, float]]:
    """Rewards of what a completion has said so far, with where in its text: before its first box and behind each.

    Their differences are what each box has added.
    """
    own = task_of(task, completion.sample)
    prefixes = own.parse_prefixes(completion.completion, codec, completion.image_size)
    return [(end, own.score(prediction, completion.sample.target).reward) for end, prediction in prefixes]


def score_as_published(task: AnyTask, codec: Codec, completions: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
    """Scored completions of an evaluation as the code behind published metrics scores them."""
    return [_score_as_published(task_of(task, scored.sample), codec, scored) for scored in completions]


def _score_as_published(task: Task[Any, Any], codec: Codec, scored: ScoredCompletion) -> ScoredCompletion:
    text = scored.completion
    prediction = task.parse_published(text, codec, scored.image_size) if len(text) <= MAX_TEXT else None
    if prediction == scored.prediction:
        return scored
    score = score_prediction(task, prediction, scored.sample.target, is_evaluation=True)
    return replace(scored, prediction=prediction, score=score)
