"""The rewards of this project for other trainers, as functions of the form that these call.

    from perception_r1.rewards import trl_reward, verl_reward

    reward = trl_reward("grounding", codec="qwen2_5_vl", iou_weight=2.0)  # GRPOTrainer(reward_funcs=[reward])
    compute_score = verl_reward("grounding", codec="qwen2_5_vl")  # in the file of custom_reward_function.path

What is right is told by the keys of the data format (`rows.py`): as columns of the data set for TRL, as the ground
truth for verl. The road from text to reward is that of training and evaluation here (`scoring.py`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from perception_r1.codecs import Codec
from perception_r1.data.images import ImageError, check_image
from perception_r1.errors import UserError
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, ImageSource, Sample, UnloadedSample
from perception_r1.rows import Row, RowError
from perception_r1.scoring import ScoredCompletion, parse_completions, score_completions
from perception_r1.task import Task
from perception_r1.tasks import TASKS

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
"""Least and most pixels after smart-resize, as the models' own processors have them."""
_TEXT_ONLY = {"text"}
"""Keys of rows that hold no coordinates; a task with no others can do without the size of the image."""
_IMAGE_COLUMNS = ("image", "images")


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool) -> list[str]:
        """Texts of sequences of token ids."""


class RowScorer:
    """Scores completions against rows of the data format; no model is needed.

    Args:
        task: The task that reads the rows.
        codec: How the model family writes boxes.
        min_pixels: Least pixels of a resized image; it matters where boxes are in pixels of that.
        max_pixels: Most pixels of a resized image.

    Raises:
        UserError: The bounds contradict each other.
    """

    def __init__(
        self, task: Task[Any, Any], codec: Codec, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
    ) -> None:
        if not 0 < min_pixels <= max_pixels:
            raise UserError(f"min_pixels must be from 1 to max_pixels, not {min_pixels} with {max_pixels}")
        self.task, self.codec = task, codec
        self._bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}

    def read(
        self, values: Mapping[str, object], *, image: ImageSource | None = None, name: str = "1"
    ) -> tuple[UnloadedSample[Any], ImageSize]:
        """Sample and sizes of the image of a row.

        Args:
            values: The row; with "width" and "height" its image is not opened.
            image: Where its image is.
            name: Its id, where it has none.

        Raises:
            RowError: A key is missing or wrong.
            ImageError: The image cannot be read.
        """
        image_size = self._image_size(values, image)
        query, target = self.task.read_row(Row(values, width=image_size.width, height=image_size.height))
        sample = Sample(
            id=str(values.get("id", name)),
            image=image or Path(),  # never opened: the size is known
            width=image_size.width,
            height=image_size.height,
            query=query,
            target=target,
            source=str(values.get("source") or ""),
        )
        return sample, image_size

    def score(
        self, samples: Sequence[tuple[UnloadedSample[Any], ImageSize]], completions: Sequence[str]
    ) -> list[ScoredCompletion]:
        """Scores of completions, one for each of what `read` has found, with the metrics of evaluation."""
        parsed = parse_completions(
            self.task,
            self.codec,
            samples=[sample for sample, _ in samples],
            image_sizes=[image_size for _, image_size in samples],
            completions=completions,
        )
        return score_completions(self.task, parsed, is_evaluation=True)

    def _image_size(self, row: Mapping[str, object], image: ImageSource | None) -> ImageSize:
        """Sizes of the image: from "width" and "height", else from its file."""
        has_coordinates = not set(self.task.row_keys) <= _TEXT_ONLY
        values = Row(row, width=1, height=1)
        if "width" in values or "height" in values:
            width, height = values.integer("width", minimum=1), values.integer("height", minimum=1)
        elif not has_coordinates:
            width = height = 1
        elif image is not None:
            width, height = check_image(image)
        else:
            raise RowError("width: is missing, the row needs width and height, or an image to take them from")
        resized_width, resized_height = width, height
        if "resized_width" in values or "resized_height" in values:  # written by an evaluation, which knows
            resized_width = values.integer("resized_width", minimum=1)
            resized_height = values.integer("resized_height", minimum=1)
        elif self.codec.uses_resized_size and has_coordinates:
            # imported here, as it takes seconds that the other codecs need not wait
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

            try:
                resized_height, resized_width = smart_resize(height, width, **self._bounds)
            except ValueError as error:
                raise RowError(f"width: does not go with this height ({error})") from error
        return ImageSize(width=width, height=height, resized_width=resized_width, resized_height=resized_height)


