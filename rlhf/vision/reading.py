"""Read the images of a row or a request: check each image once, and store the encoded bytes.

An image comes as a path, as bytes, in base64, or from an https address. In every form the bytes are decoded once here,
so a broken image stops a run before the start.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, prefix_errors
from rlhf.tracking.run_folder.atomic import make_folder, write_aside
from rlhf.vision.decoding import decode
from rlhf.vision.fetching import MAX_BYTES, fetch_image
from rlhf.vision.keys import image_key, image_name
from rlhf.vision.store import ImageStore

_SOURCES = ("image", "path", "url", "base64", "bytes", "image_url")  # fields of a part that hold the image
_FORMS = "a path, a data URI, an https address, or an object with `bytes`, `base64`, `path` or `url`"  # in messages


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """Limits of a configuration for the images of a row."""

    max_images: int = 8  # of a row
    max_pixels: int = 50_000_000  # of an image before the model's processor resizes it
    hosts: tuple[str, ...] = ()  # names of hosts that https addresses may have


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFolder:
    """A folder of images with limits, from which an engine opens a reader for the images of conversations."""

    folder: Path
    limits: ImageLimits
    kept_s: float | None = None  # after which images of requests are removed; None: images are part of a run

    def reader(self) -> ImageCollector:
        return ImageCollector(ImageStore(self.folder, passing=self.kept_s is None), self.limits)


class ImageCollector:
    """Reads images into a store. An image is decoded once, and an address is fetched once, also over restarts."""

    def __init__(self, store: ImageStore, limits: ImageLimits) -> None:
        self.store = store
        self.limits = limits
        self._checked: set[int] = set()
        self._files: dict[tuple[str, int, int], int] = {}  # path, time of the last change, size -> key

    @property
    def place(self) -> ImageFolder:
        """Return the folder and the limits, for readers in other processes."""
        return ImageFolder(folder=self.store.folder, limits=self.limits)

    def add(self, value: object, *, place: str, folder: Path | None) -> int:
        """Store an image and return its key. UserErrors begin with `place`.

        Args: value: an image in one of the forms. folder: where relative paths begin; None: paths are refused.
        """
        with prefix_errors(place):
            return self._add(value, folder)

    def add_part(self, part: Mapping[str, Any], *, place: str, folder: Path | None) -> int:
        """Store the image of a message's part and return its key. UserErrors begin with `place`."""
        with prefix_errors(place):
            return self._add(_value_of(part), folder)

    def _add(self, value: object, folder: Path | None) -> int:
        if isinstance(value, Mapping):
            value = _value_of({"type": "image", **value})
        if isinstance(value, str):
            if value[:5].lower() == "data:":
                return self._add_bytes(_of_data_uri(value))
            if "://" in value[:32]:
                return self._add_url(value)
            return self._add_path(value, folder)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._add_bytes(bytes(value))
        if hasattr(value, "save") and hasattr(value, "getexif"):  # a decoded image of Pillow
            buffer = io.BytesIO()
            value.save(buffer, "PNG")
            return self._add_bytes(buffer.getvalue())
        raise UserError(f"Found {_shown(value)}, expected {_FORMS}.")

    def _add_bytes(self, data: bytes) -> int:
        self._check(data)
        return self.store.add(data)

    def _check(self, data: bytes) -> None:
        """Decode an image unless this process has done so. UserError: too large, damaged, or no image."""
        if len(data) > MAX_BYTES:
            raise UserError(f"The image has {len(data):,} bytes, more than {MAX_BYTES:,}. Make the image smaller.")
        key = image_key(data)
        if key not in self._checked:
            decode(data, max_pixels=self.limits.max_pixels)
            self._checked.add(key)

    def _add_path(self, text: str, folder: Path | None) -> int:
        if folder is None:
            raise UserError(
                f"{text!r:.100} is a path, and only a file of this machine may name files: this data holds the bytes "
                "of images, or https addresses."
            )
        path = folder / Path(text).expanduser()
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a file. Name an image.")
            if status.st_size > MAX_BYTES:
                raise UserError(f"{path} has more than {MAX_BYTES:,} bytes. Make the image smaller.")
            known = (str(path), status.st_mtime_ns, status.st_size)
            if known not in self._files:
                with prefix_errors(str(path)):
                    self._check(path.read_bytes())
                self._files[known] = self.store.add_file(path)
            return self._files[known]
        except (OSError, ValueError) as error:  # a path too long, or with a character NUL
            looks_encoded = len(text) > 200 and "." not in text
            hint = (
                "If the text is an image in base64, begin it with `data:image/png;base64,`."
                if looks_encoded
                else "Correct the path; relative paths begin at the folder of the data file."
            )
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{str(path)[:300]} cannot be read: {reason}. {hint}") from error

    def _add_url(self, url: str) -> int:
        if url[:7].lower() == "file://":
            raise UserError(
                f"{url[:200]!r} is an address of a local file, which is never opened. Write a path "
                "(in a data set), or the image itself as a data URI."
            )
        remembered = self.store.folder / "addresses" / hashlib.sha256(url.encode()).hexdigest()
        if remembered.is_file():
            key = int(remembered.read_text(), 16)
            if self.store.path(key).is_file():
                self._check(self.store.read(key))
                return key
        key = self._add_bytes(fetch_image(url, self.limits.hosts))
        make_folder(remembered.parent, parents=True, exist_ok=True)
        write_aside(remembered, lambda aside: aside.write_text(image_name(key)))
        return key


def _value_of(part: Mapping[str, Any]) -> object:
    """Return the value of a part's only filled field. UserError: none, several, or a field without a meaning."""
    fields = {name: value for name, value in part.items() if value is not None and name not in ("type", "detail")}
    given = [name for name in _SOURCES if name in fields]
    if given == ["path", "bytes"]:  # the Image column of a data set: the path is only a name
        given = ["bytes"]
        fields.pop("path")
    unknown = [name for name in fields if name not in _SOURCES]
    if unknown:
        raise UserError(
            f"The image has the field `{unknown[0]}`, which has no effect: the model's processor decides how images "
            "are resized. Remove the field."
        )
    if len(given) != 1:
        names = ", ".join(f"`{name}`" for name in given) or "none"
        raise UserError(f"The image has {names} of `image`, `path`, `url`, `base64` and `bytes`; give one.")
    name, value = given[0], fields[given[0]]
    if name == "image_url":
        value = value.get("url") if isinstance(value, Mapping) else value
        name = "url"
    if name in ("path", "url", "base64") and not isinstance(value, str):
        raise UserError(f"`{name}` of the image is {_shown(value)}, expected a string.")
    if name == "url" and isinstance(value, str) and "://" not in value[:32] and value[:5].lower() != "data:":
        raise UserError(f"`url` of the image is {value[:60]!r}, expected an https address or a data URI.")
    if name == "path" and isinstance(value, str) and ("://" in value[:32] or value[:5].lower() == "data:"):
        raise UserError(f"`path` of the image is {value[:60]!r}, expected the path of a file.")
    return _decoded(value) if name == "base64" and isinstance(value, str) else value


def _of_data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"The data URI {text[:40]!r} is not in base64. Write data:image/png;base64,DATA.")
    return _decoded(body)


def _decoded(text: str) -> bytes:
    if len(text) > MAX_BYTES * 1.4:
        raise UserError(f"The image has {len(text):,} characters in base64, more than {MAX_BYTES:,} bytes.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"The text {text[:40]!r} is not base64: {error}. Encode the image again.") from error


def _shown(value: object) -> str:
    return f"the {type(value).__name__} {value!r:.60}"
