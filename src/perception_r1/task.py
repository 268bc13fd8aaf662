"""What a perception task is: the interface that every task implements.

Sample --messages--> prompt --(policy)--> completion --parse--> Prediction | None --score--> Score

A run may train several of them: then the name of a sample's source tells to which one it belongs (`Mixture`).
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

from torchmetrics import Metric

from perception_r1.codecs import Codec, ParsedBoxes
from perception_r1.errors import UserError
from perception_r1.records import ImageSize, Overlay, Sample, Score, TargetT
from perception_r1.rows import Row

MAX_TEXT = 32_768
"""Longest completion, in characters, that is read; a full page of dense text is about 10,000."""

_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<eos>", "<|user|>")
_SLOT, _ANY_SLOT = re.compile(r"\{query\}|\{labels\}"), re.compile(r"\{\w+\}")
_ANSWER = re.compile(r"</think>\s*<answer>")
THINK_REQUEST = (
    " First think about the picture between <think> and </think>, then give the final answer between <answer> and"
    " </answer>."
)

PredictionT = TypeVar("PredictionT")


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[TargetT, PredictionT]):
    """One perception task. A subclass is a frozen dataclass whose fields are the options of the command line.

    Attributes:
        think: Ask for `<think>...</think><answer>...</answer>` and read the answer inside the tags.
        prompt_template: The user's text, without the image. `{query}` stands for the query, `{labels}` for the names
            that objects may have.
    """

    think: bool = False
    prompt_template: str = "{query}"

    name: ClassVar[str]
    """Lower-case name: the folder under logs/, the value of `--task`."""
    component_names: ClassVar[tuple[str, ...]]
    """Names of `Score.components`, complete and in the order in which they are shown."""
    metric_names: ClassVar[tuple[str, ...]]
    """Names of `Score.metrics`."""
    primary_metric: ClassVar[str]
    """The metric that ranks checkpoints; higher is better."""
    published_metric_names: ClassVar[tuple[str, ...]] = ()
    """Names, as in `make_metrics`, of those that are published; they are computed from `parse_published`."""
    row_keys: ClassVar[tuple[str, ...]]
    """Keys of the task's own data rows besides image, width, height and id, for documentation and messages."""

    def __post_init__(self) -> None:
        """Check the options that all tasks have.

        Raises:
            UserError: The template has a slot that nothing fills.
        """
        unknown = [slot for slot in _ANY_SLOT.findall(self.prompt_template) if not _SLOT.fullmatch(slot)]
        if unknown:
            raise UserError(f"prompt_template may hold {{query}} and {{labels}}, not {unknown[0]}")

    @abstractmethod
    def read_row(self, row: Row) -> tuple[str, TargetT]:
        """Query and target from one data row (pixels in, fractions out).

        Raises:
            RowError: A key is missing, of the wrong type or out of range.
        """

    @abstractmethod
    def format_target(self, sample: Sample[TargetT], codec: Codec, image_size: ImageSize) -> str:
        """The ideal answer to a sample as the model family writes it, without end tokens or think tags."""

    @abstractmethod
    def parse_answer(self, text: str, codec: Codec, image_size: ImageSize) -> PredictionT | None:
        """A prediction from answer text, cleaned and bounded by `parse_completion`; None when it is no answer."""

    @abstractmethod
    def score(self, prediction: PredictionT | None, target: TargetT) -> Score:
        """Reward, components and metrics of one prediction."""

    def read_boxes(self, parsed: ParsedBoxes) -> PredictionT | None:
        """A prediction from the boxes of an answer; tasks whose answers are no boxes have none."""
        return None

    def parse_prefixes(self, text: str, codec: Codec, image_size: ImageSize) -> list[tuple[int, PredictionT | None]]:
        """What a completion has said so far: before its first box, and behind each of them.

        Returns:
            Where each box ends in the text, in characters, and the prediction if the answer ended there in good form;
            the first is that of no box, at 0. It is the only one of answers that are no list of boxes.
        """
        text = _without_end_tokens(text) if len(text) <= MAX_TEXT else ""
        has_boxes = type(self).read_boxes is not Task.read_boxes
        found = codec.parse_prefixes(text, image_size) if has_boxes else []
        items = tuple(item for _, item in found)
        return [
            (end, self.read_boxes(ParsedBoxes(items=items[:count], is_exact=True)))
            for count, end in enumerate([0, *(end for end, _ in found)])
        ]

    def parse_published(self, text: str, codec: Codec, image_size: ImageSize) -> PredictionT | None:
        """A prediction as the evaluation code behind published metrics reads it; by default as this task reads it.

        Never raises on any text. Its boxes are as that code takes them, and may lie outside of the image.

        Args:
            text: The completion, special tokens and end token included, no longer than `MAX_TEXT`.
            codec: How the model family writes boxes.
            image_size: The sizes of the image.
        """
        return self.parse_completion(text, codec, image_size)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names that objects may have, where the task knows them all."""
        return ()

    def with_labels(self, labels: Iterable[str]) -> Self:
        """The task for data whose objects have these names; the same unless a task has to know them all.

        Args:
            labels: The names in the order of the prompt, read only where they matter; some may be there twice.
                Names that are an option of the task, and given, stay.
        """
        return self

    def at_progress(self, progress: float) -> Self:
        """The task as it scores when this share of the training is over, 0..1; always the same unless it says so."""
        return self

    @property
    def eval_metric_names(self) -> tuple[str, ...]:
        """Names of `eval_metrics`."""
        return ()

    def eval_metrics(self, prediction: PredictionT | None, target: TargetT) -> dict[str, float]:
        """Further metrics of one prediction, too slow for every training step; none unless a task says so."""
        return {}

    def overlays(self, answer: TargetT | PredictionT) -> Sequence[Overlay]:
        """What to draw for a target or a prediction; nothing unless a task says so."""
        return ()

    def describe(self, answer: TargetT | PredictionT) -> str:
        """A target or a prediction in plain words, for a person; by default what there is to draw, or what it holds."""
        return _count(self.overlays(answer)) or _in_words(answer) or "nothing"

    def serialize_prediction(self, prediction: PredictionT | None, image_size: ImageSize) -> Any:
        """A prediction as JSON-ready data, coordinates in pixels of the original image; by default as it is."""
        return prediction

    def num_objects(self, target: TargetT) -> int:
        """Objects that an answer has to be matched with: n of the paper's perceptual perplexity n!."""
        return 1

    def dataset_metrics(self) -> dict[str, Metric]:
        """Metrics over a whole data set that no mean of per-sample metrics gives (AP, say).

        Each takes any of `update(preds=..., target=..., image_sizes=..., ids=...)`, sequences of one length, and
        computes to a scalar tensor or a dict of them. Its metrics must not depend on the order of the samples.
        """
        return {}

    def prompt(self, query: str) -> str:
        """The user's text, without the image."""
        texts = {"{query}": query, "{labels}": ", ".join(self.labels)}
        return _SLOT.sub(lambda slot: texts[slot[0]], self.prompt_template)

    def messages(self, sample: Sample[TargetT]) -> list[dict[str, Any]]:
        """The chat of one sample: the image, then the prompt."""
        text = self.prompt(sample.query) + (THINK_REQUEST if self.think else "")
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

    def target_text(self, sample: Sample[TargetT], codec: Codec, image_size: ImageSize) -> str:
        """The completion that SFT teaches, without end tokens; `parse_completion` reads it back with full marks."""
        text = self.format_target(sample, codec, image_size)
        return f"<think></think><answer>{text}</answer>" if self.think else text

    def parse_completion(self, text: str, codec: Codec, image_size: ImageSize) -> PredictionT | None:
        """A prediction from a whole completion, or None: too long, without the think tags asked for, or no answer.

        Never raises on any text: a completion is hostile input.
        """
        if len(text) > MAX_TEXT:
            return None
        text = _without_end_tokens(text)
        answer = _inside_tags(text) if self.think else text
        return None if answer is None else self.parse_answer(answer, codec, image_size)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several tasks; a sample of the source "counting" or "counting/pixmo" belongs to the one named "counting".

    Attributes:
        tasks: By the name under which their metrics are logged.
    """

    tasks: Mapping[str, Task[Any, Any]]
    name = "all"


AnyTask: TypeAlias = Task[Any, Any] | Mixture
"""What a run is trained on."""


def tasks_of(task: AnyTask) -> Mapping[str, Task[Any, Any]]:
    """The tasks of a run by the name that stands before their metrics, which is empty where there is only one."""
    return task.tasks if isinstance(task, Mixture) else {"": task}


def part_of(task: AnyTask, source: str) -> str:
    """The name, as in `tasks_of`, of the task to which the samples of a source belong.

    >>> part_of(Mixture(tasks={}), "counting/pixmo")
    'counting'
    """
    return source.partition("/")[0] if isinstance(task, Mixture) else ""


def task_of_source(task: AnyTask, source: str) -> Task[Any, Any]:
    """The task to which the samples of a source belong."""
    return tasks_of(task)[part_of(task, source)]


def task_of(task: AnyTask, sample: Sample[Any]) -> Task[Any, Any]:
    """The task to which a sample belongs."""
    return task_of_source(task, sample.source)


def at_progress(task: AnyTask, progress: float) -> AnyTask:
    """The task, or each of several, as it scores when this share of the training is over, 0..1."""
    if isinstance(task, Mixture):
        return Mixture(tasks={name: part.at_progress(progress) for name, part in task.tasks.items()})
    return task.at_progress(progress)


def _count(overlays: Sequence[Overlay]) -> str:
    """Overlays by number and caption, captions in the order of the alphabet; empty when there are none.

    >>> _count([Overlay(shape=(0, 0, 1, 1), caption=name) for name in ("dog", "cat", "cat")])
    '3 boxes: 2x cat, dog'
    """
    if not overlays:
        return ""
    singular, plural = ("point", "points") if len(overlays[0].shape) == 2 else ("box", "boxes")
    captions = sorted(Counter(overlay.caption for overlay in overlays if overlay.caption).items())
    names = ", ".join(name if count == 1 else f"{count}x {name}" for name, count in captions)
    return f"{len(overlays)} {singular if len(overlays) == 1 else plural}" + (f": {names}" if names else "")


def _in_words(value: object) -> str:
    """Any value: a record by its fields, of which those that are empty are left out; empty where all are.

    >>> _in_words(["red", None, 3])
    'red, 3'
    """
    if is_dataclass(value):
        words = {field.name.replace("_", " "): _in_words(getattr(value, field.name)) for field in fields(value)}
        if len(words) == 1:
            return next(iter(words.values()))
        return ", ".join(f"{name}: {text}" for name, text in words.items() if text)
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_in_words, value)))
    return "" if value is None else str(value).strip()


def _without_end_tokens(text: str) -> str:
    """The text before the end tokens at its end; a text without any keeps the spaces at its end."""
    # no pattern with `+ ... $` here: on a long run of tokens it takes quadratic time
    end, is_ended = len(text.rstrip()), False
    while token := next((token for token in _END_TOKENS if text.endswith(token, 0, end)), None):
        end, is_ended = end - len(token), True
    return text[:end] if is_ended else text


def _inside_tags(text: str) -> str | None:
    """What stands between `<answer>` and the last `</answer>`, or None without all the tags of a thought answer."""
    text = text.strip()
    start = _ANSWER.search(text)
    end = len(text) - len("</answer>")
    if start is None or start.end() > end or not text.startswith("<think>") or not text.endswith("</answer>"):
        return None
    return text[start.end() : end]
