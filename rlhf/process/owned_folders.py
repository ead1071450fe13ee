"""Make folders that the next start removes after a kill of the process.

The maker of a folder holds the folder's lock until the maker's end. A free lock therefore marks a dead owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import RunError

LOCK = ".lock"


class OwnedFolder:
    """A folder made and locked by this process."""

    def __init__(self, path: Path) -> None:
        """Make the folder, and remove neighbours left by dead processes.

        Only one process at a time makes a folder, so a folder without a held lock is never new. RunError: the parent is
        another user's.
        """
        parent = path.parent
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.getuid():
            raise RunError(f"{parent} belongs to another user. Ask its owner to remove it.")
        self.path = path
        with alone_in(parent):
            for other in parent.iterdir():
                if other.is_dir() and other != path:
                    _remove_if_left(other)
            path.mkdir(mode=0o700, exist_ok=True)
            self._lock = locked(path)

    def remove(self) -> None:
        """Remove the folder. Safe to call twice."""
        if self._lock is not None:
            remove_tree(self.path)
            os.close(self._lock)
            self._lock = None


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder, removed after the block, or by the next caller of this function."""
    folder = _folder_for_temporary_files()
    try:
        content = folder.path / "content"
        content.mkdir()
        yield content
    finally:
        folder.remove()


def keep_temporary_files_apart() -> OwnedFolder:
    """Put the temporary files of this process and all children into one folder from now on, and return the folder.

    Reason: a killed process leaves behind the files that libraries would remove at exit.
    """
    folder = _folder_for_temporary_files()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder.path)
    return folder


def _folder_for_temporary_files() -> OwnedFolder:
    parent = Path(tempfile.gettempdir()) / f"rlhf-{os.getuid()}"
    return OwnedFolder(parent / f"{os.getpid()}-{secrets.token_hex(4)}")


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # the owner has removed the folder
        lock = locked(folder)
        if lock is not None:
            remove_tree(folder)
            os.close(lock)


def remove_tree(folder: Path) -> None:
    """Remove a folder with any content, even folders too deep for Python or without permissions."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], capture_output=True, check=False)


@contextmanager
def alone_in(parent: Path) -> Iterator[None]:
    """During the block, let no other process lock or remove a folder in `parent`."""
    lock = os.open(parent / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def locked(folder: Path) -> int | None:
    """Return the lock of a folder, or None if another process holds the lock."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
