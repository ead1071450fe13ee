"""Decode the encoded bytes of an image. No other module of this project decodes images.

The bytes come from data sets and requests, so no field is trusted. The header is read before any pixel, only five
formats are known, and each failure is a UserError with the fault of the image.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 178_956_970  # a decoded image then takes half a GiB; Pillow's limit against decompression bombs
_ORIENTATION = 0x0112  # tag of EXIF
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_TURNS = {  # Pillow's operation for each orientation except 1, which shows the image as stored
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height as shown, only from the header. UserError: no image, or more than `max_pixels`."""
    with _reading(data) as image:
        return _size(image, max_pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Return the first frame in RGB and in the orientation of its EXIF data, transparent pixels on white.

    UserError: no image of a known format, a damaged or incomplete file, or more than `max_pixels`.
    """
    import numpy
    from PIL import Image

    with _reading(data) as image:
        _size(image, max_pixels)
        turn = _TURNS.get(_orientation(image))
        image.load()
        pixels: Image.Image = image
        if image.mode.startswith("I"):  # 16 bits a pixel, of which Pillow's conversion would cut the upper half
            pixels = Image.fromarray((numpy.asarray(image).astype(numpy.uint32) >> 8).astype(numpy.uint8))
        if pixels.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in pixels.info:
            with_alpha = pixels.convert("RGBA")
            pixels = Image.new("RGBA", with_alpha.size, "white")
            pixels.alpha_composite(with_alpha)
        rgb = pixels.convert("RGB")
        return rgb if turn is None else rgb.transpose(Image.Transpose[turn])


def mime_type(data: bytes) -> str:
    """Return the MIME type of a checked image, by its first bytes."""
    starts = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"BM": "bmp"}
    return f"image/{next((name for start, name in starts.items() if data.startswith(start)), 'webp')}"


def _size(image: Image, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > max_pixels:
        raise UserError(
            f"The image has {width} x {height} pixels, more than {max_pixels:,}. Make the image smaller, or raise "
            "data.max_image_pixels."
        )
    if width < 1 or height < 1:
        raise UserError(f"The image has {width} x {height} pixels, so there is nothing to see.")
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _orientation(image: Image) -> int:
    """Return the orientation in the EXIF data of the header, or 1: as stored. Values without a meaning count as 1."""
    from PIL.Image import Exif

    exif = Exif()
    exif.load(image.info.get("exif", b""))  # image.getexif() would decode a PNG
    value = exif.get(_ORIENTATION, 1)
    return value if value in _TURNS else 1


@contextmanager
def _reading(data: bytes) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about sizes, which have their own limit here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:
        raise UserError(f"{_described(data)} is no image of a known format. Use {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"The image has more than {MAX_PIXELS:,} pixels, too many to decode. Make the image smaller."
        ) from error
    except (
        OSError, ValueError, SyntaxError, EOFError, struct.error, LookupError, TypeError, ArithmeticError,
        AttributeError, MemoryError, NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip  # Pillow's plugins raise any of these for damaged bytes
        raise UserError(
            f"The image is damaged or incomplete ({type(error).__name__}: {str(error)[:100]}). Encode the image again."
        ) from error


def _described(data: bytes) -> str:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if not data:
        return "An empty file"
    if head.startswith(b"<") and b"<svg" in data[:4096]:
        return "An SVG drawing"
    if head[:1] in (b"<", b"{"):
        return "A text, such as the page of an error,"
    return f"Data of {len(data):,} bytes beginning with {data[:8]!r}"
