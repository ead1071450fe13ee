"""System calls that the `os` module of some Pythons lacks, because it was compiled for an older C library or kernel.

Pythons that `uv` or conda installs are among them. This module imports nothing heavy, so that every process can use it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

_CLOEXEC, _ALLOW_SEALING = 1, 2  # flags of memfd_create
_ADD_SEALS, _ALL_SEALS = 1033, 15  # F_ADD_SEALS; no more seals, no smaller, no larger, no writes
_LIBC = ctypes.CDLL(None, use_errno=True)


def memfd(name: str, *, is_sealable: bool = False) -> int:
    """Return the descriptor of an empty file in memory. A started program inherits it only through `pass_fds`."""
    return _checked("memfd_create", _LIBC.memfd_create(name.encode(), _CLOEXEC | _ALLOW_SEALING * is_sealable))


def seal(descriptor: int) -> None:
    """Make the content of a file in memory constant."""
    fcntl.fcntl(descriptor, _ADD_SEALS, _ALL_SEALS)


def _checked(call: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return result
