"""Cards in TensorBoard and on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1.callbacks.log_samples import LogSamples, answer_fields, sample_card
from perception_r1.drawing import contact_sheet
from perception_r1.records import Overlay
from perception_r1.tasks.ocr import Ocr
from tests.callbacks.toy import ToyData, ToyModule, ToyTask, toy_samples, toy_scored, toy_trainer


def test_the_first_samples_are_logged_before_training_and_at_each_validation(
    tmp_path: Path,
):
    toy_trainer(tmp_path, [LogSamples(num_samples=3)], enable_progress_bar=False).fit(ToyModule(), datamodule=ToyData())

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["val/sample_0", "val/sample_1", "val/sample_2"]
    assert [event.step for event in events.Images("val/sample_0")] == [0, 1, 3]  # as metrics; none of the sanity check
    names = {str(path.relative_to(tmp_path / "run")) for path in tmp_path.rglob("*.png")}
    cards = {f"samples/{which}/{name}.png" for which in ("first", "last") for name in ("0", "1", "2")}
    assert names == cards | {"samples/sheet.png"}
    assert Image.open(tmp_path / "run/samples/first/0.png").width == 960


def test_the_first_cards_stay_when_a_run_goes_on(tmp_path: Path):
    trainer = toy_trainer(tmp_path, [LogSamples(num_samples=1)])
    trainer.fit(ToyModule(), datamodule=ToyData())
    first = (tmp_path / "run/samples/first/0.png").read_bytes()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(ToyModule(), datamodule=ToyData())
    assert (tmp_path / "run/samples/first/0.png").read_bytes() == first
    assert (tmp_path / "run/samples/last/0.png").read_bytes() != first


def test_other_loggers_get_no_pictures_but_the_folder_does(tmp_path: Path):
    toy_trainer(tmp_path, [LogSamples(num_samples=1)], logger=CSVLogger(tmp_path, name="", version="csv")).fit(
        ToyModule(), datamodule=ToyData()
    )
    assert (tmp_path / "csv/samples/last/0.png").exists()


def test_nothing_is_kept_in_a_fast_dev_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    toy_trainer(tmp_path, [LogSamples()], fast_dev_run=True).fit(ToyModule(), datamodule=ToyData())
    assert not list(tmp_path.rglob("*.png"))


def test_no_pictures_when_none_are_asked_for(tmp_path: Path):
    toy_trainer(tmp_path, [LogSamples(num_samples=0)]).fit(ToyModule(), datamodule=ToyData())
    assert not (tmp_path / "run/samples").exists()
    with pytest.raises(ValueError, match="num_samples is -1"):
        LogSamples(num_samples=-1)


@pytest.mark.parametrize("completion", ["", "\x00\u202e\ud800" * 100, "中文" * 10_000])
def test_a_card_is_drawn_for_any_completion(completion: str):
    scored = replace(toy_scored(toy_samples(1)[0], completion, is_right=False), is_truncated=True)
    assert sample_card(ToyTask(), scored, step=3).width == 960


def test_the_card_is_the_same_whether_or_not_the_image_is_loaded(tmp_path: Path):
    loaded = toy_samples(1)[0]
    loaded.image.save(tmp_path / "a.png")
    cards = [
        sample_card(ToyTask(), toy_scored(sample), step=0)
        for sample in (loaded, replace(loaded, image=tmp_path / "a.png"))
    ]
    assert cards[0].tobytes() == cards[1].tobytes()


def test_first_and_last_stand_side_by_side(tmp_path: Path):
    toy_trainer(tmp_path, [LogSamples(num_samples=2)]).fit(ToyModule(), datamodule=ToyData())
    samples = tmp_path / "run/samples"
    cards = [Image.open(samples / which / f"{index}.png") for index in range(2) for which in ("first", "last")]
    assert cards[0].tobytes() != cards[1].tobytes()
    with Image.open(samples / "sheet.png") as sheet:
        assert ImageChops.difference(sheet, contact_sheet(cards)).getbbox() is None


def test_first_cards_that_were_cut_off_are_written_again(tmp_path: Path):
    (tmp_path / "run/samples/first.tmp").mkdir(parents=True)
    (tmp_path / "run/samples/first.tmp/0.png").write_bytes(b"half a card")
    toy_trainer(tmp_path, [LogSamples(num_samples=2)]).fit(ToyModule(), datamodule=ToyData())
    assert {path.name for path in (tmp_path / "run/samples").iterdir()} == {"first", "last", "sheet.png"}
    assert Image.open(tmp_path / "run/samples/first/0.png").width == 960


def test_more_cards_than_at_first_leave_the_sheet_as_long_as_the_first_were(tmp_path: Path):
    for num_samples in (1, 3):
        toy_trainer(tmp_path, [LogSamples(num_samples=num_samples)]).fit(ToyModule(), datamodule=ToyData())
    assert (tmp_path / "run/samples/last/2.png").exists()
    card, sheet = (Image.open(tmp_path / f"run/samples/{name}.png") for name in ("last/0", "sheet"))
    assert sheet.height < 2 * card.height


def test_a_card_says_what_was_read_unless_the_text_says_just_that():
    scored = toy_scored(toy_samples(1)[0], "here<|im_end|>")
    assert answer_fields(ToyTask(), scored) == {"prediction": "1 box: thing", "completion": "here<|im_end|>"}
    unread = replace(scored, prediction=None, is_truncated=True, num_tokens=7)
    assert answer_fields(ToyTask(), unread) == {
        "prediction": "no answer could be read",
        "completion": "here<|im_end|>\n[cut off after 7 tokens]",
    }
    for prediction, names in (("here", ["completion"]), ("", ["prediction", "completion"])):
        assert list(answer_fields(Ocr(), replace(scored, prediction=prediction))) == names


def test_a_task_that_says_nothing_about_it_still_has_plain_words():
    @dataclass(frozen=True)
    class Count:
        count: int
        points: tuple[Overlay, ...] | None = None
        crowd_points: tuple[Overlay, ...] = ()

    @dataclass(frozen=True)
    class Page:
        text: str

    class Anything(ToyTask):
        def overlays(self, answer: Any) -> Sequence[Overlay]:
            return answer if isinstance(answer, list) else []

    describe = Anything().describe
    assert describe([Overlay(shape=(0.1, 0.2))]) == "1 point"
    assert describe([Overlay(shape=(0.1, 0.2), caption=name) for name in ("cup", "ball", "cup")]) == (
        "3 points: ball, 2x cup"
    )
    assert describe(Count(count=3)) == "count: 3"
    assert describe(Count(count=0, points=(), crowd_points=())) == "count: 0"
    assert describe(Page(text="Hello")) == describe("Hello") == "Hello"
    assert describe(("red", 3)) == "red, 3"
    for empty in ([], (), None, "", " ", Page(text="")):
        assert describe(empty) == "nothing"
