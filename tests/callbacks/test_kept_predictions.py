"""Answers and pictures that a run keeps."""

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.files import image_name
from perception_r1.callbacks.kept_predictions import IMAGE_SIDE, keep_images, keep_telling_images
from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.errors import UserError
from perception_r1.records import ImageBytes
from tests.callbacks.toy import ToyData, ToyModule, toy_samples, toy_trainer


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_answers_to_the_test_split_are_kept_before_and_after(tmp_path):
    toy_trainer(tmp_path, [BeforeAfter()]).fit(ToyModule(), datamodule=ToyData())
    folder = tmp_path / "run" / "predictions" / "test"
    assert sorted(path.name for path in folder.iterdir()) == ["after.jsonl", "before.jsonl"]
    before, after = (rows_of(folder / f"{when}.jsonl") for when in ("before", "after"))
    assert [row["id"] for row in before] == [row["id"] for row in after] == [f"toy-{index}" for index in range(6)]
    assert {row["reward"] for row in before} == {0.0}
    assert {row["reward"] for row in after} == {1.0}


def test_the_answers_on_the_cards_are_kept_with_their_pictures(tmp_path):
    toy_trainer(tmp_path, [LogSamples(num_samples=2)]).fit(ToyModule(), datamodule=ToyData())
    folder = tmp_path / "run" / "predictions" / "val"
    assert [row["reward"] for row in rows_of(folder / "before.jsonl")] == [0.0, 0.0]
    assert [row["reward"] for row in rows_of(folder / "after.jsonl")] == [1.0, 1.0]
    names = {image_name("", f"toy-{index}") for index in range(2)}
    assert {path.name for path in (folder / "images").iterdir()} == names


def test_a_run_that_fails_keeps_what_was_answered_before_it(tmp_path):
    with pytest.raises(RuntimeError):
        toy_trainer(tmp_path, [BeforeAfter()]).fit(ToyModule(fail_at=1), datamodule=ToyData())
    folder = tmp_path / "run" / "predictions" / "test"
    assert [path.name for path in folder.iterdir()] == ["before.jsonl"]


def test_half_an_evaluation_is_not_kept(tmp_path):
    class Breaks(ToyModule):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("The toy broke.")
            return super().test_step(batch, batch_idx, dataloader_idx)

    folder = tmp_path / "run" / "predictions" / "test"
    with pytest.raises(RuntimeError):
        toy_trainer(tmp_path, [BeforeAfter()]).fit(Breaks(), datamodule=ToyData())
    assert not (folder / "before.jsonl").exists()
    toy_trainer(tmp_path, [BeforeAfter()]).fit(ToyModule(), datamodule=ToyData())  # in the same folder
    assert sorted(path.name for path in folder.iterdir()) == ["after.jsonl", "before.jsonl"]
    assert len(rows_of(folder / "before.jsonl")) == 6


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_trainer(tmp_path, [BeforeAfter()], logger=False).fit(ToyModule(), datamodule=ToyData())
    assert not list(tmp_path.rglob("predictions"))


def test_pictures_are_small_and_look_like_the_images(tmp_path):
    samples = toy_samples(3)
    large = Image.linear_gradient("L").resize((2000, 1000)).convert("RGBA")
    stored = io.BytesIO()
    large.convert("RGB").save(stored, format="PNG")
    samples[1] = replace(samples[1], image=large)
    samples[2] = replace(samples[2], image=ImageBytes("a", stored.getvalue), source="a/b")
    keep_images(tmp_path, samples)
    found = [Image.open(tmp_path / "images" / image_name(each.source, each.id)) for each in samples]
    assert [image.size for image in found] == [(64, 48), (IMAGE_SIDE, IMAGE_SIDE // 2), (IMAGE_SIDE, IMAGE_SIDE // 2)]
    assert found[0].getpixel((30, 20)) == pytest.approx((200, 200, 200), abs=2)
    assert found[1].getpixel((200, 112))[0] == pytest.approx(128, abs=4)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    keep_images(tmp_path, samples)  # they are there
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == written


def test_pictures_are_those_of_the_samples_that_tell_most(tmp_path):
    for when, rewards in (("before", [0.5] * 9), ("after", [0.5] * 4 + [1.0] + [0.5] * 3 + [0.0])):
        lines = [
            json.dumps({"id": f"toy-{index}", "source": "", "reward": reward}) for index, reward in enumerate(rewards)
        ]
        (tmp_path / f"{when}.jsonl").write_text("\n".join([*lines, ""]))
    keep_telling_images(tmp_path, iter(toy_samples(9)), 2)
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {image_name("", "toy-4"), image_name("", "toy-8")}


def test_keeping_answers_changes_no_number(tmp_path, monkeypatch):
    draws = []
    for name, callbacks in (("a", [BeforeAfter(), LogSamples(num_samples=2)]), ("b", [])):
        torch.manual_seed(0)
        module = ToyModule()
        toy_trainer(tmp_path / name, callbacks).fit(module, datamodule=ToyData())
        draws.append((module.layer.weight.tolist(), torch.rand(3).tolist()))
    assert draws[0][0] == draws[1][0]


def test_a_negative_number_of_pictures_is_refused():
    with pytest.raises(UserError, match="num_images is -1"):
        BeforeAfter(num_images=-1)
