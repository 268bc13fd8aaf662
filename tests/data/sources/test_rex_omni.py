"""Rex-Omni's tables of tab-separated values."""

import base64
import json

import pytest

from perception_r1.data.images import load_image
from perception_r1.data.samples import load
from perception_r1.data.sources import DataError, RexOmni
from perception_r1.records import LabelledBox
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from tests.public_data import picture

BOXES = [{"bbox": [20, 10, 70, 50], "phrase": "dog"}, {"bbox": [100, 50, 200, 100], "phrase": "dog"}]
BOXES += [{"bbox": [0, 0, 200, 100], "caption": "red cup"}, {"bbox": None, "phrase": "cow"}]
POINTS = {"points": [{"point": [20, 10], "phrase": "dog"}, {"point": [100, 50], "phrase": "dog"}]}


@pytest.fixture
def write(tmp_path):
    """Writes annotations of pictures of different shades, the n-th of the n-th."""

    def write(*annotations, wrapped=False):
        starts, text = [], b""
        for number in range(len(annotations)):
            starts.append(len(text))
            encoded = base64.b64encode(picture(tmp_path / "draft.png", 40 * number).read_bytes())
            text += b"image%d\t%s\n" % (number, b"b'%s'" % encoded if wrapped else encoded)
        (tmp_path / "toy.images.tsv").write_bytes(text)
        lines = [
            annotation if isinstance(annotation, str) else f"{start}\t{json.dumps(annotation)}"
            for start, annotation in zip(starts, annotations, strict=True)
        ]
        (tmp_path / "toy.annotations.tsv").write_text("\n".join(lines) + "\n")
        return tmp_path / "toy.annotations.tsv"

    return write


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_row_is_an_image_with_its_objects(write, wrapped):
    path = write({"boxes": BOXES}, {"boxes": []}, wrapped=wrapped)
    first, second = load(RexOmni(path), Detection(categories=("dog", "red cup")))
    assert first.target.objects == (
        LabelledBox(label="dog", box=(0.1, 0.1, 0.35, 0.5)),
        LabelledBox(label="dog", box=(0.5, 0.5, 1.0, 1.0)),
        LabelledBox(label="red cup", box=(0.0, 0.0, 1.0, 1.0)),
    )
    assert second.target.objects == ()
    assert load_image(first.image).getpixel((5, 5)) != load_image(second.image).getpixel((5, 5))
    assert RexOmni(path).labels() == ("dog", "red cup")


def test_a_row_is_a_phrase_with_its_boxes_or_points(write):
    path = write({"boxes": BOXES}, POINTS)
    samples = load(RexOmni(path, rows="phrases"), Counting())
    assert [(sample.query, sample.target.count) for sample in samples] == [
        ("dog", 2),
        ("red cup", 1),
        ("cow", 0),
        ("dog", 2),
    ]
    assert samples[3].target.points == ((0.1, 0.1), (0.5, 0.5))
    (cup,) = load(RexOmni(path, rows="phrases"), Grounding(), on_bad_row="skip")
    assert (cup.query, cup.target.box) == ("red cup", (0.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("nothing", "the line must be a number, a tab and a JSON object"),
        ("0\t[1]", "the line must be a number, a tab and a JSON object"),
        ("x\t{}", "the line must be a number, a tab and a JSON object"),
        ("0\t{}", "boxes: is missing"),
        ('999\t{"boxes": []}', "with an image begins at byte 999"),
        ('3\t{"boxes": []}', "with an image begins at byte 3"),
    ],
)
@pytest.mark.parametrize("rows", ["images", "phrases"])
def test_a_bad_line_is_named(write, line, sentence, rows):
    if rows == "phrases" and "boxes" in line:
        line = line.replace("[]", json.dumps(BOXES[:1]))
    with pytest.raises(DataError, match=f"annotations.tsv:1: .*({sentence})"):
        load(RexOmni(write(line), rows=rows), Detection() if rows == "images" else Counting())


def test_files_that_are_not_there_are_named(tmp_path, write):
    with pytest.raises(DataError, match=r"none\.images\.tsv: cannot be read"):
        load(RexOmni(tmp_path / "none.annotations.tsv"), Detection())
    path = write({"boxes": []})
    assert RexOmni(path).fingerprint() != RexOmni(path, rows="phrases").fingerprint()
