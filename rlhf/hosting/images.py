"""Keep the images of clients' requests by content, and put images into token ids.

A request keeps the name of each image in place of the bytes, so the log of requests holds no image. An image is checked
in the request's turn, where an error is the request's result.
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, prefix_errors
from rlhf.vision.decoding import decode, mime_type
from rlhf.vision.fetching import MAX_BYTES
from rlhf.vision.keys import image_key, image_name, is_image_name
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageFolder, ImageLimits
from rlhf.vision.store import ImageStore

KEPT_S = 3600.0  # after the last request with an image, whose frame may not be in the log yet
_NAME = re.compile(rb"[0-9a-f]{15}")  # also of other numbers, whose images then stay


class ClientImages:
    """The images of all clients. `processing` None: the model reads text alone, and no image is kept."""

    def __init__(self, folder: Path, processing: ImageProcessing | None) -> None:
        self.store, self.processing, self.limits = ImageStore(folder), processing, ImageLimits()
        self._formats: dict[int, str] = {}  # format of each checked image
        self._lock = threading.Lock()  # the processor serves one thread at a time
        self._removing = threading.Lock()  # between a look at an image's age and the removal

    @property
    def place(self) -> ImageFolder | None:
        """Return the folder for ranks and engines. None: the model reads text alone."""
        return None if self.processing is None else ImageFolder(folder=self.store.folder, limits=self.limits)

    def keep(self, data: bytes) -> str:
        """Store the encoded bytes of an image, and return the name. Nothing is checked yet."""
        if self.processing is None or len(data) > MAX_BYTES:
            return f"{len(data)} bytes"
        path = self.store.path(image_key(data))
        with self._removing:
            if path.exists():
                path.touch()
        return image_name(self.store.add(data))

    def keep_all(self, chunks: Iterable[dict[str, Any]]) -> None:
        """Keep the images of chunks in JSON, and replace the data by names. ValueError: the data is not base64."""
        for chunk in chunks:
            if chunk.get("type") == "image":
                chunk["data"] = self.keep(base64.b64decode(chunk.get("data", ""), validate=True))

    def token_ids(self, name: str, form: str, expected: int | None, *, place: str) -> list[int]:
        """Return the token ids of an image, with `-key` at the embedded positions.

        UserErrors begin with `place`: no image, or another number of tokens than `expected` by the client.
        """
        if self.processing is None:
            raise UserError(f"{place}: has an image, and the model of this server reads text alone")
        if not is_image_name(name):
            raise UserError(f"{place}: has an image of {name}, and this server takes up to {MAX_BYTES}")
        key = int(name, 16)
        with self._lock, prefix_errors(place):
            self._check(key, form)
            embedded = self.processing.image_token_id
            ids = self.processing.expansion(*self.store.size(key))
        if expected is not None and expected != len(ids):
            size = "x".join(map(str, self.store.size(key)))
            raise UserError(
                f"{place}: the client expects {expected} tokens for an image of {size} pixels (expected_tokens), and "
                f"the model's processor gives {len(ids)}"
            )
        return [-key if token == embedded else token for token in ids]

    def _check(self, key: int, form: str) -> None:
        """Decode an image once. UserError: damaged, too large, or of another format than `form`."""
        if key not in self._formats:
            data = self.store.read(key)
            decode(data, max_pixels=self.limits.max_pixels)
            self._formats[key] = mime_type(data)
        if self._formats[key] != f"image/{form}":
            raise UserError(f"The image is {self._formats[key]}, and the chunk's format is {form!r:.20}.")

    def refuse_many(self, num_images: int, *, place: str) -> None:
        """Raise UserError for more images than a row may have."""
        if num_images > self.limits.max_images:
            raise UserError(f"{place}: has {num_images} images, and this server takes {self.limits.max_images}")

    def remove_unused(self, logs: Iterable[Path], kept: Iterable[int]) -> None:
        """Remove images outside `kept` that no log of requests names, some time after the last request with them."""
        names = {image_name(key).encode() for key in kept}
        for log in logs:
            if log.exists():
                names.update(_NAME.findall(log.read_bytes()))
        before = time.time() - KEPT_S
        with self._removing:
            for path in self.store.folder.glob("*") if self.store.folder.exists() else ():
                named = not is_image_name(path.name) or path.name.encode() in names
                if not named and path.stat().st_mtime < before:
                    path.unlink()
