"""The effects of differences between strict and published evaluation."""

import json

from perception_r1.records import ImageSize
from perception_r1.tasks.detection import Detection, DetectionTarget
from tests.benchmarks.programs import BENCHMARKS, program
from tests.tasks.test_published import score

pages = program("pages")
protocol = program("protocol")
RESULTS = {
    "grounding": {"strict": 0.5, "prompt": 0.5, "reading": 0.625, "published": 0.75},
    "detection": {"strict": 0.25, "prompt": 0.0, "reading": 0.25, "boxes": 0.125, "published": 0.0},
}


def test_a_table_has_a_column_for_each_difference():
    assert protocol.effects(RESULTS).splitlines() == [
        "| task | metric | strict | prompt | reading | boxes | all, published |",
        "|---|---|---|---|---|---|---|",
        "| grounding | accuracy at IoU 0.5 | 0.500 | +0.000 | +0.125 |  | 0.750 |",
        "| detection | AP | 0.250 | -0.250 | +0.000 | -0.125 | 0.000 |",
    ]


def test_the_page_shows_the_committed_results():
    results = json.loads((BENCHMARKS / "results" / "protocol.json").read_text(encoding="utf-8"))
    page = protocol.PAGE.read_text(encoding="utf-8")
    assert pages.fill(page, "protocol", {"effects": protocol.effects(results["tasks"])}) == page
    assert set(results["tasks"]) == set(protocol.METRICS)
    assert results["num_images"] == 400


def test_answers_in_another_form_of_boxes_say_the_same():
    task = Detection(categories=("cat", "dog"))
    text = (
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
        "<|object_ref_start|>cow<|object_ref_end|><|box_start|>(9,9),(1,1)<|box_end|><|im_end|>"
    )
    for given, is_exact in ((text, True), (f"I see {text}", False)):
        answer = score(task, "qwen2_vl", DetectionTarget(objects=()), given)
        (again,) = protocol.rewritten(task, [answer])
        assert again.image_size == ImageSize(width=640, height=480, resized_width=644, resized_height=476)
        assert (again.prediction is not None) == is_exact
        if is_exact:
            (found,) = again.prediction.objects
            assert (found.label, again.prediction.num_listed) == ("cat", 2)
            assert all(abs(side - other) < 0.002 for side, other in zip(found.box, (0.1, 0.2, 0.3, 0.4), strict=True))
