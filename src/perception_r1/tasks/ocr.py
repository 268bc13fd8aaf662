"""OCR: the text of a page. Reward = 1 - edit distance / length of the longer text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from perception_r1.codecs import Codec
from perception_r1.data.module import TaskDataModule
from perception_r1.data.synthetic.pages import TextWorld
from perception_r1.geometry import match
from perception_r1.published import without_special_tokens
from perception_r1.records import ImageSize, Sample, Score
from perception_r1.rows import Row
from perception_r1.task import Task
from perception_r1.tasks._options import check_choice
from perception_r1.tasks._word_metrics import NAMES, Equals, check_available, word_metrics

_NEARLY = 0.9
"""Similarity from which on a line of an answer is taken for one of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OcrTarget:
    """The text of the page, which may be empty."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Ocr(Task[OcrTarget, str]):
    """Output the text of a page.

    A prediction is the answer's text as it is, spaces and line breaks at its ends included: they are characters of the
    page like all others. The codec plays no part.

    Reward = 1 - edit distance on characters / length of the longer text; two empty texts agree.

    >>> task = Ocr()
    >>> task.score("on quick", OcrTarget(text="on quick")).reward
    1.0
    >>> task.score("n quzxk", OcrTarget(text="on quick")).reward
    0.625
    >>> task.score("", OcrTarget(text="")).reward
    1.0
    >>> task.score(None, OcrTarget(text="")).reward  # no answer at all: too long, or without its tags
    0.0

    With `reward` lines it is the mean of the similarity and of the share of lines that are right, in their order, of
    which one too many or too few counts as wrong. With unit_tests it is the share of tests that the answer passes, as
    in olmOCR 2 (arXiv 2510.19817): each line of the page is there, or nearly so, which counts as its similarity; so are
    two neighbours, in their order; and every line beyond the number of the page's is a test that fails.

    Attributes:
        reward: "similarity", that of Perception-R1, "lines" or "unit_tests".
        word_metrics: Also compute, in evaluation, precision, recall and F1 of the set of words, BLEU and METEOR, for
            which METEOR takes synonyms from "wordnet", as published, or knows only "stems". Needs `perception-r1[ocr]`.
    """

    prompt_template: str = "OCR this image."
    reward: Literal["similarity", "lines", "unit_tests"] = "similarity"
    word_metrics: Equals | None = None

    name = "ocr"
    component_names = ("similarity",)
    metric_names = ("edit_distance", "exact_match")
    primary_metric = "reward/similarity"
    published_metric_names = ("edit_distance", *NAMES)
    row_keys = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reward", self.reward, ("similarity", "lines", "unit_tests"))
        if self.word_metrics is not None:
            check_available(self.word_metrics)

    @property
    def eval_metric_names(self) -> tuple[str, ...]:
        """The word metrics, if they are asked for."""
        return NAMES if self.word_metrics is not None else ()

    def eval_metrics(self, prediction: str | None, target: OcrTarget) -> dict[str, float]:
        """The word metrics, if they are asked for."""
        if self.word_metrics is None:
            return {}
        return word_metrics(prediction, target.text, equals=self.word_metrics)

    def read_row(self, row: Row) -> tuple[str, OcrTarget]:
        """No query, and the text of "text"."""
        return "", OcrTarget(text=row.text("text", may_be_empty=True))

    def format_target(self, sample: Sample[OcrTarget], codec: Codec, image_size: ImageSize) -> str:
        """The page's text."""
        return sample.target.text

    def parse_answer(self, text: str, codec: Codec, image_size: ImageSize) -> str | None:
        """The text as it is."""
        return text

    def parse_published(self, text: str, codec: Codec, image_size: ImageSize) -> str | None:
        """The text without any special token, wherever it stands."""
        return without_special_tokens(text)

    def score(self, prediction: str | None, target: OcrTarget) -> Score:
        """Similarity, and the edit distance (0..1) that it is one less."""
        distance = 1.0 if prediction is None else Levenshtein.normalized_distance(prediction, target.text)
        similarity = 1.0 - distance
        reward = similarity
        if self.reward == "lines" and prediction is not None:
            lines = Levenshtein.normalized_similarity(prediction.split("\n"), target.text.split("\n"))
            reward = (similarity + lines) / 2
        elif self.reward == "unit_tests":
            reward = 0.0 if prediction is None else _passed_tests(prediction.split("\n"), target.text.split("\n"))
        return Score(
            reward=reward,
            components={"similarity": similarity},
            metrics={"edit_distance": distance, "exact_match": float(prediction == target.text)},
        )

    def describe(self, answer: OcrTarget | str) -> str:
        """The text itself."""
        text = answer if isinstance(answer, str) else answer.text
        return text if text.strip() else "no text"

    def serialize_prediction(self, prediction: str | None, image_size: ImageSize) -> dict[str, str] | None:
        """`{"text": "..."}`."""
        return None if prediction is None else {"text": prediction}


def _passed_tests(lines: Sequence[str], targets: Sequence[str]) -> float:
    """Share of the tests that an answer's lines pass; of equal lines of a page the order is not tested.

    >>> _passed_tests(["a quick brown fox", "dog", "dog"], ["a quick brown fox", "cat", "dog"])
    0.4
    >>> _passed_tests(["two"], ["two", "two"])
    0.5
    >>> _passed_tests(["one", "two", "two", "two"], ["one", "two"])
    0.6
    """
    if len(lines) > 2 * len(targets):
        return 0.0
    similarities = cdist(targets, lines, scorer=Levenshtein.normalized_similarity)  # [targets, lines]
    similarities[similarities < _NEARLY] = 0.0
    positions = dict(match(-similarities, "bipartite"))  # no line is there for two
    tests = [float(similarities[pair]) for pair in positions.items()]
    found = {target for target, line in positions.items() if similarities[target, line]}
    tests += [
        float({k, k + 1} <= found and positions[k] < positions[k + 1])
        for k in range(len(targets) - 1)
        if targets.count(targets[k]) == targets.count(targets[k + 1]) == 1
    ]
    num_missing, num_extra = len(targets) - len(positions), max(0, len(lines) - len(targets))
    return sum(tests) / (len(tests) + num_missing + num_extra)


class OcrData(TaskDataModule):
    """Images with their text."""

    def __init__(self, task: Ocr = Ocr(), world: TextWorld = TextWorld(), **kwargs: Any) -> None:  # noqa: B008 - frozen
        super().__init__(task, world, **kwargs)
