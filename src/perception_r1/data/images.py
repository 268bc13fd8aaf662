"""Pictures from files. Everywhere, an image's size and pixels are those after its EXIF orientation is applied."""

from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from perception_r1.errors import UserError

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


class ImageError(UserError):
    """A file that is not a whole, readable picture."""


def load_image(path: Path) -> Image.Image:
    """The picture in RGB, turned upright by its EXIF orientation; of an animation the first frame.

    Raises:
        ImageError: The file is missing, damaged, or no picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        raise _explained(path, error) from error


def check_image(path: Path) -> tuple[int, int]:
    """Width and height of the picture that `load_image` returns, after a check that all of it can be decoded.

    A header says nothing about a file that was cut off, so the pixels are decoded as well. A JPEG is decoded at an
    eighth of its size, which reads the whole file in a fraction of the time.

    Raises:
        ImageError: The file is missing, damaged, or no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "JPEG":
                image.draft(None, (1, 1))
                image.load()
            else:
                image.load()
                width, height = image.size  # TIFF turns itself upright while it loads
            is_sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except Exception as error:
        raise _explained(path, error) from error
    return (height, width) if is_sideways else (width, height)


def _explained(path: Path, error: Exception) -> ImageError:
    """Decoders raise errors of many kinds on damaged files: OSError, SyntaxError, ValueError, struct.error and more."""
    if isinstance(error, FileNotFoundError):
        return ImageError(f"no such file: {path}")
    return ImageError(f"cannot read {path} as a picture ({str(error) or type(error).__name__})")
