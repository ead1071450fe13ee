"""What lies in shared memory, or where all hosts see it, for as long as its owner lives.

The owner holds a lock, which the kernel frees with the process, kill -9 included; whoever starts later removes what
nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

WEIGHTS = "rlhf-weights-"  # files
ADAPTER = "rlhf-adapter-"  # folders; the lock is on HELD inside
HELD = "adapter_config.json"


def hold(path: Path) -> int:
    """Make a file and lock it: its descriptor, to be closed by the owner."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def sweep(folder: Path) -> None:
    """Remove what the dead have left in a folder."""
    for path in [*folder.glob(f"{WEIGHTS}*"), *folder.glob(f"{ADAPTER}*")]:
        try:
            descriptor = os.open(path / HELD if path.is_dir() else path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # swept by another process, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
