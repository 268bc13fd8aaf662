"""Picture files of every odd kind, by name: how each is written, and whether a training can use it."""

import os
import random
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from campaigns.scenarios import SIZE, picture

Writer: TypeAlias = Callable[[Path, random.Random], object]
USED, REFUSED, EITHER = "used", "refused", "either"
"""What becomes of it; `EITHER` where chance decides."""


def _image(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """Colours that change from side to side."""
    gradient = Image.linear_gradient("L").resize(size)
    image = Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.FLIP_TOP_BOTTOM), gradient))
    return (
        image.convert(mode)
        if mode not in ("I;16", "F")
        else gradient.convert("I" if mode == "I;16" else "F").convert(mode)
    )


def _bytes(form: str, *, size: tuple[int, int] = SIZE, mode: str = "RGB", **options: object) -> bytes:
    file = BytesIO()
    _image(size, mode).save(file, form, **options)
    return file.getvalue()


def _saved(form: str, *, size: tuple[int, int] = SIZE, mode: str = "RGB", **options: object) -> Writer:
    return lambda path, draw: path.write_bytes(_bytes(form, size=size, mode=mode, **options))


def _cut(form: str) -> Writer:
    def write(path: Path, draw: random.Random) -> None:
        data = _bytes(form)
        path.write_bytes(data[: draw.randrange(20, int(len(data) * 0.8))])

    return write


def _flipped(form: str) -> Writer:
    def write(path: Path, draw: random.Random) -> None:
        data = bytearray(_bytes(form))
        for _ in range(draw.choice((1, 10, 100))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)

    return write


def _holding(data: bytes) -> Writer:
    return lambda path, draw: path.write_bytes(data)


def _turned(orientation: int) -> Writer:
    def write(path: Path, draw: random.Random) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        width, height = SIZE
        size = (height, width) if orientation in (5, 6, 7, 8) else SIZE  # upright it is as large as any other
        path.write_bytes(_bytes("JPEG", size=size, exif=exif))

    return write


def _png_of(width: int, height: int, *, color: int = 2, depth: int = 8) -> bytes:
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\x00" * 1000))
        + chunk(b"IEND", b"")
    )


def _broken_crc(path: Path, draw: random.Random) -> None:
    data = bytearray(_bytes("PNG"))
    data[data.index(b"IDAT") - 5] ^= 0xFF  # of the chunk before
    path.write_bytes(data)


def _link_to(target: str) -> Writer:
    def write(path: Path, draw: random.Random) -> None:
        picture(path.with_name("good.png"))
        path.symlink_to(target)

    return write


