import hashlib
import json
import logging

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from perception_r1.data.images import load_image
from perception_r1.data.module import TaskDataModule
from perception_r1.data.samples import load
from perception_r1.data.sources import DataError, Hub
from perception_r1.data.synthetic.objects import GroundingWorld
from perception_r1.errors import UserError
from perception_r1.records import LabelledBox
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from perception_r1.tasks.grounding import Grounding
from perception_r1.tasks.ocr import Ocr
from tests.public_data import hub_refcoco, picture

REFCOCO = {"image": "image", "id": "question_id", "question": "answer", "box": "bbox"}
DETECTION = {"image": "image", "objects.box": "objects.bbox", "objects.label": "objects.category"}
NAMES = ["person", "dog", "cat"]
DETECT = Detection(categories=tuple(NAMES))


def bytes_of(folder, shade=0, **options) -> bytes:
    return picture(folder / "draft.png", shade, **options).read_bytes()


def write(path, rows) -> str:
    """A parquet file as other programs write it, without the library's notes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


# ------------------------------------------------------------------------------------------------- RefCOCO


@pytest.mark.parametrize("form", ["parquet", "folder", "saved", "saved with splits"])
def test_refcoco_of_the_hub_makes_a_row_of_each_expression(tmp_path, form):
    table, path = hub_refcoco(tmp_path), tmp_path / "set"
    if form == "parquet":
        path = tmp_path / "val.parquet"
        table.to_parquet(path)
    elif form == "folder":
        (path / "data").mkdir(parents=True)
        for k in range(2):
            rows = table.select(range(2) if k == 0 else range(2, 3))
            rows.to_parquet(path / "data" / f"val-{k:05d}-of-00002.parquet")
    elif form == "saved":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict(val=table, other=table.select([0])).save_to_disk(path)
    source = Hub(str(path), REFCOCO, split="val", corners=False)
    samples = load(source, Grounding())
    assert [(sample.id, sample.query) for sample in samples] == [
        ("0", "dog 0"),
        ("1-1", "dog 1"),
        ("1-2", "the brown dog"),
        ("2", "dog 2"),
    ]
    assert {sample.target.box for sample in samples} == {(0.1, 0.1, 0.35, 0.5)}
    assert (samples[0].width, samples[0].height) == (200, 100)
    pictures = [load_image(sample.image).getpixel((0, 0)) for sample in samples]
    assert pictures[0] != pictures[1] == pictures[2] != pictures[3]
    assert str(samples[1].image) == str(samples[2].image) == f"{path}:2"


def test_a_picture_that_a_table_holds_twice_is_in_one_split_only(tmp_path):
    rows = [
        {"image": {"bytes": bytes_of(tmp_path, 20 * (k // 2)), "path": None}, "q": f"{k}", "box": [1, 1, 9, 9]}
        for k in range(24)
    ]
    columns = {"image": "image", "question": "q", "box": "box"}
    module = TaskDataModule(
        Grounding(),
        GroundingWorld(),
        train={"x": Hub(write(tmp_path / "a.parquet", rows), columns)},
        held_out_share=0.2,
    )
    module.setup()
    kinds = [{int(sample.query) // 2 for sample in module.samples(split)} for split in ("train", "val", "test")]
    assert [len(kind) for kind in kinds] == [8, 2, 2]
    assert len(set.union(*kinds)) == 12
    assert sum(len(module.samples(split)) for split in ("train", "val", "test")) == 24


# ------------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize("is_dict_of_lists", [True, False])
def test_categories_by_number_get_their_names_in_either_form_of_nesting(tmp_path, is_dict_of_lists):
    label, box = datasets.ClassLabel(names=NAMES), datasets.List(datasets.Value("float64"))
    pairs = [([20, 10, 50, 40], 1), ([0, 0, 200, 100], 0)]
    if is_dict_of_lists:
        objects = {"bbox": [pair[0] for pair in pairs], "category": [pair[1] for pair in pairs]}
        none = {"bbox": [], "category": []}
        feature = {"bbox": datasets.List(box), "category": datasets.List(label)}
    else:
        objects, none = [{"bbox": one, "category": other} for one, other in pairs], []
        feature = datasets.List({"bbox": box, "category": label})
    image = {"bytes": bytes_of(tmp_path), "path": None}
    features = datasets.Features({"image": datasets.Image(), "objects": feature})
    rows = [{"image": image, "objects": objects}, {"image": image, "objects": none}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    source = Hub(str(tmp_path / "set"), DETECTION, corners=False)
    assert source.labels() == tuple(NAMES)
    full, empty = load(source, DETECT)
    assert full.target.objects == (
        LabelledBox(label="dog", box=(0.1, 0.1, 0.35, 0.5)),
        LabelledBox(label="person", box=(0.0, 0.0, 1.0, 1.0)),
    )
    assert empty.target.objects == ()


def test_a_number_without_a_name_is_an_error_and_never_the_last_name(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
                "category": datasets.List(datasets.ClassLabel(names=NAMES)),
            },
        }
    )
    row = {"image": {"bytes": bytes_of(tmp_path), "path": None}, "objects": {"bbox": [[1, 1, 5, 5]], "category": [-1]}}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"set:1: objects\[0\]\.label: must be a text, got -1"):
        load(Hub(str(tmp_path / "set"), DETECTION), DETECT)


def test_labels_without_names_are_those_in_use(tmp_path):
    rows = [
        {"image": bytes_of(tmp_path), "objects": {"bbox": [[1, 1, 5, 5]] * 2, "category": names}}
        for names in (["dog", "cat"], ["dog", "ant"])
    ]
    assert Hub(write(tmp_path / "a.parquet", rows), DETECTION).labels() == ("ant", "cat", "dog")


def test_a_box_a_fraction_outside_is_cut(tmp_path):
    row = {"image": bytes_of(tmp_path), "q": "dog", "box": [150.0, 10.0, 50.01, 40.0]}
    columns = {"image": "image", "question": "q", "box": "box"}
    (sample,) = load(Hub(write(tmp_path / "a.parquet", [row]), columns, corners=False), Grounding())
    assert sample.target.box == (0.75, 0.1, 1.0, 0.5)


# ------------------------------------------------------------------------------------------------- pictures


def test_bytes_paths_and_objects_of_either_are_pictures(tmp_path):
    data, name = bytes_of(tmp_path), str(picture(tmp_path / "images" / "a.png").relative_to(tmp_path / "images"))
    forms = {
        "bytes": data,
        "object with bytes": {"bytes": data, "path": "elsewhere.png"},
        "object with a path": {"bytes": None, "path": name},
        "path": name,
    }
    for form, cell in forms.items():
        path = tmp_path / f"{form}.parquet"
        schema = pyarrow.schema([("page", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))])
        table = pyarrow.Table.from_pylist([{"page": cell}], schema=schema if isinstance(cell, dict) else None)
        pyarrow.parquet.write_table(table.append_column("text", pyarrow.array(["hello"])), path)
        source = Hub(str(path), {"image": "page", "text": "text"}, images=tmp_path / "images")
        (sample,) = load(source, Ocr())
        assert load_image(sample.image).size == (200, 100), form
        assert sample.target.text == "hello"


def test_a_folder_of_pictures_with_a_table_of_their_names(tmp_path):
    picture(tmp_path / "set" / "train" / "a.png")
    rows = [{"file_name": "a.png", "text": "hello"}]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (sample,) = load(Hub(str(tmp_path / "set"), {"image": "image", "text": "text"}), Ocr())
    assert load_image(sample.image).size == (200, 100)


def test_an_image_column_of_the_library_may_hold_paths_only(tmp_path):
    path = picture(tmp_path / "images" / "a.png")
    table = datasets.Dataset.from_dict({"image": [str(path)], "text": ["hello"]}).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "set")
    (sample,) = load(Hub(str(tmp_path / "set"), {"image": "image", "text": "text"}), Ocr())
    assert load_image(sample.image).size == (200, 100)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (b"", "has none of the known forms"),
        (b"no picture", r"cannot read .*a\.parquet:2 as an image \(it has none of the known forms\)"),
        (None, "its cell is empty"),
        ("half", "cannot read"),
    ],
)
@pytest.mark.parametrize("is_object", [True, False])
def test_a_bad_picture_in_a_table_spoils_its_row_only(tmp_path, cell, sentence, is_object, caplog):
    good = bytes_of(tmp_path)
    cells = [good, good[: len(good) // 2] if cell == "half" else cell]
    rows = [{"image": {"bytes": cell, "path": None} if is_object else cell, "text": "x"} for cell in cells]
    source = Hub(write(tmp_path / "a.parquet", rows), {"image": "image", "text": "text"})
    with pytest.raises(DataError, match=rf"a\.parquet:2: image: .*{sentence}") as caught:
        load(source, Ocr())
    assert "0x" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(load(source, Ocr(), on_bad_row="skip")) == 1
    assert "1 of 2 rows cannot be used" in caplog.text


def test_a_row_without_a_path_is_bad(tmp_path):
    picture(tmp_path / "a.png")
    path = write(tmp_path / "a.parquet", [{"image": "a.png", "text": "x"}, {"image": None, "text": "x"}])
    source = Hub(path, {"image": "image", "text": "text"}, images=tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet:2: image: is missing, the row needs a path here"):
        load(source, Ocr())
    assert len(load(source, Ocr(), on_bad_row="skip")) == 1


# ------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "columns", "task", "sentence"),
    [
        ({"q": None, "b": [1, 1, 5, 5]}, {"question": "q", "box": "b"}, Grounding(), "question: is missing"),
        ({"q": "x", "b": None}, {"question": "q", "box": "b"}, Grounding(), "box: is missing"),
        ({"q": "x", "b": [1, None, 5, 5]}, {"question": "q", "box": "b"}, Grounding(), "y1 is None, not a number"),
        ({"q": "x", "b": [1.0, float("nan"), 5, 5]}, {"question": "q", "box": "b"}, Grounding(), "not a finite number"),
        ({"q": "x", "b": [1, 1, 5]}, {"question": "q", "box": "b"}, Grounding(), r"box: must be \[x1, y1, x2, y2\]"),
        ({"q": "x", "b": [1, 1, 500, 5]}, {"question": "q", "box": "b"}, Grounding(), "box: must lie inside the image"),
        ({"q": [], "b": [1, 1, 5, 5]}, {"question": "q", "box": "b"}, Grounding(), "question: is missing"),
        ({"q": [None], "b": [1, 1, 5, 5]}, {"question": "q", "box": "b"}, Grounding(), "question: is missing"),
        ({"q": ["a", "b"], "t": ["c"]}, {"question": "q", "text": "t"}, Ocr(), "question: must be as many as .* text"),
        ({"o": None}, {"objects.box": "o.b", "objects.label": "o.l"}, DETECT, "objects: must be lists of as many"),
        ({"o": {"b": [[1, 1, 5, 5]], "l": ["dog", "cat"]}}, {"objects.box": "o.b", "objects.label": "o.l"}, DETECT,
         "objects: must be lists of as many boxes as labels"),
        ({"o": {"b": [[1, 1, 5, 5]], "l": ["ant"]}}, {"objects.box": "o.b", "objects.label": "o.l"}, DETECT,
         "among the 3 categories, got 'ant'"),
        ({"l": "dogs", "p": {"x": [1], "y": [1, 2]}}, {"label": "l", "points": "p"}, Counting(), "points: must be a"),
        ({"l": "dogs", "n": -1}, {"label": "l", "count": "n"}, Counting(), "count: must be a whole number"),
    ],
)  # fmt: skip
def test_a_bad_cell_spoils_its_row_only(tmp_path, row, columns, task, sentence, caplog):
    objects = {"b": [[1, 1, 5, 5]], "l": ["dog"]}
    fine = {"q": "x", "b": [1, 1, 5, 5], "t": "x", "o": objects, "l": "dogs", "p": {"x": [1], "y": [1]}, "n": 0}
    fine = {key: [fine[key]] if isinstance(row[key], list) and key in "qt" else fine[key] for key in row}
    image = {"image": bytes_of(tmp_path)}
    source = Hub(write(tmp_path / "a.parquet", [image | fine, image | row]), columns | {"image": "image"})
    with pytest.raises(DataError, match=rf"a\.parquet:2: .*{sentence}") as caught:
        load(source, task)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(load(source, task, on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    "points",
    [
        {"x": [20.0, 100.0], "y": [10.0, 50.0]},
        [{"x": 20.0, "y": 10.0}, {"x": 100.0, "y": 50.0}],
        [[20.0, 10.0], [100.0, 50.0]],
    ],
)
def test_points_come_in_three_forms(tmp_path, points):
    path = write(tmp_path / "a.parquet", [{"image": bytes_of(tmp_path), "label": "dogs", "points": points}])
    (sample,) = load(Hub(path, {"image": "image", "label": "label", "points": "points"}), Counting())
    assert sample.target.points == ((0.1, 0.1), (0.5, 0.5))


def test_a_unit_holds_for_all_rows(tmp_path):
    row = {"image": bytes_of(tmp_path), "q": "dog", "b": [100, 100, 350, 500]}
    columns = {"image": "image", "question": "q", "box": "b"}
    (sample,) = load(Hub(write(tmp_path / "a.parquet", [row]), columns, unit="thousandths"), Grounding())
    assert sample.target.box == (0.1, 0.1, 0.35, 0.5)


# ------------------------------------------------------------------------------------------------- settings and files


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"text": "text"}, "columns: does not say which column holds the image; its keys are image, id"),
        ({"image": "image", "caption": "text"}, "columns: has the unknown key 'caption'; its keys are"),
        ({"image": "image", "objects.box": "o.b"}, "columns: objects.box and objects.label belong together"),
    ],
)
def test_columns_that_make_no_rows_are_refused_at_once(columns, sentence):
    with pytest.raises(UserError, match=sentence):
        Hub("x", columns)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": "picture"}, "has no column 'picture', only image, text, o"),
        ({"image": "image", "text": "words"}, "has no column 'words', only image, text, o"),
        ({"image": "image", "text": "o.words"}, "has no column 'o.words', only image, text, o"),
        ({"image": "o.t"}, "has no column 'o.t', only image, text, o"),
        ({"image": "o", "text": "text"}, "must hold images or paths in column 'o', not {'t': "),
    ],
)
def test_columns_that_are_not_there_are_named_beside_those_that_are(tmp_path, columns, sentence):
    path = write(tmp_path / "a.parquet", [{"image": b"x", "text": "x", "o": {"t": "x"}}])
    with pytest.raises(DataError, match=rf"a\.parquet: {sentence}"):
        len(Hub(path, columns))


def test_what_is_no_data_set_is_an_error_of_one_sentence(tmp_path):
    columns = {"image": "image", "text": "text"}
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing of the kind")
    (tmp_path / "none.parquet").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text('{"image": \n[}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    datasets.DatasetDict(val=datasets.Dataset.from_dict({"image": ["a"]})).save_to_disk(tmp_path / "splits")
    for name in ("bad.parquet", "none.parquet", "bad.jsonl", "folder", "saved", "splits"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as a data set \(.+\)") as caught:
            len(Hub(str(tmp_path / name), columns))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"nope\.parquet: no such file"):
        len(Hub(str(tmp_path / "nope.parquet"), columns))
    with pytest.raises(DataError, match=r"somebody/nothing: cannot be read as a data set \(.+\)"):
        len(Hub("somebody/nothing", columns))


def test_an_empty_table_is_an_error(tmp_path):
    schema = pyarrow.schema([("image", pyarrow.binary()), ("text", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([], schema=schema), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"is empty|cannot be read as a data set"):
        load(Hub(str(tmp_path / "a.parquet"), {"image": "image", "text": "text"}), Ocr())


def test_a_table_that_pandas_wrote_is_read(tmp_path):
    image_size = pandas.DataFrame({"image": [bytes_of(tmp_path)], "text": ["hello"]})
    image_size.to_parquet(tmp_path / "a.parquet")
    (sample,) = load(Hub(str(tmp_path / "a.parquet"), {"image": "image", "text": "text"}), Ocr())
    assert sample.target.text == "hello"


def test_fingerprint_knows_content_columns_and_settings_but_not_places(tmp_path):
    columns = {"image": "image", "text": "text"}
    rows = [{"image": bytes_of(tmp_path), "text": "one", "other": "two"}]
    here = Hub(write(tmp_path / "a" / "x.parquet", rows), columns).fingerprint()
    assert here == Hub(write(tmp_path / "b" / "y.parquet", rows), columns).fingerprint()
    folders = [Hub(str(tmp_path / name), columns).fingerprint() for name in "ab"]
    write(tmp_path / "c" / "x.parquet", rows)
    assert Hub(str(tmp_path / "c"), columns).fingerprint() == folders[0]
    path = str(tmp_path / "a" / "x.parquet")
    others = [
        *folders,
        Hub(path, columns | {"text": "other"}).fingerprint(),
        Hub(path, columns, corners=False).fingerprint(),
        Hub(path, columns, unit="percent").fingerprint(),
        Hub(path, columns, take="first:1").fingerprint(),
        Hub(write(tmp_path / "d.parquet", [*rows, *rows]), columns).fingerprint(),
    ]
    assert len({here, *others}) == 8
    digest = hashlib.sha256((tmp_path / "a" / "x.parquet").read_bytes()).hexdigest()
    assert digest == hashlib.sha256((tmp_path / "b" / "y.parquet").read_bytes()).hexdigest()


def test_only_what_is_on_the_hub_has_an_id_there(tmp_path):
    columns = {"image": "image"}
    assert Hub("allenai/pixmo-count", columns).hub_id == "allenai/pixmo-count"
    assert Hub(str(tmp_path), columns).hub_id is None
    assert Hub("data/rows.parquet", columns).hub_id is None
