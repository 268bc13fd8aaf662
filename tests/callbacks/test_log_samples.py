"""Cards in TensorBoard and on disk."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1.callbacks.log_samples import LogSamples, sample_card, summarise
from perception_r1.records import Overlay
from tests.callbacks.toy import ToyData, ToyModule, ToyTask, toy_samples, toy_scored, toy_trainer


def test_each_validation_logs_the_first_samples_and_the_folder_keeps_first_and_last(tmp_path: Path):
    toy_trainer(tmp_path, [LogSamples(num_samples=3)], enable_progress_bar=False).fit(ToyModule(), datamodule=ToyData())

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["val/sample_0", "val/sample_1", "val/sample_2"]
    assert [event.step for event in events.Images("val/sample_0")] == [1, 3]  # as metrics; none of the sanity check
    names = {str(path.relative_to(tmp_path / "run")) for path in tmp_path.rglob("*.png")}
    assert names == {f"samples/{which}/{name}.png" for which in ("first", "last") for name in ("0", "1", "2", "sheet")}
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


def test_targets_in_words():
    @dataclass(frozen=True)
    class Count:
        count: int
        points: tuple[float, ...] | None = None

    @dataclass(frozen=True)
    class Page:
        text: str

    assert summarise(None, [Overlay(shape=(0.1, 0.2))]) == "1 point"
    assert summarise(None, [Overlay(shape=(0.1, 0.2), caption="cup")] * 2) == "2 points: 2 cup"
    assert summarise(Count(count=3), []) == "count: 3\npoints: None"
    assert summarise(Page(text="Hello"), []) == "Hello"
    assert summarise("Hello", []) == "Hello"
