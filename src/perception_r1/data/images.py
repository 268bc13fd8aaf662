"""Images from files. Everywhere, an image's size and pixels are those after its EXIF orientation is applied."""

import io
import warnings
from pathlib import Path
from typing import TypeAlias

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from perception_r1.errors import UserError
from perception_r1.records import ImageSource

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""What a file may be: images only. Pillow would hand others to programs (EPS to Ghostscript)."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # comes at half of what Pillow refuses


class ImageError(UserError):
    """A file that is not a whole, readable image."""


def load_image(source: ImageSource) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation; of an animation the first frame.

    Raises:
        ImageError: The file is missing, damaged, far too large, or no image.
    """
    try:
        with _open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        raise _explained(source, error) from error


def check_image(source: ImageSource, *, is_decoded: bool = True) -> Size:
    """Width and height of the image that `load_image` returns, after a check that all of it can be decoded.

    A header says nothing about a file that was cut off, so the pixels are decoded as well. A JPEG is decoded at an
    eighth of its size, which reads the whole file in a fraction of the time. With `is_decoded` false only the header is
    read, and a file that was cut off passes.

    Raises:
        ImageError: The file is missing, damaged, far too large, or no image.
    """
    try:
        with _open(source) as image:
            width, height = image.size
            if not is_decoded:
                pass
            elif image.format == "JPEG":
                image.draft(None, (1, 1))
                image.load()
            else:
                image.load()
                width, height = image.size  # TIFF turns itself upright while it loads
            is_sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except Exception as error:
        raise _explained(source, error) from error
    return (height, width) if is_sideways else (width, height)


def _open(source: ImageSource) -> Image.Image:
    """The image, not decoded yet."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source.read()), formats=formats)


def _explained(source: ImageSource, error: Exception) -> ImageError:
    """Decoders raise errors of many kinds on damaged files: OSError, SyntaxError, ValueError, struct.error and more."""
    if isinstance(error, FileNotFoundError):
        return ImageError(f"no such file: {source}")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{source} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, make it smaller")
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory where there is no file
        return ImageError(f"cannot read {source} as an image (it has none of the known forms)")
    return ImageError(f"cannot read {source} as an image ({str(error) or type(error).__name__})")
