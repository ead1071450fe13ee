"""Store the encoded images of a run by content. Each image travels once, and every process reads by key."""

from __future__ import annotations

import os
import shutil
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import RunError
from rlhf.tracking.run_folder.atomic import make_folder, write_aside
from rlhf.vision.decoding import decode, image_size
from rlhf.vision.keys import image_key, image_name

if TYPE_CHECKING:
    from PIL.Image import Image

PASSING, _CLOCK = "passing", ".clock"  # a folder in the store's folder, and a file there
CACHED_BYTES = 256 * 2**20  # of decoded images in a process; an image of one megapixel takes 3 MB


class ImageStore:
    """A folder of images, a file for each image, named by the image's key.

    A file appears whole or not at all, and never changes. Several processes may add and read at once. A process holds
    at most `cached_bytes` of decoded images, the last ones used. The images of a `passing` store have a mark, an empty
    file of the same name in PASSING, until `keep_passing` removes the mark, or PassingImages the image.
    """

    def __init__(self, folder: Path, *, cached_bytes: int = CACHED_BYTES, passing: bool = False) -> None:
        self.folder = folder
        self._cached_bytes = cached_bytes
        self._passing = passing
        self._decoded: OrderedDict[int, Image] = OrderedDict()
        self._sizes: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave decoded images out of a pickle."""
        return partial(ImageStore, cached_bytes=self._cached_bytes, passing=self._passing), (self.folder,)

    def path(self, key: int) -> Path:
        """Return the path of an image, whether the file exists or not."""
        return self.folder / image_name(key)

    def add(self, data: bytes) -> int:
        """Store the encoded bytes of an image, and return the key. An image already here is not written again.

        RunError: another image has the same key.
        """
        key = image_key(data)
        mark = self.folder / PASSING / image_name(key)
        if self._passing and (mark.exists() or not self.path(key).exists()):
            make_folder(mark.parent, parents=True, exist_ok=True)
            mark.touch()  # before the look at the image, so that `PassingImages` sees the touch or this sees no image
        if not self._has(key, data):
            write_aside(self.path(key), lambda aside: aside.write_bytes(data), needed=len(data))
        return key

    def add_file(self, path: Path) -> int:
        """Store a file as an image, and return the key: a hard link if the disk allows, otherwise a copy."""
        data = path.read_bytes()
        key = image_key(data)
        if not self._has(key, data):
            write_aside(self.path(key), lambda aside: _link(path.resolve(), aside), needed=len(data))
        return key

    def read(self, key: int) -> bytes:
        """Return the encoded bytes of an image. RunError: the file is missing or was changed."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{path} cannot be read ({error.strerror}): the folder of images belongs to the run and must be on a "
                "disk that every node reads. A run that starts again writes the images of its data again."
            ) from error
        if image_key(data) != key:
            raise RunError(
                f"{path} no longer holds the image that the run stored. Remove the file, and start again: the run "
                "writes the images of its data again."
            )
        return data

    def size(self, key: int) -> tuple[int, int]:
        """Return width and height of an image as shown, without decoding the pixels."""
        if key not in self._sizes:
            self._sizes[key] = image_size(self.read(key))
        return self._sizes[key]

    def image(self, key: int) -> Image:
        """Return an image in RGB, decoded once while the image stays in this process' cache. Never change the result.

        RunError: the file is missing or was changed. UserError: the bytes are no image.
        """
        with self._lock:
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]
        image = decode(self.read(key))
        with self._lock:
            self._decoded[key] = image
            while len(self._decoded) > 1 and sum(map(_num_bytes, self._decoded.values())) > self._cached_bytes:
                self._decoded.popitem(last=False)
        return image

    def _has(self, key: int, data: bytes) -> bool:
        """Return whether the store holds the bytes. A file damaged by a crash counts as missing."""
        make_folder(self.folder, parents=True, exist_ok=True)
        try:
            present = self.path(key).read_bytes()
        except FileNotFoundError:
            return False
        if present != data and image_key(present) == key:
            raise RunError(f"{self.path(key)} and another image have the same first 60 bits of sha256; change a pixel.")
        return present == data


def keep_passing(folder: Path, names: Iterable[str] | None = None) -> None:
    """Keep the images of these names for good, in the folder of a store. None: all images."""
    for mark in [folder / PASSING / name for name in names] if names is not None else _marks(folder):
        mark.unlink(missing_ok=True)


class PassingImages:
    """Removes images of conversations as soon as no kept sample and no later step can need them."""

    def __init__(self, folder: Path, *, steps: int) -> None:
        """Begin with the store's folder. steps: how many steps before the current one may still need their images.

        The images of an earlier start of the run are kept: its unfinished steps may be repeated from stored rollouts.
        """
        self._folder = folder
        self._starts: deque[float] = deque(maxlen=steps + 1)
        keep_passing(folder)

    def begin_step(self) -> None:
        """Note the time, on the clock of the folder's disk."""
        clock = self._folder / PASSING / _CLOCK
        make_folder(clock.parent, parents=True, exist_ok=True)
        clock.touch()
        self._starts.append(clock.stat().st_mtime)

    def remove(self) -> None:
        """Remove the images last added before the first step in need of images."""
        if len(self._starts) < (self._starts.maxlen or 0):
            return
        for mark in _marks(self._folder):
            path, aside = self._folder / mark.name, self._folder / f".{mark.name}.removed"
            if self._is_old(mark):
                path.rename(aside)
                if self._is_old(mark):
                    mark.unlink()
                    aside.unlink()
                else:  # added again, or kept, during this call
                    aside.rename(path)

    def _is_old(self, mark: Path) -> bool:
        try:
            return mark.stat().st_mtime < self._starts[0]
        except FileNotFoundError:
            return False


def _marks(folder: Path) -> list[Path]:
    found = (folder / PASSING).iterdir() if (folder / PASSING).is_dir() else ()
    return [mark for mark in found if mark.name != _CLOCK and (folder / mark.name).exists()]


def _num_bytes(image: Image) -> int:
    return 3 * image.width * image.height


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, another owner, or a disk without hard links
        shutil.copyfile(source, target)
