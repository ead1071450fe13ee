"""Files that exist whole or not at all, and JSON lines that survive a kill.

All small writes to the run folder go through this module; the driver is the only writer. This module does not know the
meaning of a row.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.process.disk_full import when_there_is_room

_NO_CHARACTER = "backslashreplace"  # half a surrogate becomes \udcff, which JSON reads back


def sync(path: str | Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file and name below the folder durable."""

    def sync_all() -> None:
        for path, _, names in os.walk(folder):
            for name in (*names, ""):
                sync(os.path.join(path, name))

    when_there_is_room(folder, sync_all, waits=False)  # a second sync would not report the data lost by the first


def write_aside(path: Path, write: Callable[[Path], object], *, needed: int | None = None, waits: bool = True) -> None:
    """Let `write` make a file beside `path`, then rename this file to `path`: readers see a whole file or none.

    `needed` is the known size in bytes. `waits`: for room on a full disk; otherwise StorageFull is raised at once.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # two processes may write the same file

    def attempt() -> None:
        write(aside)
        aside.replace(path)

    when_there_is_room(path, attempt, undo=lambda: aside.unlink(missing_ok=True), needed=needed, waits=waits)


def make_folder(path: Path, *, parents: bool = False, exist_ok: bool = False) -> None:
    """Make a folder. Wait for room on a full disk."""
    when_there_is_room(path, lambda: path.mkdir(parents=parents, exist_ok=exist_ok))


def write_atomic(path: Path, text: str, *, waits: bool = True) -> None:
    """Replace the file durably: a reader, and a run killed at any moment, sees the old text or the new.

    `waits`: as in `write_aside`.
    """
    content = text.encode(errors=_NO_CHARACTER)

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    write_aside(path, write, needed=len(content), waits=waits)
    when_there_is_room(path.parent, lambda: sync(path.parent), waits=waits)


def json_line(row: Mapping[str, Any]) -> str:
    """Return one row as strict JSON with the line end. ValueError for nan and infinities: no such numbers in JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, row: Mapping[str, Any], *, is_synced: bool = True, waits: bool = True) -> None:
    """Add a row whole or not at all. `is_synced`: the row is on the disk afterwards, and not only in the kernel.

    `waits`: as in `write_aside`.
    """
    line = json_line(row).encode(errors=_NO_CHARACTER)

    def write() -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            append_whole(file, line, is_synced=is_synced)
        finally:
            os.close(file)

    when_there_is_room(path, write, needed=len(line), waits=waits)


def append_whole(file: int, text: bytes, *, is_synced: bool) -> None:
    """Write to a file that is open for appending. After a failure the file ends at the old end."""
    end = os.fstat(file).st_size
    try:
        while text:
            text = text[os.write(file, text) :]
        if is_synced:
            os.fsync(file)
    except BaseException:
        if stat.S_ISREG(os.fstat(file).st_mode):
            os.ftruncate(file, end)
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a JSON-lines file, or an empty list for a missing file.

    A last line without a line end is the rest of a killed write and is left out. ValueError names every other line
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
    kept = list(filter(keep, rows))
    if path.exists():
        write_lines(path, kept)
    return len(rows) - len(kept)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(map(json_line, rows)))


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file. None: the file holds no readable object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
