"""Files that exist whole or not at all, and JSON lines that survive a kill.

All small writes to the run folder go through this module; the driver is the only writer. This module does not know the
meaning of a row.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRITER_OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")  # where torch.save fails to write
_TEST_BYTES = 2**20
_NO_CHARACTER = "backslashreplace"  # half a surrogate becomes \udcff, which JSON reads back


@contextmanager
def explains_full(path: Path) -> Iterator[None]:
    """Turn the failure of a full disk, or of an exhausted quota, into a RunError with the name of the file or folder.

    PyTorch and safetensors raise errors of other types. If their text does not name the cause, the folder is tested.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        reason = _why_full(error, path)
        if reason is None:
            raise
        raise RunError(
            f"{path} could not be written: {reason}. {_free(path)}Make room, and continue with --resume auto."
        ) from error


def _why_full(error: Exception, path: Path) -> str | None:
    """Return the reason if an error comes from a full disk or an exhausted quota. None: it does not."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _FULL else None
    text = str(error)
    for code in _FULL:
        if os.strerror(code) in text or f"os error {code})" in text or f"code: {code}," in text:
            return os.strerror(code)
    if any(mark in text for mark in _WRITER_OF_TORCH):
        try:
            with tempfile.TemporaryFile(dir=_existing(path)) as file:
                file.write(bytes(_TEST_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as failure:
            return failure.strerror if failure.errno in _FULL else None
    return None


def _free(path: Path) -> str:
    """Return a sentence on the free space around a path. Empty: it is not known."""
    try:
        usage = shutil.disk_usage(_existing(path))
    except OSError:
        return ""
    return f"The disk has {usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free. "


def _existing(path: Path) -> Path:
    """Return the nearest existing folder above a path."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


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
    """Return one row as strict JSON with its line end. ValueError for nan and infinities, which JSON lacks."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row and wait until it is on the disk."""
    with explains_full(path), path.open("a", encoding="utf-8", errors=_NO_CHARACTER) as file:
        file.write(json_line(row))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a JSON-lines file, or an empty list if it is missing.

    A last line without its line end is the rest of a killed write and is left out. ValueError names any other line
    without an object.
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
    """Write a whole JSON-lines file at once."""
    write_atomic(path, "".join(map(json_line, rows)))


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file. None: the file holds no readable object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
