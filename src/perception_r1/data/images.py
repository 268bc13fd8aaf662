"""Images from files. Everywhere, an image's size and pixels are those after its EXIF orientation is applied."""

import errno
import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from perception_r1.errors import UserError
from perception_r1.records import ImageSource

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image of each EXIF orientation is turned upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""Those that swap width and height."""
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"})
"""Kinds of pixels that Pillow converts to RGB as they are meant; of others it cuts off what is beyond 8 bits."""
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
"""How files end that were not cut off. Of PNG it would not help: its EXIF may come behind the pixels."""
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""What a file may be: images only. Pillow would hand others to programs (EPS to Ghostscript)."""
_NUM_SHOWN = 200
"""Characters of a path that no file can have."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # comes at half of what Pillow refuses


class ImageError(UserError):
    """A file that is not a whole, readable image."""


def load_image(source: ImageSource) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation; of an animation the first frame.

    What is transparent becomes white, and 16 bits of grey become 8.

    Raises:
        ImageError: The file is missing, damaged, far too large, or no image.
    """
    try:
        with _open(source) as image:
            image.load()
            method = _UPRIGHT.get(cast(int, _orientation(image)))
            rgb = _to_rgb(image)
            return rgb if method is None else rgb.transpose(method)
    except Exception as error:
        raise _explained(source, error) from error


def check_image(source: ImageSource, *, is_decoded: bool = True) -> Size:
    """Width and height of the image that `load_image` returns, after a check that all of it can be decoded.

    A header says nothing about a file that was cut off, so the pixels are decoded as well. A JPEG is decoded at an
    eighth of its size, which reads the whole file in a fraction of the time. With `is_decoded` false only the beginning
    and the end of a file are read, and one that is damaged in between passes; what does not end as its format
    prescribes, or has no prescribed end, is decoded all the same.

    Raises:
        ImageError: The file is missing, damaged, far too large, or no image.
    """
    try:
        with _open(source) as image:
            if is_decoded or not _is_ended(image):
                if image.format == "JPEG":
                    size = image.size
                    image.draft(None, (1, 1))
                    image.load()
                else:
                    image.load()
                    size = image.size  # TIFF turns itself upright while it loads
            else:
                size = image.size
            return size[::-1] if _orientation(image) in _SIDEWAYS else size
    except Exception as error:
        raise _explained(source, error) from error


def read_size(source: ImageSource) -> Size:
    """Width and height as they are stored, before anything is decoded; raises as `check_image` does."""
    try:
        with _open(source) as image:
            return image.size
    except Exception as error:
        raise _explained(source, error) from error


def _open(source: ImageSource) -> Image.Image:
    """The image, not decoded yet.

    Raises:
        ImageError: Its pixels are of a kind that has no colours, or it would be read from a pipe or a device.
    """
    if isinstance(source, Path) and (source.is_fifo() or source.is_char_device()):  # which may never end, or begin
        raise ImageError(f"{source} must be a file, not a pipe or a device")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    image = Image.open(source if isinstance(source, Path) else io.BytesIO(source.read()), formats=formats)
    if image.mode not in _MODES and not _is_16_bit(image):
        image.close()
        raise ImageError(f"{source} has pixels of the kind {image.mode}; save it as RGB or grey, with 8 or 16 bits")
    return image


def _orientation(image: Image.Image) -> object:
    """What EXIF says, which may be anything."""
    return image.getexif().get(ExifTags.Base.Orientation)


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit(image):
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether an image has 16 bits of grey; of those in 32 bits, Pillow's own reader of PPM makes 16."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _is_ended(image: Image.Image) -> bool:
    """Whether the file ends as its format prescribes; what is between is not read."""
    file: BinaryIO | None = getattr(image, "fp", None)
    ends = _ENDS.get(image.format or "")
    if file is None or ends is None:
        return False
    position = file.tell()
    file.seek(-len(ends), os.SEEK_END)
    is_ended = file.read() == ends
    file.seek(position)
    return is_ended


def _explained(source: ImageSource, error: Exception) -> ImageError:
    """Decoders raise errors of many kinds on damaged files: OSError, SyntaxError, ValueError, struct.error and more."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # it can be as long as a row of the data
        return ImageError(f"no such file: {str(source)[:_NUM_SHOWN]}... of {len(str(source)):,} characters")
    if isinstance(error, FileNotFoundError):
        return ImageError(f"no such file: {source}")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{source} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, make it smaller")
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory where there is no file
        return ImageError(f"cannot read {source} as an image (it has none of the known forms)")
    return ImageError(f"cannot read {source} as an image ({str(error) or type(error).__name__})")
