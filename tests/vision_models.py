"""Draw and encode small images, for tests of vision models."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageDraw


def drawn(colour: str = "red", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Return a grey image with a square of the colour at the upper left."""
    image = Image.new("RGB", size, (90, 90, 90))
    ImageDraw.Draw(image).rectangle((6, 6, 24, 24), fill=colour)
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return the encoded bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
