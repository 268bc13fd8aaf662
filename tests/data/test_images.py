import io
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from perception_r1.data.images import ImageError, check_image, load_image, read_size
from perception_r1.records import ImageBytes


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
    with pytest.raises(ImageError, match=r"no such file: .{200}\.\.\. of 9,999 characters$"):
        check_image(Path("a" * 9_999))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [load_image, check_image, read_size])
def test_a_pipe_and_a_device_are_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    for odd in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match=f"^{odd} must be a file, not a pipe or a device$"):
            read(odd)


def test_a_picture_of_absurd_size_is_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for function in (check_image, load_image):
        with pytest.raises(ImageError, match="has more than 2000 pixels, make it smaller"):
            function(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_16_bits_of_grey_keep_their_shades(tmp_path, suffix):
    shades = np.linspace(0, 65535, 12 * 30).astype(np.uint16).reshape(12, 30)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 30 12 65535\n" + shades.astype(">u2").tobytes())
    else:
        Image.fromarray(shades).save(path)
    assert check_image(path) == (30, 12)
    expected = np.repeat(np.round(shades / 65535 * 255)[:, :, None], 3, 2)
    assert np.array_equal(np.asarray(load_image(path)), expected)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_colours_are_refused_when_the_data_is_read(tmp_path, mode):
    Image.new(mode, (6, 4)).save(tmp_path / "a.tif")
    for function in (check_image, partial(check_image, is_decoded=False), load_image, read_size):
        with pytest.raises(ImageError, match=f"has pixels of the kind {mode}; save it as RGB or grey, with 8 or 16"):
            function(tmp_path / "a.tif")


def transparent(mode):
    """Red on the left, and on the right a black that is not to be seen."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    if mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([255, 0, 0, 0, 0, 0] + [0] * 762)
        image.paste(0, (0, 0, 4, 4))
    elif mode == "RGB":
        image = image.convert("RGB")
    return image, {"P": {"transparency": bytes([255, 0])}, "RGB": {"transparency": (0, 0, 0)}}.get(mode, {})


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    image, options = transparent(mode)
    image.save(tmp_path / "a.png", **options)
    loaded = np.asarray(load_image(tmp_path / "a.png"))
    assert np.all(loaded[:, :4] == (255, 0, 0))
    assert np.all(loaded[:, 4:] == 255)


def test_half_transparent_is_half_white(tmp_path):
    Image.new("LA", (2, 2), (100, 51)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (224, 224, 224)  # 255 - (255 - 100) / 5


def test_an_opaque_image_with_an_alpha_channel_is_as_it_is(tmp_path):
    picture().convert("RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(picture()))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert check_image(tmp_path / f"a.{suffix}") == (8, 6)
    assert load_image(tmp_path / f"a.{suffix}").getpixel((3, 3)) == (255, 0, 0)


def test_cmyk_of_photo_software_is_not_inverted(tmp_path):
    """Adobe's JPEGs have inverted values and say so; the same picture comes out."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240 > 15 > max(green, blue)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_as_pillow_has_them(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(load_image(tmp_path / f"a.{suffix}")), np.asarray(expected))
    sizes = {check_image(tmp_path / f"a.{suffix}", is_decoded=is_decoded) for is_decoded in (True, False)}
    assert sizes == {expected.size}
    assert sorted(read_size(tmp_path / f"a.{suffix}")) == sorted(expected.size)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "pgm", "jp2"])
def test_a_file_that_was_cut_off_is_found_without_decoding_whole_ones(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture().save(path)
    content = path.read_bytes()
    assert check_image(path, is_decoded=False) == (60, 40)
    for length in (len(content) * 95 // 100, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match="cannot read"):
            check_image(path, is_decoded=False)


def test_only_the_beginning_and_the_end_of_a_whole_file_are_read(tmp_path, monkeypatch):
    for suffix in ("jpg", "gif", "png", "webp"):
        picture().save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for suffix in ("jpg", "gif"):
        assert check_image(tmp_path / f"a.{suffix}", is_decoded=False) == (60, 40)
    for suffix in ("jpg", "gif", "png", "webp"):
        assert read_size(tmp_path / f"a.{suffix}") == (60, 40)


def originals():
    """A small file of every format, with and without EXIF."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "MPO"):
        for options in ({"exif": exif}, {}):
            file = io.BytesIO()
            picture().save(file, form, **options)
            yield file.getvalue()
    for form, mode in (
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("PPM", "RGB"),
        ("JPEG2000", "RGB"),
        ("PNG", "P"),
        ("TIFF", "CMYK"),
    ):
        file = io.BytesIO()
        picture().convert(mode).save(file, form)
        yield file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_passes_the_check_never_fails_in_a_run():
    """Files with changed, missing and added bytes."""
    generator, num_passed, num_refused = random.Random(0), 0, 0
    for content in originals():
        for _ in range(60):
            changed = bytearray(content)
            for _ in range(generator.choice([1, 1, 3, 20])):
                end = generator.choice([64, 300, len(changed)])
                changed[generator.randrange(min(end, len(changed)))] = generator.choice(
                    [0, 1, 6, 127, 255, generator.randrange(256)]
                )
            if generator.random() < 0.3:
                del changed[generator.randrange(len(changed)) :]
            source = ImageBytes("a picture", partial(bytes, changed))
            try:
                size = check_image(source)
            except ImageError:
                num_refused += 1
                continue
            num_passed += 1
            loaded = load_image(source)
            assert (loaded.mode, loaded.size) == ("RGB", size)
    assert min(num_passed, num_refused) > 100
