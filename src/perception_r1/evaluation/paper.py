"""The paper's metrics, and how the answers were generated from which they were computed.

Source: Perception-R1 (NeurIPS 2025, arXiv 2504.07954), tables 1 to 3: the model before training and after. Qwen2-VL 2B,
for detection Qwen2.5-VL 3B. How answers were generated, and how they were read (`perception_r1/published.py`), is taken
from its public code, github.com/linkangheng/PR1, folder eval.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from perception_r1.task import Task


@dataclass(frozen=True, kw_only=True)
class PaperMetrics:
    """What the paper reports of a data set.

    Attributes:
        num_samples: How many it has.
        values: Metric -> before and after training, as shares.
    """

    num_samples: int
    values: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How the answers to a task were generated, greedily.

    Attributes:
        prompt_template: As in `Task`.
        max_new_tokens: Longest answer.
        repetition_penalty: As in `SamplingParams`.
    """

    prompt_template: str
    max_new_tokens: int
    repetition_penalty: float = 1.0


def _accuracies(before: Sequence[float], after: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Grounding's accuracies at three IoUs and their mean."""
    names = "accuracy_50", "accuracy_75", "accuracy_95", "accuracy_mean"
    return dict(zip(names, zip(before, after, strict=True), strict=True))


PAPER_METRICS: dict[str, PaperMetrics] = {
    "refcoco_val": PaperMetrics(
        num_samples=10_834, values=_accuracies((0.868, 0.772, 0.330, 0.657), (0.891, 0.795, 0.350, 0.679))
    ),
    "refcoco_testA": PaperMetrics(
        num_samples=5657, values=_accuracies((0.896, 0.806, 0.357, 0.686), (0.914, 0.836, 0.385, 0.712))
    ),
    "refcoco_testB": PaperMetrics(
        num_samples=5095, values=_accuracies((0.820, 0.701, 0.269, 0.597), (0.845, 0.724, 0.288, 0.619))
    ),
    "refcocoplus_val": PaperMetrics(
        num_samples=10_758, values=_accuracies((0.771, 0.687, 0.294, 0.584), (0.817, 0.736, 0.326, 0.626))
    ),
    "refcocoplus_testA": PaperMetrics(
        num_samples=5726, values=_accuracies((0.825, 0.738, 0.323, 0.629), (0.868, 0.793, 0.369, 0.677))
    ),
    "refcocoplus_testB": PaperMetrics(
        num_samples=4889, values=_accuracies((0.701, 0.600, 0.230, 0.510), (0.743, 0.642, 0.267, 0.551))
    ),
    "refcocog_val": PaperMetrics(
        num_samples=4896, values=_accuracies((0.833, 0.727, 0.289, 0.616), (0.857, 0.757, 0.321, 0.645))
    ),
    "refcocog_test": PaperMetrics(
        num_samples=9602, values=_accuracies((0.831, 0.730, 0.279, 0.613), (0.854, 0.760, 0.331, 0.648))
    ),
    "pixmo_count_val": PaperMetrics(num_samples=540, values={"count_accuracy": (0.602, 0.781)}),
    "pixmo_count_test": PaperMetrics(num_samples=540, values={"count_accuracy": (0.505, 0.756)}),
    "coco_val2017": PaperMetrics(
        num_samples=5000, values={"ap": (0.161, 0.319), "ap50": (0.237, 0.467), "ap75": (0.167, 0.334)}
    ),
    "fox_en": PaperMetrics(
        num_samples=112,
        values={
            "edit_distance": (0.080, 0.028),
            "word_f1": (0.944, 0.982),
            "word_precision": (0.969, 0.986),
            "word_recall": (0.930, 0.978),
            "bleu": (0.909, 0.966),
            "meteor": (0.941, 0.981),
        },
    ),
    "fox_cn": PaperMetrics(
        num_samples=100,
        values={
            "edit_distance": (0.100, 0.084),
            "word_f1": (0.930, 0.969),
            "word_precision": (0.961, 0.972),
            "word_recall": (0.905, 0.967),
            "bleu": (0.780, 0.747),
            "meteor": (0.872, 0.938),
        },
    ),
}
"""By the names of sources in `configs/data`."""

GENERATION: dict[str, Generation] = {
    "grounding": Generation(
        prompt_template="Output the bounding box of the {query} in the image.",
        max_new_tokens=512,
        repetition_penalty=1.05,
    ),
    "counting": Generation(prompt_template="Output all the bounding boxes of the {query}", max_new_tokens=512),
    "detection": Generation(
        prompt_template="Locate every item from the category list in the image and output the coordinates in JSON"
        " format. The category set includes {labels}.",
        max_new_tokens=4096,
    ),
    "ocr": Generation(prompt_template="<image>\nOCR this image: ", max_new_tokens=2048),
}
"""By the names of tasks; the files of `configs/protocol/published` have the same settings."""
_SIDES = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16_384}
"""How pictures were resized: as the model's own files have it, with no other bound."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which metrics of an evaluation were computed as the paper's.

    Attributes:
        deviations: In what the answers were generated in another way than the published ones, a clause each.
        incomplete: Of each source that the paper reports, and of which another number of samples was answered, their
            numbers here and there.
    """

    deviations: tuple[str, ...]
    incomplete: Mapping[str, tuple[int, int]]

    def paper_metrics(self, source: str, metric: str) -> tuple[float, float] | None:
        """The paper's metrics before and after training, if they may stand beside those of this evaluation."""
        reported = reported_of(source)
        if self.deviations or source in self.incomplete or reported is None:
            return None
        return reported.values.get(metric)


