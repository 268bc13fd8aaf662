"""Data sets of other trainers: small files of the forms in which they are published."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from perception_r1.data.samples import load
from perception_r1.data.sources import DataError, Hub, MsSwift, PerceptionR1, VlmR1
from perception_r1.records import LabelledBox
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr
from tests.public_data import picture

BOX = (0.1, 0.1, 0.35, 0.5)
"""[20, 10, 70, 50] in a picture of 200 x 100 pixels, [100, 100, 350, 500] in thousandths."""
OTHER = (0.5, 0.5, 1.0, 1.0)
"""[100, 50, 200, 100] there, [500, 500, 1000, 1000] in thousandths."""
DOGS = Detection(categories=("dog", "dog's bed"))


@pytest.fixture
def lines(tmp_path):
    """Writes rows of one line each beside a picture `a.png`."""

    def write(*rows):
        picture(tmp_path / "a.png")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "rows.jsonl"

    return write


@pytest.fixture
def table(tmp_path):
    """Writes rows as a parquet file; `IMAGE` stands for the bytes of a picture."""

    def write(*rows):
        image = {"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}
        filled = [
            {key: [image] if value is LIST else image if value is IMAGE else value for key, value in row.items()}
            for row in rows
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    return write


IMAGE, LIST = object(), object()


def only(source, task):
    """Query and target of the only sample."""
    (sample,) = load(source, task)
    return sample.query, sample.target


# ----------------------------------------------------------------------------------------------- V-Triune


def triune(answer, text="<image>\nLocate all objects of the class: dog"):
    """A row as in github.com/alibaba/ROLL, docs_roll, vl_rlvr_pipeline_start.md."""
    verifier = {"det_verifier_normalized": True, "det_reward_ratio": {"iou_max_label_first": 1.0}}
    return {
        "data_source": "x",
        "images": LIST,
        "prompt": [{"content": text, "role": "user"}],
        "ability": "cv_detection",
        "reward_model": {"answer": answer, "ground_truth": f"<answer>\n{answer}\n</answer>", "verifier_parm": verifier},
    }


@pytest.mark.parametrize("column", ["answer", "ground_truth"])
def test_v_triune(table, column):
    columns = {"image": "images", "problem": "prompt", "solution": f"reward_model.{column}"}
    single = "{'bbox_2d': [100, 100, 350, 500], 'label': 'dog'}"
    answer = f"[{single}, {{'bbox_2d': [500, 500, 1000, 1000], 'label': \"dog's bed\"}}]"
    source = Hub(table(triune(answer)), columns, unit="thousandths")
    assert only(source, DOGS)[1].objects == (
        LabelledBox(label="dog", box=BOX),
        LabelledBox(label="dog's bed", box=OTHER),
    )
    query, target = only(Hub(table(triune(f"[{single}]")), columns, unit="thousandths"), Grounding())
    assert (query, target.box) == ("dog", BOX)
    query, target = only(Hub(table(triune("4", "<image>How many dogs?")), columns), Counting())
    assert (query, target.count) == ("How many dogs?", 4)
    assert only(Hub(table(triune("a page")), columns), Ocr())[1].text == (
        "a page" if column == "answer" else "<answer>\na page\n</answer>"
    )


# ------------------------------------------------------------------------- EasyR1, VisionReasoner, Perception-R1


def test_easyr1_counting(table):
    row = {"images": LIST, "problem": "<image>How many dogs?", "answer": "3"}
    source = Hub(table(row), {"image": "images", "problem": "problem", "solution": "answer"})
    query, target = only(source, Counting())
    assert (query, target.count) == ("How many dogs?", 3)


def test_vision_reasoner_has_boxes_of_the_stored_picture_without_labels(table):
    solution = [
        {"bbox_2d": [20, 10, 70, 50], "point_2d": [40, 30]},
        {"bbox_2d": [100, 50, 200, 100], "point_2d": [150, 75]},
    ]
    rows = [
        {
            "id": name,
            "problem": "'the dog'",
            "solution": json.dumps(found),
            "image": IMAGE,
            "img_height": 426,
            "img_width": 640,
        }
        for name, found in (("a", solution), ("b", solution[:1]))
    ]
    columns = {"image": "image", "id": "id", "problem": "problem", "solution": "solution"}
    two, one = load(Hub(table(*rows), columns), Counting())
    assert (two.query, two.target.boxes) == ("'the dog'", (BOX, OTHER))
    assert (one.id, one.target.count) == ("b", 1)
    assert only(Hub(table(rows[1]), columns), Grounding())[1].box == BOX
    with pytest.raises(DataError, match="question: is missing"):
        load(Hub(table(rows[0]), columns), Grounding())


@pytest.mark.parametrize("solution", ["[100, 100, 350, 500]", "(100, 100, 350, 500)", " [100.0, 100.0, 350, 500] "])
def test_perception_r1_on_the_hub_has_solutions_that_are_texts(table, solution):
    row = {"image": IMAGE, "problem": "the dog", "solution": solution}
    source = Hub(table(row), {"image": "image", "problem": "problem", "solution": "solution"}, unit="thousandths")
    query, target = only(source, Grounding())
    assert (query, target.box) == ("the dog", BOX)


def test_several_images_are_refused(table, tmp_path):
    image = {"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}
    row = {"images": [image, image], "problem": "dogs", "answer": "3"}
    with pytest.raises(DataError, match="image: must be one, got 2"):
        load(Hub(table(row), {"image": "images", "problem": "problem", "solution": "answer"}), Counting())


# ------------------------------------------------------------------------------------------------- VLM-R1


def test_vlm_r1_referring_expressions(lines):
    """As in its issue 11."""
    row = {
        "image": "a.png",
        "problem": "Please provide the bounding box coordinate of the region this sentence describes: the lady.",
        "solution": [20.4, 10, 70, 50],
        "normalized_solution": [100, 100, 350, 500],
    }
    query, target = only(PerceptionR1(lines(row)), Grounding())
    assert (query, target.box) == ("the lady", BOX)
    del row["normalized_solution"]
    row["solution"] = [20, 10, 70, 50]
    assert only(PerceptionR1(lines(row), unit="pixels"), Grounding())[1].box == BOX


def talk(answer, image="a.png"):
    turns = [{"from": "human", "value": "<image>How many dogs?"}, {"from": "gpt", "value": answer}]
    return {"id": 1, "image": image, "conversations": turns}


def test_vlm_r1_conversations(lines):
    assert only(VlmR1(lines(talk("0"))), Counting())[1].count == 0
    query, target = only(VlmR1(lines(talk([20, 10, 70, 50]))), Grounding())
    assert (query, target.box) == ("How many dogs?", BOX)
    assert only(VlmR1(lines(talk("[20, 10, 70, 50]", ["a.png"]))), Grounding())[1].box == BOX
    assert only(VlmR1(lines(talk("a page"))), Ocr())[1].text == "a page"
    fenced = '```json\n[{"bbox_2d": [20, 10, 70, 50], "label": "dog"}]\n```'
    assert only(VlmR1(lines(talk(fenced))), DOGS)[1].objects == (LabelledBox(label="dog", box=BOX),)
    for empty in ("None", None, "```json\n[]\n```"):
        assert only(VlmR1(lines(talk(empty))), DOGS)[1].objects == ()
    for wrong, sentence in (
        (talk("3", ["a.png", "b.png"]), "images: must be one, got 2"),
        ({"image": "a.png"}, "conversations: must have a turn from"),
    ):
        with pytest.raises(DataError, match=sentence):
            load(VlmR1(lines(wrong)), Counting())


# ------------------------------------------------------------------------------------------------ ms-swift


def swift(**keys):
    turns = [{"role": "user", "content": "<image>Find the <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    return {"messages": turns, "images": ["a.png"], **keys}


def test_ms_swift_objects(lines):
    pair = [[20, 10, 70, 50], [100, 50, 200, 100]]
    query, target = only(MsSwift(lines(swift(objects={"ref": ["dog"], "bbox": pair}))), Counting())
    assert (query, target.boxes) == ("dog", (BOX, OTHER))
    named = {"ref": ["dog", "dog's bed"], "bbox": pair, "bbox_type": "real"}
    assert [item.label for item in only(MsSwift(lines(swift(objects=named))), DOGS)[1].objects] == named["ref"]
    single = {"ref": ["the dog"], "bbox": [[0.1, 0.1, 0.35, 0.5]], "bbox_type": "norm1"}
    query, target = only(MsSwift(lines(swift(objects=single))), Grounding())
    assert (query, target.box) == ("the dog", BOX)
    points = {"ref": ["dog"], "bbox": [[20, 10], [100, 50]]}
    assert only(MsSwift(lines(swift(objects=points))), Counting())[1].points == ((0.1, 0.1), (0.5, 0.5))


def test_ms_swift_solutions_and_answers(lines):
    row = {"images": [{"bytes": None, "path": "a.png"}], "messages": [{"role": "user", "content": "How many items?"}]}
    query, target = only(MsSwift(lines({**row, "solution": "<answer> 3 </answer>"})), Counting())
    assert (query, target.count) == ("How many items?", 3)
    turns = [{"role": "user", "content": "<image>Read."}, {"role": "assistant", "content": "two\nlines"}]
    assert only(MsSwift(lines({"image": "a.png", "messages": turns})), Ocr())[1].text == "two\nlines"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            swift(objects={"ref": [], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1000"}),
            "objects.bbox_type: must be one of",
        ),
        (
            swift(objects={"ref": [], "bbox": [[1, 2, 3, 4]], "bbox_type": ["real"]}),
            "objects.bbox_type: must be one of",
        ),
        (swift(objects={"ref": "dog", "bbox": [[1, 2, 3, 4]]}), "objects: ref and bbox must be lists"),
        (swift(images=[{"bytes": "x"}]), "images: must be paths here"),
        ({"images": ["a.png"]}, "solution: must be a box"),
    ],
)
def test_ms_swift_rows_that_cannot_be_read_are_named(lines, row, sentence):
    with pytest.raises(DataError, match=sentence):
        load(MsSwift(lines(row)), Counting())
