"""Which samples a report shows, and what it holds of them."""

import base64
import json

import pytest

from perception_r1.reporting import cards
from perception_r1.reporting.cards import make_cards
from perception_r1.reporting.folder import read_record
from tests.reporting.runs import make_evaluation, make_run, row, write_rows


def test_a_card_has_a_sample_with_its_picture_and_the_answers_of_all_runs(tmp_path):
    records = [read_record(make_run(tmp_path / "run")), read_record(make_evaluation(tmp_path / "eval-1"))]
    found = make_cards(records, 10)
    assert [(column.run, column.when) for column in found.columns] == [(0, "before"), (0, "after"), (1, "after")]
    assert [card["id"] for card in found.cards] == ["test-0", "test-1", "test-2", "test-3"]  # the order of the data
    first = found.cards[0]
    assert (first["prompt"], first["target"], first["width"]) == ("Count the cups", "0 cups", 80)
    assert [answer["reward"] for answer in first["answers"]] == [0.5, 1.0, 1.0]
    kind, _, data = found.images[first["image"]].partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = next((tmp_path / "run" / "predictions" / "test" / "images").iterdir())
    assert base64.b64decode(data)[:3] == picture.read_bytes()[:3]
    json.dumps(found.cards, allow_nan=False)


def test_those_that_tell_most_are_shown_where_not_all_can_be(tmp_path):
    before, after = [0.5] * 50, [0.5] * 50
    after[7], after[31], after[44] = 1.0, 0.0, 0.9
    found = make_cards([read_record(make_run(tmp_path / "run", before=before, after=after))], 4)
    assert found.num_samples == 50
    assert {card["id"] for card in found.cards} >= {"test-7", "test-31"}
    assert len(found.cards) == 4
    assert len(found.images) == 4


def test_samples_without_a_picture_are_shown_only_where_none_has_one(tmp_path):
    folder = make_run(tmp_path / "run")
    images = sorted((folder / "predictions" / "test" / "images").iterdir())
    images[0].unlink()
    assert len(make_cards([read_record(folder)], 10).cards) == 3
    for path in images[1:]:
        path.unlink()
    found = make_cards([read_record(folder)], 10)
    assert [card["image"] for card in found.cards] == [None] * 4
    assert found.images == []


def test_the_pictures_of_a_page_are_bounded(tmp_path, monkeypatch):
    record = read_record(make_run(tmp_path / "run"))
    size = len(make_cards([record], 1).images[0])
    monkeypatch.setattr(cards, "MAX_IMAGE_BYTES", 2 * size + size // 2)
    assert len(make_cards([record], 10).images) == 2


def test_a_file_that_is_no_picture_is_none(tmp_path):
    folder = make_run(tmp_path / "run")
    for path in (folder / "predictions" / "test" / "images").iterdir():
        path.write_text("<svg onload='alert(1)'>")
    assert make_cards([read_record(folder)], 10).images == []


def test_long_texts_and_many_boxes_are_cut(tmp_path):
    boxes = [{"shape": [0.0, 0.0, 1.0, 1.0], "caption": "x"}] * 1000
    rows = [row(0, 0.5, completion="y" * 50_000, predicted_overlays=boxes)]
    found = make_cards([read_record(make_run(tmp_path / "run", before=(0.5,), after=(0.5,), rows=rows))], 10)
    answer = found.cards[0]["answers"][1]
    assert len(answer["completion"]) < 2100
    assert answer["completion"].endswith("(50,000 characters)")
    assert len(answer["overlays"]) == 200


def test_no_answers_are_no_cards(tmp_path):
    folder = make_run(tmp_path / "run", after=None)
    found = make_cards([read_record(folder)], 10)
    assert found.cards == []
    write_rows(folder / "predictions" / "val" / "before.jsonl", [row(0, 0.25)])
    assert len(make_cards([read_record(folder)], 10).cards) == 1
    assert make_cards([read_record(folder)], 0).cards == []


@pytest.mark.parametrize("count", [1, 3])
def test_cards_are_shared_among_runs_of_different_tasks(tmp_path, count):
    other = {"class_path": "perception_r1.tasks.ocr.Ocr", "init_args": {}}
    records = [read_record(make_run(tmp_path / "a")), read_record(make_run(tmp_path / "b", task=other))]
    found = make_cards(records, count)
    assert len(found.cards) == count
    assert len({card["task"] for card in make_cards(records, 8).cards}) == 2
    assert all(sum(answer is not None for answer in card["answers"]) == 2 for card in found.cards)
