"""From a completion to its score: the one place where model text is judged, in training, validation and offline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perception_r1.codecs import Codec
from perception_r1.records import Frame, Sample, Score
from perception_r1.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One completion and everything that is known about it.

    Attributes:
        sample: The sample it answers.
        frame: The sizes of the sample's image.
        completion: The decoded text, special tokens and end token included.
        prediction: The task's own record of what the text says; None when it is no answer.
        score: Reward, terms and figures.
        num_tokens: Length of the completion in tokens, its end token included; 0 where only text is at hand.
        is_truncated: The completion ran into the length limit before an end token.
    """

    sample: Sample[Any]
    frame: Frame
    completion: str
    prediction: Any
    score: Score
    num_tokens: int = 0
    is_truncated: bool = False


def judge(
    task: Task[Any, Any],
    codec: Codec,
    *,
    samples: Sequence[Sample[Any]],
    frames: Sequence[Frame],
    completions: Sequence[str],
    lengths: Sequence[int] | None = None,
    truncated: Sequence[bool] | None = None,
    is_evaluation: bool = False,
) -> list[Outcome]:
    """Parse and score completions; the sequences run in parallel, one entry per completion.

    In evaluation the scores also hold the task's `evaluation_figures`.

    Raises:
        ValueError: The sequences differ in length.
    """
    count = len(completions)
    outcomes = []
    for sample, frame, completion, num_tokens, is_truncated in zip(
        samples, frames, completions, lengths or [0] * count, truncated or [False] * count, strict=True
    ):
        prediction = task.parse(completion, codec, frame)
        score = task.score(prediction, sample.target)
        if is_evaluation:
            score = replace(score, figures={**score.figures, **task.evaluation_figures(prediction, sample.target)})
        outcomes.append(
            Outcome(
                sample=sample,
                frame=frame,
                completion=completion,
                prediction=prediction,
                score=score,
                num_tokens=num_tokens,
                is_truncated=is_truncated,
            )
        )
    return outcomes