_FRAMES = [Image.new("RGB", SIZE, (shade, 0, 0)) for shade in (0, 90, 180)]
_ANIMATED = {"save_all": True, "append_images": _FRAMES}
PICTURES: dict[str, tuple[Writer, str]] = {
    "JPEG cut off": (_cut("JPEG"), REFUSED),
    "PNG cut off": (_cut("PNG"), REFUSED),
    "WebP cut off": (_cut("WEBP"), REFUSED),
    "GIF cut off": (_cut("GIF"), EITHER),
    "TIFF cut off": (_cut("TIFF"), REFUSED),
    "BMP cut off": (_cut("BMP"), REFUSED),
    "JPEG with other bytes": (_flipped("JPEG"), EITHER),
    "PNG with other bytes": (_flipped("PNG"), EITHER),
    "GIF with other bytes": (_flipped("GIF"), EITHER),
    "TIFF with other bytes": (_flipped("TIFF"), EITHER),
    "WebP with other bytes": (_flipped("WEBP"), EITHER),
    "PNG with a wrong checksum": (_broken_crc, REFUSED),
    "no bytes": (_holding(b""), REFUSED),
    "one byte": (_holding(b"\xff"), REFUSED),
    "random bytes": (lambda path, draw: path.write_bytes(draw.randbytes(5000)), REFUSED),
    "a text": (_holding(b"this is no picture\n" * 20), REFUSED),
    "a web page": (_holding(b"<!doctype html><title>404</title>"), REFUSED),
    "SVG": (_holding(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), REFUSED),
    "PDF": (_saved("PDF"), REFUSED),
    "EPS": (_saved("EPS"), REFUSED),
    "ICO": (_saved("ICO", size=(64, 64)), REFUSED),
    "JPEG named PNG": (_saved("JPEG"), USED),
    "progressive JPEG": (_saved("JPEG", progressive=True), USED),
    "grey JPEG": (_saved("JPEG", mode="L"), USED),
    "CMYK JPEG": (_saved("JPEG", mode="CMYK"), USED),
    "YCbCr TIFF": (_saved("TIFF", mode="YCbCr"), USED),
    "CMYK TIFF": (_saved("TIFF", mode="CMYK"), USED),
    "16 bits PNG": (_saved("PNG", mode="I;16"), USED),
    "16 bits TIFF": (_saved("TIFF", mode="I;16"), USED),
    "TIFF of floats": (_saved("TIFF", mode="F"), REFUSED),
    "one bit PNG": (_saved("PNG", mode="1"), USED),
    "palette PNG": (_saved("PNG", mode="P"), USED),
    "palette PNG, transparent": (_saved("PNG", mode="P", transparency=3), USED),
    "RGBA PNG": (_saved("PNG", mode="RGBA"), USED),
    "LA PNG": (_saved("PNG", mode="LA"), USED),
    "GIF": (_saved("GIF"), USED),
    "animated GIF": (_saved("GIF", **_ANIMATED), USED),
    "animated PNG": (_saved("PNG", **_ANIMATED), USED),
    "animated WebP": (_saved("WEBP", **_ANIMATED), USED),
    "TIFF of several pages": (_saved("TIFF", **_ANIMATED), USED),
    "MPO": (_saved("MPO", **_ANIMATED), USED),
    "JPEG with a tail": (lambda path, draw: path.write_bytes(_bytes("JPEG") + draw.randbytes(999)), USED),
    "JPEG with broken EXIF": (_saved("JPEG", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\xff\xff\x01"), EITHER),
    **{f"orientation {number}": (_turned(number), USED) for number in (2, 3, 4, 5, 6, 7, 8)},
    "orientation 99": (_turned(99), USED),
    "50,000 x 50,000 in a header": (_holding(_png_of(50_000, 50_000)), REFUSED),
    "2,000,000,000 x 1 in a header": (_holding(_png_of(2_000_000_000, 1)), REFUSED),
    "0 x 0 in a header": (_holding(_png_of(0, 0)), REFUSED),
    "more rows in the header than data": (_holding(_png_of(300, 300)), REFUSED),
    "1 x 10,000": (_saved("PNG", size=(1, 10_000)), REFUSED),
    "10,000 x 1": (_saved("PNG", size=(10_000, 1)), REFUSED),
    "3 x 700": (_saved("PNG", size=(3, 700)), REFUSED),
    "5 x 1,000": (_saved("PNG", size=(5, 1000)), EITHER),
    "1 x 1": (_saved("PNG", size=(1, 1)), USED),
    "6,000 x 4,000": (_saved("JPEG", size=(6000, 4000)), USED),
    "a folder": (lambda path, draw: path.mkdir(), REFUSED),
    "a link": (_link_to("good.png"), USED),
    "a link to nothing": (_link_to("nothing.png"), REFUSED),
    "a link to itself": (lambda path, draw: path.symlink_to(path.name), REFUSED),
    "a pipe": (lambda path, draw: os.mkfifo(path), REFUSED),
    "a device": (lambda path, draw: path.symlink_to("/dev/zero"), REFUSED),
    "nothing": (lambda path, draw: None, REFUSED),
}
"""Writers of a file and what becomes of a row that names it."""
