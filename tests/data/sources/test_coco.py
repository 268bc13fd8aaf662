import contextlib
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perception_r1.data.samples import load
from perception_r1.data.sources import Coco, DataError
from perception_r1.records import LabelledBox
from perception_r1.tasks.detection import Detection
from tests.public_data import CATEGORIES, coco_file, coco_image, instance, picture, write_json

TASK = Detection(categories=("person", "dog", "toothbrush"))
RLE = {"counts": [0, 5, 19995], "size": [100, 200]}


@pytest.fixture
def make(tmp_path):
    """A source of two images, of the given file or of annotations of image 7."""

    def make(annotations=(), file=None, **options) -> Coco:
        for name in ("7.jpg", "3.jpg"):
            picture(tmp_path / "images" / name)
        images = [coco_image(7, "7.jpg"), coco_image(3, "3.jpg")]
        path = tmp_path / "instances.json"
        write_json(path, coco_file(images, annotations) if file is None else file)
        return Coco(path, tmp_path / "images", **options)

    return make


def test_all_objects_of_each_image_in_ascending_order_of_the_images(make):
    source = make(
        [
            instance(1, 7, 90, (0, 0, 200, 100)),
            instance(2, 3, 1, (20, 10, 50, 40)),
            instance(3, 7, 18, (100, 50, 10, 25), segmentation=RLE, iscrowd=1, area=5.0),
        ]
    )
    three, seven = load(source, TASK)
    assert (three.id, seven.id) == ("3", "7")
    assert three.target.objects == (LabelledBox(label="person", box=(0.1, 0.1, 0.35, 0.5)),)
    assert seven.target.objects == (LabelledBox(label="toothbrush", box=(0.0, 0.0, 1.0, 1.0)),)
    assert seven.target.crowds == (LabelledBox(label="dog", box=(0.5, 0.5, 0.55, 0.75)),)
    assert (three.target.areas, seven.target.areas) == ((2000.0,), (20000.0,))
    assert [row.values["objects"] for row in source] == [
        [{"box": [20, 10, 70, 50], "label": "person", "area": 2000}],
        [
            {"box": [0, 0, 200, 100], "label": "toothbrush", "area": 20000},
            {"box": [100, 50, 110, 75], "label": "dog", "area": 5, "crowd": True},
        ],
    ]
    assert [row.image.name for row in source] == ["3.jpg", "7.jpg"]


def test_images_without_objects_are_samples_too(make):
    assert [sample.target.objects for sample in load(make(), TASK)] == [(), ()]


def test_categories_keep_their_order_used_or_not(make):
    assert make(file=coco_file([], [], CATEGORIES[::-1])).labels() == ("person", "dog", "toothbrush")


def test_objects_whose_box_has_no_width_or_height_are_left_out(make):
    source = make([instance(1, 7, 1, (5, 5, 0, 9)), instance(2, 7, 1, (5, 5, 9, 0)), instance(3, 7, 1, (5, 5, 1, 1))])
    assert len(load(source, TASK)[1].target.objects) == 1


def test_a_box_a_fraction_outside_is_cut_and_one_further_out_is_an_error(make):
    (box,) = load(make([instance(1, 7, 1, (-0.01, 10, 200.5, 90.01))]), TASK)[1].target.objects
    assert box.box == (0.0, 0.1, 1.0, 1.0)
    with pytest.raises(
        DataError, match=r"instances\.json:2: objects\[0\]\.box: must lie inside the image of 200 x 100"
    ):
        load(make([instance(1, 7, 1, (150, 10, 52, 9))]), TASK)


def test_a_missing_area_is_that_of_the_box(make):
    file = coco_file([coco_image(7, "7.jpg")], [instance(1, 7, 1, (1, 1, 4, 5)), instance(2, 7, 1, (1, 1, 2, 3))])
    del file["annotations"][0]["area"]
    file["annotations"][1]["area"] = None
    (row,) = make(file=file)
    assert [item["area"] for item in row.values["objects"]] == [20, 6]