def trl_reward(
    task: str,
    *,
    codec: str,
    tokenizer: Tokenizer | None = None,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> Callable[..., list[float]]:
    """A reward function for TRL's `GRPOTrainer(reward_funcs=[...])`.

    The data set has the keys of the data format as columns, besides "width" and "height" or an image column.

    Args:
        task: Name of the task, which is also the name of the function.
        codec: How the model family writes boxes: qwen2_vl, qwen2_5_vl, qwen3_vl, internvl or gemma3.
        tokenizer: That of the model. TRL hands over texts without special tokens, of which Qwen2-VL's boxes are made;
            with a tokenizer they are decoded from the token ids once more.
        min_pixels: Least pixels of a resized image; it matters for qwen2_5_vl, whose boxes are in these pixels.
        max_pixels: Most pixels of a resized image.
        **options: Of the task (`iou_weight=2.0`, `think=True`).

    Raises:
        UserError: A name is unknown, or an option wrong.
    """
    scorer = _scorer(task, codec, options, min_pixels=min_pixels, max_pixels=max_pixels)

    def reward(completions: Sequence[Any], completion_ids: Any = None, **columns: Any) -> list[float]:
        """Rewards of completions.

        Raises:
            UserError: A row lacks what the task needs, and which.
        """
        texts = [_text(completion) for completion in completions]
        if tokenizer is not None and completion_ids is not None:
            texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=False)
        lists = {name: column for name, column in columns.items() if isinstance(column, list)}
        rows = [{name: column[index] for name, column in lists.items()} for index in range(len(texts))]
        samples = [_read(scorer, row, f"completion {number}") for number, row in enumerate(rows, 1)]
        return [scored.score.reward for scored in scorer.score(samples, texts)]

    reward.__name__ = task
    return reward


def verl_reward(
    task: str, *, codec: str, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS, **options: Any
) -> Callable[..., dict[str, float]]:
    """A `compute_score` for verl's `custom_reward_function`.

    The ground truth of an entry is a row of the data format with "width" and "height", as an object or as its JSON.

    Args:
        task: Name of the task.
        codec: How the model family writes boxes: qwen2_vl, qwen2_5_vl, qwen3_vl, internvl or gemma3.
        min_pixels: Least pixels of a resized image; it matters for qwen2_5_vl, whose boxes are in these pixels.
        max_pixels: Most pixels of a resized image.
        **options: Of the task (`iou_weight=2.0`, `think=True`).

    Raises:
        UserError: A name is unknown, or an option wrong.
    """
    scorer = _scorer(task, codec, options, min_pixels=min_pixels, max_pixels=max_pixels)

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """The reward as "score", with its components and the metrics of the task.

        Raises:
            UserError: The ground truth lacks what the task needs, and which.
        """
        try:
            row = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
        except ValueError as error:
            raise UserError(f"the ground truth of {data_source} must be a JSON object ({error})") from error
        if not isinstance(row, Mapping):
            raise UserError(f"the ground truth of {data_source} must be a JSON object")
        (scored,) = scorer.score([_read(scorer, row, f"the ground truth of {data_source}")], [solution_str])
        components = {f"reward/{name}": value for name, value in scored.score.components.items()}
        return {"score": scored.score.reward, **components, **scored.score.metrics}

    return compute_score


def _scorer(task: str, codec: str, options: Mapping[str, Any], **bounds: int) -> RowScorer:
    for name, value, known in (("task", task, TASKS), ("codec", codec, CODECS)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    try:
        return RowScorer(TASKS[task](**options), CODECS[codec], **bounds)
    except TypeError as error:
        raise UserError(f"the task {task} has no such option ({error})") from error


def _read(scorer: RowScorer, row: Mapping[str, Any], name: str) -> tuple[UnloadedSample[Any], ImageSize]:
    """Read a row of another trainer, whose image may be there as a picture."""
    found: Any = next((row[column] for column in _IMAGE_COLUMNS if row.get(column) is not None), None)
    picture = found[0] if isinstance(found, list) and found else found
    values = {key: value for key, value in row.items() if key not in _IMAGE_COLUMNS}
    if "width" not in values and isinstance(picture, Image.Image):
        values |= dict(zip(("width", "height"), picture.size, strict=True))
    try:
        return scorer.read(values, image=Path(picture) if isinstance(picture, str) else None)
    except (RowError, ImageError) as error:
        raise UserError(f"{name}: {error}") from error


def _text(completion: Any) -> str:
    """The text of a completion, which may be a chat whose last turn it is."""
    return str(completion if isinstance(completion, str) else completion[-1]["content"])
