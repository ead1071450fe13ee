"""The lock of a run's or a sweep's folder, for one writing process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from rlhf.errors import UserError


def lock_folder(path: Path, *, key: str) -> int:
    """Return the held lock of a folder. `key` is the folder's configuration key, for the error message.

    The kernel releases a flock when the process ends, kill -9 included. A symbolic link is not followed, because the
    target would be emptied.
    """
    try:
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{key}: {path / '.lock'} is a symbolic link, which is not followed. Remove it.") from error
    for pauses_left in range(2, -1, -1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if pauses_left:  # `rlhf view` holds a shared lock for microseconds
                time.sleep(0.05)
                continue
            holder = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise UserError(
                f"{key}: {path} is in use by process {holder}. Wait for it to end, or choose another {key}."
            ) from error
    with suppress(OSError):  # on a full disk; the process is only named in messages
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock
