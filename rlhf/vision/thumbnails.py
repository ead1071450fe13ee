"""Make small versions of a run's images, for pages and tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError
from rlhf.vision.keys import is_image_name
from rlhf.vision.store import ImageStore

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 256  # pixels of a thumbnail's longer side
CONTENT_TYPE = "image/webp"


def whole_image(folder: Path, name: str) -> Image:
    """Return an image of a store's folder.

    UserError: `name` is not the name of an image, such as a path. RunError: the file is missing or was changed.
    """
    if not is_image_name(name):
        raise UserError(f"{name!r:.40} is not the name of an image, which is 15 hexadecimal digits.")
    return ImageStore(folder).image(int(name, 16))


def thumbnail(folder: Path, name: str, *, side: int = SIDE) -> Image:
    """Return an image scaled down to at most `side` pixels. Smaller images keep their size. Raises as `whole_image`."""
    small = whole_image(folder, name)
    small.thumbnail((side, side))
    return small


def encoded_thumbnail(folder: Path, name: str, *, side: int = SIDE) -> bytes:
    """Return the thumbnail as an encoded WebP. Raises as `whole_image` does."""
    encoded = io.BytesIO()
    thumbnail(folder, name, side=side).save(encoded, "WEBP", quality=85)
    return encoded.getvalue()
