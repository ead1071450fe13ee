"""Keep the log of a line of requests: a file of frames, sound after a kill at any moment.

A frame has a length, a checksum, a description in JSON, and a body of bytes. This module does not know the meaning of a
description.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import RunError
from rlhf.process.disk_full import when_there_is_room
from rlhf.tracking.run_folder.atomic import append_whole, sync, write_aside

_HEAD = struct.Struct("<II")  # the bytes after the head, and their CRC-32
_LENGTH = struct.Struct("<I")  # length of the description


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """An entry of a log."""

    about: Mapping[str, Any]  # as JSON
    body: bytes = b""

    def encode(self) -> bytes:
        text = json.dumps(self.about, ensure_ascii=False, separators=(",", ":")).encode()
        rest = b"".join((_LENGTH.pack(len(text)), text, self.body))
        return _HEAD.pack(len(rest), zlib.crc32(rest)) + rest


class RequestLog:
    """The file of a log. A single process writes, and calls the methods in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Return the size in bytes; 0 for a missing file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> list[Frame]:
        """Return all frames, and cut off the rest of a killed write. RunError: a frame before the last is damaged."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        pairs = list(self._frames(content))
        end = pairs[-1][1] if pairs else 0
        if end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)
        return [frame for frame, _ in pairs]

    def _frames(self, content: bytes) -> Iterator[tuple[Frame, int]]:
        start = 0
        while start + _HEAD.size <= len(content):
            length, checksum = _HEAD.unpack_from(content, start)
            begin, end = start + _HEAD.size, start + _HEAD.size + length
            if end > len(content):
                return
            rest = content[begin:end]
            if zlib.crc32(rest) != checksum or length < _LENGTH.size:
                if end == len(content) or not content[start:].strip(b"\0"):  # zeros: the power was lost
                    return
                raise RunError(
                    f"{self.path} is damaged at byte {start}: a frame differs from its checksum, and frames follow. "
                    "Restore the file from a copy, or remove the folder of this model."
                )
            split = _LENGTH.size + _LENGTH.unpack_from(rest)[0]
            yield Frame(about=json.loads(rest[_LENGTH.size : split]), body=rest[split:]), end
            start = end

    def append(self, frame: Frame, *, is_synced: bool) -> None:
        """Add a frame whole or not at all. `is_synced`: the frame survives the loss of power, not only a kill."""
        content = frame.encode()

        def write() -> None:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                append_whole(file, content, is_synced=is_synced)
            finally:
                os.close(file)

        when_there_is_room(self.path, write, needed=len(content))

    def replace(self, frames: Iterable[Frame]) -> None:
        """Replace the whole log durably: after a kill the file holds the old frames or the new frames."""
        content = b"".join(frame.encode() for frame in frames)

        def write(aside: Path) -> None:
            aside.write_bytes(content)
            sync(aside)

        write_aside(self.path, write, needed=len(content))
        sync(self.path.parent)
