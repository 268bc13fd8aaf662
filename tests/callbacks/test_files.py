"""Writing that cannot leave half a file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from perception_r1.callbacks import files


def test_json_is_indented_ends_with_a_newline_and_has_null_for_what_is_not_finite(tmp_path: Path):
    files.write_json(tmp_path / "deep" / "a.json", {"x": float("nan"), "y": (1, "é")})
    text = (tmp_path / "deep" / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "\n  " in text
    assert json.loads(text) == {"x": None, "y": [1, "é"]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.write_json(tmp_path / "a.json", {"x": 1})

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


@pytest.mark.parametrize("name", ["card.png", "card.jpg"])
def test_a_picture_is_there_whole_or_as_it_was(tmp_path, monkeypatch, name):
    path, plain = tmp_path / name, Image.Image.save
    files.save_image(Image.new("RGB", (4, 3), "red"), path)
    before = path.read_bytes()
    assert Image.open(path).format == {"card.png": "PNG", "card.jpg": "JPEG"}[name]

    def killed(image, file, **options):
        plain(image, file, **options)
        file.write_bytes(file.read_bytes()[:20])
        raise SystemExit

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(SystemExit):
        files.save_image(Image.new("RGB", (4, 3), "blue"), path)
    assert path.read_bytes() == before
