"""A growing JSON-lines file, read part by part.

The module remembers nothing: each request states the end of the last part. A resumed run removes lines again. If the
bytes before a position no longer have the reader's checksum (`mark`), the file is read from the beginning.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 2**20
_LONGEST_LINE = 16 * CHUNK_BYTES
_MARKED_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChunk:
    """A part of the file in whole lines."""

    lines: bytes
    next: int  # start of the next part
    mark: int  # to send with `next`
    reset: bool  # the file has changed, and the lines begin again
    more: bool  # more lines are available now


def read_chunk(path: Path, start: int, mark: int, *, last: bool = False) -> FileChunk:
    """Return the lines from `start` on, none for a missing file. last: a new reader gets only the end of the file."""
    try:
        file = path.open("rb")
    except OSError:
        return FileChunk(lines=b"", next=0, mark=0, reset=start > 0, more=False)
    with file:
        size = file.seek(0, 2)
        reset = start > 0 and (start > size or _mark(file, start) != mark)
        if reset or start < 0:
            start = 0
        if last and start == 0 and size > CHUNK_BYTES:
            file.seek(size - CHUNK_BYTES)
            start = size - CHUNK_BYTES + len(file.readline())
        file.seek(start)
        lines = file.read(CHUNK_BYTES)
        if b"\n" not in lines and len(lines) == CHUNK_BYTES:
            lines += file.readline(_LONGEST_LINE)
        lines = lines[: lines.rfind(b"\n") + 1]  # a line without an end is still being written
        end = start + len(lines)
        return FileChunk(lines=lines, next=end, mark=_mark(file, end), reset=reset, more=bool(lines) and end < size)


def _mark(file: BinaryIO, end: int) -> int:
    begin = max(end - _MARKED_BYTES, 0)
    file.seek(begin)
    return zlib.crc32(file.read(end - begin))
