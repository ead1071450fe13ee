"""A growing file of JSON lines, a piece at a time. Nothing is held here: each request says where the last one ended.

A run that is resumed takes lines back. `mark` is a checksum of the bytes before a place: where it is not what the
reader was told, the file is another one, and is read from its beginning.
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
class Piece:
    """Whole lines."""

    lines: bytes
    next: int  # where the next piece begins
    mark: int  # to be given with it
    reset: bool  # they do not continue what was read: it begins anew
    more: bool  # there is more to be read now


def read_piece(path: Path, start: int, mark: int, *, last: bool = False) -> Piece:
    """Lines from `start` on; a file that is missing has none. last: only the end of the file, if it is long, and the
    reader knows nothing yet."""
    try:
        file = path.open("rb")
    except OSError:
        return Piece(lines=b"", next=0, mark=0, reset=start > 0, more=False)
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
        lines = lines[: lines.rfind(b"\n") + 1]  # what has no end is still being written
        end = start + len(lines)
        return Piece(lines=lines, next=end, mark=_mark(file, end), reset=reset, more=bool(lines) and end < size)


def _mark(file: BinaryIO, end: int) -> int:
    begin = max(end - _MARKED_BYTES, 0)
    file.seek(begin)
    return zlib.crc32(file.read(end - begin))