def reported_of(source: str) -> PaperMetrics | None:
    """What the paper reports of a source, whose name may have that of its task before it."""
    return PAPER_METRICS.get(source.rpartition("/")[2])


def compare(
    task: Task[Any, Any], *, max_new_tokens: int, repetition_penalty: float, rows: Sequence[Mapping[str, Any]]
) -> Comparison:
    """Compare how answers were generated with how the published ones were.

    A setting that made no difference is no deviation: a bound that no picture and no answer reached.

    Args:
        task: The task.
        max_new_tokens: Of this evaluation.
        repetition_penalty: Of this evaluation.
        rows: The rows of `predictions.jsonl`.
    """
    counts = Counter(row["source"] for row in rows)
    incomplete = {
        source: (count, reported.num_samples)
        for source, count in counts.items()
        if (reported := reported_of(source)) is not None and reported.num_samples != count
    }
    published = GENERATION.get(task.name)
    if published is None:
        return Comparison(deviations=("nothing is published of this task",), incomplete=incomplete)
    clauses = []
    if task.think or task.prompt_template != published.prompt_template:
        clauses.append(f"the prompt was {published.prompt_template!r}")
    if repetition_penalty != published.repetition_penalty:
        clauses.append(f"the repetition penalty was {published.repetition_penalty:g} instead of {repetition_penalty:g}")
    num_cut = sum(_is_cut_elsewhere(row, max_new_tokens, published.max_new_tokens) for row in rows)
    if num_cut:
        limits = f"{published.max_new_tokens} tokens instead of {max_new_tokens}"
        clauses.append(f"answers had up to {limits}, which changes {num_cut} of {len(rows)}")
    num_resized = sum(map(_is_resized_otherwise, rows))
    if num_resized:
        bound = f"up to {_SIDES['max_pixels']} pixels"
        clauses.append(f"pictures had {bound}, so that {num_resized} of {len(rows)} had another size")
    return Comparison(deviations=tuple(clauses), incomplete=incomplete)


def _is_cut_elsewhere(row: Mapping[str, Any], here: int, published: int) -> bool:
    """Whether an answer would have ended elsewhere under the published limit."""
    return bool(row["num_tokens"] > published or (row["is_truncated"] and here < published))


def _is_resized_otherwise(row: Mapping[str, Any]) -> bool:
    height, width = smart_resize(row["height"], row["width"], **_SIDES)
    return (width, height) != (row["resized_width"], row["resized_height"])
