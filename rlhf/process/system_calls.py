"""System calls missing in the `os` module of Pythons compiled for an older C library or kernel, as from uv or conda."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal

_CLOEXEC, _ALLOW_SEALING = 1, 2  # flags of memfd_create
_ADD_SEALS, _ALL_SEALS = 1033, 15  # F_ADD_SEALS; no more seals, no smaller, no larger, no writes
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 424, 434  # the same numbers on all architectures
_LIBC = ctypes.CDLL(None, use_errno=True)


def memfd(name: str, *, is_sealable: bool = False) -> int:
    """Return the descriptor of an empty file in memory, inherited by programs only through `pass_fds`."""
    return _checked("memfd_create", _LIBC.memfd_create(name.encode(), _CLOEXEC | _ALLOW_SEALING * is_sealable))


def seal(descriptor: int) -> None:
    """Make the content of a file in memory constant."""
    fcntl.fcntl(descriptor, _ADD_SEALS, _ALL_SEALS)


def pidfd_open(pid: int) -> int:
    """Return a descriptor of a process, readable after its end, and inherited by no started program."""
    return _checked("pidfd_open", _LIBC.syscall(_PIDFD_OPEN, pid, 0))


def pidfd_send_signal(descriptor: int, number: signal.Signals) -> None:
    """Send a signal to the process of a descriptor, and never to a later process with the same pid."""
    _checked("pidfd_send_signal", _LIBC.syscall(_PIDFD_SEND_SIGNAL, descriptor, number, None, 0))


def _checked(call: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return result
