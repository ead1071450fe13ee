"""Measure the use of threads, memory and disk space by a session's processes.

The measured program may be hostile. Processes and files that vanish during the measurement are left out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_BLOCK = 512  # unit of st_blocks
_ENTRY_BYTES = 4096  # of a file or folder, whatever it holds


def tree_of(leader: int, *, most: int) -> tuple[list[int], int]:
    """Return the processes of a session, which the leader adopts, and the number of threads, up to `most` + 1."""
    found, threads = [leader], 0
    for pid in found:  # grows in the loop
        for task in _listed(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                threads += 1
                found += map(int, file.read().split())
            if threads > most:
                return found, threads
    return found, threads


def memory_of(pids: Iterable[int], *, limit: int) -> int:
    """Return the memory of processes in bytes. Below the limit, shared memory counts for each process."""
    pids = list(pids)
    counted = sum(map(_resident, pids))
    return counted if counted <= limit else sum(map(_proportional, pids))


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    """Return the memory of a process, with a proportional part of shared memory."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        for line in file:
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def disk_of(folder: Path, pids: Iterable[int], *, without: int, limit: int) -> int:
    """Return the bytes of a folder and of removed files still open in processes, counted until over the limit.

    Files in memory are such removed files. Files open in the process `without` do not belong to the session.
    """
    seen = {(file.st_dev, file.st_ino) for file in _removed_files(without)}
    used = 0
    files: Iterable[os.stat_result | None] = chain(*map(_removed_files, pids), _files_below(folder))
    for file in files:
        if file is None:
            return limit + 1
        if (file.st_dev, file.st_ino) not in seen:
            seen.add((file.st_dev, file.st_ino))
            used += max(file.st_blocks * _BLOCK, _ENTRY_BYTES)
            if used > limit:
                return used
    return used


def _removed_files(pid: int) -> Iterator[os.stat_result]:
    for number in _listed(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            file = os.stat(f"/proc/{pid}/fd/{number}")
            if file.st_nlink == 0 and stat.S_ISREG(file.st_mode):
                yield file


def _files_below(folder: Path) -> Iterator[os.stat_result | None]:
    """Yield the files and folders below a folder, and None for a folder with a path too long to enter."""
    folders = [str(folder)]
    for parent in folders:  # grows in the loop
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                yield None


def _listed(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []
