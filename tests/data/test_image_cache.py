"""Images are checked once: by one process for all, and not again in a second run; whatever happens to the cache."""

import multiprocessing
import os
import sqlite3
import time
from pathlib import Path

import pytest
from PIL import Image

from perception_r1.data import image_cache
from perception_r1.data.image_cache import ImageCache, cache_folder
from perception_r1.data.images import ImageError, check_image
from perception_r1.data.module import TaskDataModule
from perception_r1.data.samples import load
from perception_r1.data.sources import JsonLines
from perception_r1.data.synthetic.pages import TextWorld
from perception_r1.records import ImageBytes


class Counting:
    """`check_image`, and what it was asked for."""

    def __init__(self):
        self.seen = []

    def __call__(self, sources):
        self.seen += [Path(str(source)).name for source in sources]
        return [size_or_error(source) for source in sources]


def size_or_error(source):
    try:
        return check_image(source)
    except ImageError as error:
        return error


def images(folder, count=4):
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (10 + number, 5)).save(path)
    return paths


@pytest.fixture
def cache(tmp_path):
    return ImageCache(tmp_path / "of the user" / "images.sqlite")


def sizes(cache, paths, measure=None, is_decoded=True):
    return cache.sizes(paths, measure or Counting(), is_decoded=is_decoded)


def test_a_second_check_opens_no_image(cache, tmp_path):
    paths, measure = images(tmp_path), Counting()
    expected = [(10 + number, 5) for number in range(4)]
    assert sizes(cache, paths[:3], measure) == expected[:3]
    assert sizes(ImageCache(cache.path), paths[::-1], measure) == expected[::-1]
    assert measure.seen == ["0.png", "1.png", "2.png", "3.png"]


def test_an_image_that_has_changed_is_checked_again(cache, tmp_path):
    path = images(tmp_path, 1)[0]
    sizes(cache, [path])
    os.utime(path, ns=(1, 1))
    for width in (10, 77):
        measure = Counting()
        assert sizes(cache, [path], measure) == [(width, 5)]
        assert measure.seen == ["0.png"]
        Image.new("RGB", (77, 5)).save(path)


def test_an_image_that_changes_while_it_is_checked_is_checked_again(cache, tmp_path):
    path = images(tmp_path, 1)[0]

    def measure(sources):
        found = [size_or_error(source) for source in sources]
        Image.new("RGB", (77, 5)).save(path)
        return found

    assert sizes(cache, [path], measure) == [(10, 5)]
    assert sizes(cache, [path]) == [(77, 5)]


def test_what_was_decoded_need_not_be_read_but_what_was_read_must_be_decoded(cache, tmp_path):
    first, second = images(tmp_path, 2)
    sizes(cache, [first], is_decoded=True)
    sizes(cache, [second], is_decoded=False)
    for is_decoded, expected in ((False, []), (True, ["1.png"]), (True, [])):
        measure = Counting()
        sizes(cache, [first, second], measure, is_decoded)
        assert measure.seen == expected


def test_bad_images_and_images_of_tables_are_checked_each_time(cache, tmp_path):
    bad, missing, good = tmp_path / "bad.png", tmp_path / "none.png", images(tmp_path, 1)[0]
    bad.write_bytes(b"no image")
    table = ImageBytes("table:1", good.read_bytes)
    for expected in (["bad.png", "none.png", "0.png", "table:1"], ["bad.png", "none.png", "table:1"]):
        measure = Counting()
        found = sizes(cache, [bad, missing, good, table], measure)
        assert [type(size) for size in found] == [ImageError, ImageError, tuple, tuple]
        assert sorted(measure.seen) == sorted(expected)


@pytest.mark.parametrize("rubbish", [b"", b"rubbish" * 1000, None], ids=["empty", "rubbish", "other tables"])
def test_a_damaged_cache_is_ignored_and_then_made_anew(cache, tmp_path, rubbish):
    paths = images(tmp_path)
    sizes(cache, paths)
    if rubbish is None:
        cache.path.unlink()
        with sqlite3.connect(cache.path) as database:
            database.execute("CREATE TABLE images (path)")
    else:
        cache.path.write_bytes(rubbish)
    found = [sizes(cache, paths) for _ in range(2)]
    assert found == [[(10 + number, 5) for number in range(4)]] * 2


def test_a_cache_that_was_cut_off_is_ignored_and_then_made_anew(cache, tmp_path):
    paths = images(tmp_path, 40)
    sizes(cache, paths)
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[: len(data) // 2 + 100])
    for _ in range(2):
        assert sizes(cache, paths) == [(10 + number, 5) for number in range(40)]
    measure = Counting()
    sizes(cache, paths, measure)
    assert measure.seen == []


@pytest.mark.parametrize("place", ["folder/images.sqlite", "file/images.sqlite"])
def test_without_a_place_for_it_images_are_checked_as_ever(tmp_path, place):
    (tmp_path / "folder" / "images.sqlite").mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    paths = images(tmp_path)
    for _ in range(2):
        measure = Counting()
        assert sizes(ImageCache(tmp_path / place), paths, measure) == [(10 + number, 5) for number in range(4)]
        assert len(measure.seen) == 4


def check_slowly(path, paths, queue):
    def measure(sources):
        time.sleep(0.05 * len(sources))
        queue.put(len(sources))
        return [check_image(source) for source in sources]

    cache = ImageCache(path)
    for start in range(0, len(paths), 4):
        cache.sizes(paths[start : start + 4], measure, is_decoded=True)


def test_of_several_processes_one_checks_and_the_others_read(cache, tmp_path):
    context = multiprocessing.get_context("fork")
    paths, queue = images(tmp_path, 12), context.Queue()
    processes = [context.Process(target=check_slowly, args=(cache.path, paths, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    checked = 0
    while checked < 12:
        checked += queue.get(timeout=10)
    assert checked == 12
    assert queue.empty()


def test_whoever_waits_too_long_checks_himself(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_LOCK_SECONDS", 0.01)
    monkeypatch.setattr(image_cache, "_PATIENCE_SECONDS", 0.05)
    paths = images(tmp_path)
    sizes(cache, paths[:1])
    with sqlite3.connect(cache.path, isolation_level=None) as hanging:
        hanging.execute("BEGIN IMMEDIATE")
        measure = Counting()
        assert sizes(cache, paths, measure) == [(10 + number, 5) for number in range(4)]
        assert measure.seen == ["1.png", "2.png", "3.png"]
        hanging.execute("ROLLBACK")


def test_rows_are_loaded_again_without_decoding_an_image(task, write_rows, cache, monkeypatch):
    path = write_rows([{"image": f"{k % 3}.png", "text": "a"} for k in range(6)])
    first = load(JsonLines(path), task, cache=cache)
    monkeypatch.setattr("perception_r1.data.samples.check_image", None)
    again = load(JsonLines(path), task, cache=cache)
    assert [(s.id, s.width, s.height) for s in again] == [(s.id, s.width, s.height) for s in first]


def test_a_data_module_keeps_what_it_has_checked(task, write_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEPTION_R1_CACHE", str(tmp_path / "own"))
    path = write_rows([{"image": f"{k}.png", "text": "a"} for k in range(12)], num_images=12)
    data = [TaskDataModule(task, TextWorld(), train_file=path) for _ in range(2)]
    data[0].setup("fit")
    monkeypatch.setattr("perception_r1.data.samples.check_image", None)
    data[1].setup("fit")
    assert [s.id for s in data[1].samples("train")] == [s.id for s in data[0].samples("train")]


def test_the_folder_is_that_of_the_user_unless_another_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("PERCEPTION_R1_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "perception-r1"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/perception-r1")
    monkeypatch.setenv("PERCEPTION_R1_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
