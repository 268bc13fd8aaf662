import numpy as np
import pytest
from PIL import Image

from perception_r1.data.images import ImageError, check_image, load_image


def picture() -> Image.Image:
    noise = np.random.RandomState(0).randint(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((60, 40))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_and_pixels_are_those_after_the_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    picture().save(path, exif=exif, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    turned = {
        1: picture(),
        3: picture().rotate(180),
        6: picture().rotate(-90, expand=True),
        8: picture().rotate(90, expand=True),
    }
    loaded = load_image(path)
    assert check_image(path) == loaded.size == turned[orientation].size
    difference = np.abs(np.asarray(loaded, float) - np.asarray(turned[orientation], float)).mean()
    assert difference < 12


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_file_that_was_cut_off_is_found(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    picture().save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for function in (check_image, load_image):
        with pytest.raises(ImageError, match="cannot read"):
            function(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    assert check_image(path) == (60, 40)
    assert load_image(path).mode == "RGB"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"no such file: .*nope\.jpg"):
        check_image(tmp_path / "nope.jpg")
    with pytest.raises(ImageError, match="cannot read"):
        check_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_absurd_size_is_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for function in (check_image, load_image):
        with pytest.raises(ImageError, match="has more than 2000 pixels, make it smaller"):
            function(tmp_path / "a.png")
