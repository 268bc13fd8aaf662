"""Pictures to answers: the road of evaluation up to the parse, for pictures that nobody has annotated.

Picture -> sample without target -> policy (greedy) -> completion -> `parse_completion` -> `serialize_prediction`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from perception_r1.data.images import load_image
from perception_r1.errors import UserError
from perception_r1.modules.encoding import encode_prompts
from perception_r1.policy.policy import Policy
from perception_r1.records import LoadedSample, Sample
from perception_r1.task import Task

BATCH_SIZE = 8
"""Pictures answered at once: enough to keep a device busy, few enough for its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What was answered to one picture.

    Attributes:
        sample: The picture, loaded, and the query; it has no target.
        completion: The decoded text, special tokens and end token included.
        prediction: The task's own record of what the text says; None when it is no answer.
        description: The prediction as JSON-ready data, coordinates in pixels of the upright picture.
    """

    sample: LoadedSample[None]
    completion: str
    prediction: Any
    description: Any


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a folder all pictures directly in it, sorted by name.

    Raises:
        UserError: A folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        pictures = sorted(file for file in path.iterdir() if _is_image(file)) if path.is_dir() else [path]
        if not pictures:
            raise UserError(f"there is no picture in the folder {path}")
        found += pictures
    return found


def _is_image(path: Path) -> bool:
    """Whether the name is that of a picture which could be read."""
    form = Image.registered_extensions().get(path.suffix.lower())
    return form in Image.OPEN and path.is_file() and not path.name.startswith(".")


def predict_images(
    policy: Policy, task: Task[Any, Any], paths: Sequence[Path], *, query: str, max_new_tokens: int
) -> Iterator[list[Answer | UserError]]:
    """Greedy answers in batches, in the order of the pictures; an error stands for a picture without one.

    Args:
        policy: In evaluation mode.
        task: What to ask, and how to read the answer.
        paths: The pictures.
        query: What fills the slot of the task's prompt.
        max_new_tokens: Longest completion, end token included.
    """
    for start in range(0, len(paths), BATCH_SIZE):
        loaded = [_sample(path, query) for path in paths[start : start + BATCH_SIZE]]
        samples = [sample for sample in loaded if isinstance(sample, Sample)]
        answers = iter(_answer(policy, task, samples, max_new_tokens))
        yield [next(answers) if isinstance(sample, Sample) else sample for sample in loaded]


def _sample(path: Path, query: str) -> LoadedSample[None] | UserError:
    try:
        image = load_image(path)
    except UserError as error:
        return error
    return Sample(id=str(path), image=image, width=image.width, height=image.height, query=query, target=None)


def _answer(
    policy: Policy, task: Task[Any, Any], samples: Sequence[LoadedSample[None]], max_new_tokens: int
) -> list[Answer | UserError]:
    """Answers to loaded pictures; when some picture is not for this model, each of them is asked about alone."""
    if not samples:
        return []
    try:
        prompts = encode_prompts(policy, task, samples)
    except UserError as error:
        if len(samples) == 1:
            return [UserError(f"{samples[0].id}: {error}")]
        return [answer for sample in samples for answer in _answer(policy, task, [sample], max_new_tokens)]
    rollout = policy.generate(
        policy.prefill(prompts), group_size=1, max_new_tokens=max_new_tokens, seeds=[0] * len(samples), is_greedy=True
    )
    answers: list[Answer | UserError] = []
    completions = policy.processor.decode(rollout.completions)
    for sample, image_size, completion in zip(samples, prompts.image_sizes, completions, strict=True):
        prediction = task.parse_completion(completion, policy.codec, image_size)
        description = task.serialize_prediction(prediction, image_size)
        answers.append(Answer(sample=sample, completion=completion, prediction=prediction, description=description))
    return answers
