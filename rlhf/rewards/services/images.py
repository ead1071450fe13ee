"""Images of a row in requests to services, as data URIs: a service may run on a machine without the run's folder."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import RunError
from rlhf.vision.decoding import mime_type
from rlhf.vision.keys import is_image_name

IMAGES = "images"  # the column with the images of the row


def data_uri(path: str) -> str:
    """Return an image's file as a data URI. RunError: the file is gone."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"The image {path} for a service cannot be read: {error.strerror}.") from error
    return f"data:{mime_type(data)};base64,{base64.b64encode(data).decode()}"


def sent_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns with data URIs in place of the paths of stored images. RunError: a file is gone."""
    stored = stored_images(columns)
    return {**columns, IMAGES: [data_uri(path) for path in stored]} if stored else dict(columns)


def stored_images(columns: Mapping[str, Any]) -> list[str]:
    """Return the paths in column `images`. The list is empty if the column is absent or holds something else."""
    images = columns.get(IMAGES)
    return images if isinstance(images, list) and all(map(_is_stored, images)) else []


def _is_stored(value: object) -> bool:
    """Return whether a value of column `images` is a file of a store, and not another column of this name."""
    return isinstance(value, str) and Path(value).is_absolute() and is_image_name(Path(value).name)