def test_a_picture_of_another_size_than_the_file_tells_is_an_error(make, tmp_path):
    source = make()
    picture(tmp_path / "images" / "3.jpg", size=(100, 50))
    with pytest.raises(DataError, match=r"json:1: width: must be that of the upright image, which has 100 x 50 pixels"):
        load(source, TASK)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"bbox": [1, 1, float("nan"), 5]}, r"objects\[0\]\.box: .* x2 is not a finite number"),
        ({"bbox": [9, 9, -3, 5]}, r"objects\[0\]\.box: must have x1 < x2"),
        ({"bbox": [9, 9, 300, 5]}, r"objects\[0\]\.box: must lie inside"),
        ({"category_id": 90}, r"objects: must have labels among the 2 categories, got 'toothbrush'"),
    ],
)
def test_a_bad_object_spoils_its_image_only(make, values, sentence, caplog):
    source = make([instance(1, 7, 1, (1, 1, 5, 5)) | values])
    task = Detection(categories=("person", "dog"))
    with pytest.raises(DataError, match=r"instances\.json:2: " + sentence) as caught:
        load(source, task)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert [sample.id for sample in load(source, task, on_bad_row="skip")] == ["3"]
    assert "1 of 2 rows cannot be used" in caplog.text


IMAGE = coco_image(7, "7.jpg")
FINE = instance(1, 7, 1, (1, 1, 5, 5))


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ([], "in COCO's form"),
        ({}, "something lacks 'images'"),
        ({"images": [], "annotations": []}, "something lacks 'categories'"),
        (coco_file([IMAGE, IMAGE], []), "two of its images have the same id"),
        (coco_file([IMAGE], [], [*CATEGORIES, CATEGORIES[0]]), "two of its categories have the same id"),
        (coco_file([{**IMAGE, "width": None}], []), "in COCO's form"),
        (coco_file([{**IMAGE, "id": float("inf")}], []), "in COCO's form"),
        (coco_file([{"id": 1, "file_name": "x"}], []), "something lacks 'width'"),
        (coco_file([IMAGE], [FINE | {"image_id": 8}]), "annotation 1 belongs to an image or a category"),
        (coco_file([IMAGE], [FINE | {"category_id": 2}]), "annotation 1 belongs to an image or a category"),
        (coco_file([IMAGE], [FINE | {"bbox": [1, 2]}] * 2), "bbox of annotation 1 must be"),
        (coco_file([IMAGE], [FINE | {"bbox": [1, 2, 3, [4]]}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"bbox": [1, 2, "x", 4]}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"bbox": None}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"bbox": [1, 2, 3, 10**400]}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"area": []}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"area": [3]}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"id": 10**30}]), "in COCO's form"),
        (coco_file([IMAGE], [FINE | {"image_id": [7]}]), "in COCO's form"),
        (coco_file([IMAGE], ["bbox"]), "in COCO's form"),
        (coco_file([IMAGE], [None]), "in COCO's form"),
    ],
)
def test_a_file_that_is_none_of_cocos_is_an_error_of_one_sentence(make, file, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        len(make(file=file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}"])
def test_a_file_that_is_no_json_is_an_error_of_one_sentence(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.json: must be an annotation file") as caught:
        len(Coco(tmp_path / "a.json", tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_without_images_are_errors(make, tmp_path):
    with pytest.raises(DataError, match=r"nope\.json: cannot be read \(No such file"):
        len(Coco(tmp_path / "nope.json", tmp_path))
    with pytest.raises(DataError, match="is empty, it needs at least one row"):
        load(make(file=coco_file([], [])), TASK)
    source = make()
    (tmp_path / "images" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r":1: image: no such file: .*3\.jpg"):
        load(source, TASK)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "bbox", "image_id", "category_id", "area", "name"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    spoilt=st.fixed_dictionaries({}, optional=dict.fromkeys(["images", "categories", "annotations"], st.lists(values))),
    item=st.dictionaries(st.sampled_from([*FINE]), values),
    image=st.dictionaries(st.sampled_from([*IMAGE]), values),
)
def test_no_json_value_raises_anything_but_a_data_error(make, spoilt, item, image):
    source = make(file=coco_file([IMAGE | image], [FINE | item]) | spoilt)
    with contextlib.suppress(DataError):
        load(source, TASK, on_bad_row="skip")


def test_the_order_of_keys_and_a_byte_order_mark_do_not_matter(make, tmp_path):
    file = coco_file([IMAGE], [FINE])
    source = make(file=file)
    expected = list(source)
    text = json.dumps(dict(reversed(file.items())))
    (tmp_path / "instances.json").write_text(text, encoding="utf-8-sig")
    assert list(Coco(tmp_path / "instances.json", tmp_path / "images")) == expected
