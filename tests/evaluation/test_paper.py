"""Whether metrics may stand beside the paper's."""

import pytest

from perception_r1.evaluation.paper import GENERATION, PAPER_METRICS, compare
from perception_r1.tasks import TASKS

PROMPT = "the prompt was 'Output the bounding box of the {query} in the image.'"


def row(source="refcoco_val", **values):
    sizes = {"width": 640, "height": 480, "resized_width": 644, "resized_height": 476}
    return {"source": source, "num_tokens": 30, "is_truncated": False} | sizes | values


def compared(rows, **settings):
    options = {"prompt_template": GENERATION["grounding"].prompt_template, "think": False}
    options |= {name: settings.pop(name) for name in list(settings) if name in options}
    limits = {"max_new_tokens": 768, "repetition_penalty": 1.05} | settings
    return compare(TASKS["grounding"](**options), **limits, rows=rows)


def test_answers_that_were_generated_alike_stand_beside_the_papers():
    comparison = compared([row()] * PAPER_METRICS["refcoco_val"].num_samples)
    assert comparison.deviations == ()
    assert comparison.paper_metrics("refcoco_val", "accuracy_50") == (0.868, 0.891)
    assert comparison.paper_metrics("refcoco_val", "accuracy_95") == (0.330, 0.350)
    assert comparison.paper_metrics("refcoco_val", "center_accuracy") is None
    assert comparison.paper_metrics("mine", "accuracy_50") is None


def test_the_papers_means_are_those_of_its_accuracies():
    found = [values.values for name, values in PAPER_METRICS.items() if name.startswith("refcoco")]
    assert len(found) == 8
    for values in found:
        for k in range(2):
            mean = sum(values[f"accuracy_{name}"][k] for name in (50, 75, 95)) / 3
            assert mean == pytest.approx(values["accuracy_mean"][k], abs=0.0011)


def test_a_part_of_the_samples_does_not():
    comparison = compared([row()] * 3 + [row("mine")])
    assert comparison.incomplete == {"refcoco_val": (3, 10_834)}
    assert comparison.paper_metrics("refcoco_val", "accuracy_50") is None


@pytest.mark.parametrize(
    ("settings", "clause"),
    [
        (
            {"prompt_template": "Where is {query}?"},
            "the prompt was 'Output the bounding box of the {query} in the image.'",
        ),
        ({"think": True}, "the prompt was 'Output the bounding box of the {query} in the image.'"),
        ({"repetition_penalty": 1.0}, "the repetition penalty was 1.05 instead of 1"),
    ],
)
def test_settings_that_matter_are_named(settings, clause):
    assert compared([row()], **settings).deviations == (clause,)


@pytest.mark.parametrize(
    ("values", "limit", "clause"),
    [
        ({"num_tokens": 513}, 768, "answers had up to 512 tokens instead of 768, which changes 1 of 2"),
        ({"is_truncated": True}, 30, "answers had up to 512 tokens instead of 30, which changes 1 of 2"),
        ({"is_truncated": True, "num_tokens": 512}, 512, None),
        ({"resized_width": 560}, 768, "pictures had up to 12845056 pixels, so that 1 of 2 had another size"),
        ({"width": 4000, "height": 3000, "resized_width": 4004, "resized_height": 2996}, 768, None),
        ({"width": 4000, "height": 3000, "resized_width": 1148, "resized_height": 868}, 768, "pictures had"),
    ],
)
def test_bounds_are_named_only_where_they_were_reached(values, limit, clause):
    deviations = compared([row(), row(**values)], max_new_tokens=limit).deviations
    assert len(deviations) == (clause is not None)
    assert clause is None or clause in deviations[0]


def test_nothing_is_published_of_other_tasks():
    class Other(TASKS["ocr"]):
        name = "other"

    assert compare(Other(), max_new_tokens=8, repetition_penalty=1.0, rows=[]).deviations
