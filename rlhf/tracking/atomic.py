"""Files that exist whole or not at all, and JSON lines that survive a kill.

All small writes to the run folder go through here; the one writer is the driver. Nothing here
knows what a row means.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import RunError

_NO_CHARACTER = "backslashreplace"  # half a surrogate becomes \udcff, which JSON reads back


@contextmanager
def explains_full(path: Path) -> Iterator[None]:
    """A full disk, or a used-up quota, as a RunError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{path} could not be written: {error.strerror}. Make room, and go on with --resume auto."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file and name below the folder durable."""
    for path, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(path, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(path))


def write_atomic(path: Path, text: str) -> None:
    """Replace the file: a reader, and a run killed at any moment, sees the old text or the new."""
    aside = path.with_name(f".{path.name}.partial")
    with explains_full(path):
        with aside.open("w", encoding="utf-8", errors=_NO_CHARACTER) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)


def json_line(row: Mapping[str, Any]) -> str:
    """One row as strict JSON with its line end. ValueError for nan and infinities, which JSON does not have."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row and wait until it is on the disk."""
    with explains_full(path), path.open("a", encoding="utf-8", errors=_NO_CHARACTER) as file:
        file.write(json_line(row))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; none if it is missing.

    A last line without its line end was cut by a kill and is left out. ValueError names any other line that is not an
    object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}, expected an object")
        rows.append(row)
    return rows


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a JSON-lines file with only the rows to keep, and no half line. Returns how many rows went."""
    rows = read_lines(path)
    kept = [row for row in rows if keep(row)]
    if path.exists():
        write_atomic(path, "".join(map(json_line, kept)))
    return len(rows) - len(kept)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole JSON-lines file at once."""
    write_atomic(path, "".join(map(json_line, rows)))
