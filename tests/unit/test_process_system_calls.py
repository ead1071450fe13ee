"""System calls without the help of the `os` module."""

from __future__ import annotations

import os
import select
import signal
import subprocess

import pytest

from rlhf.process.system_calls import memfd, pidfd_open, pidfd_send_signal, seal


def test_a_sealed_file_in_memory_is_constant() -> None:
    with open(memfd("test", is_sealable=True), "r+b", buffering=0) as file:
        file.write(b"content")
        seal(file.fileno())
        for change in (lambda: file.write(b"more"), lambda: file.truncate(1), lambda: file.truncate(100)):
            with pytest.raises(PermissionError):
                change()
        assert os.pread(file.fileno(), 100, 0) == b"content"
        assert not os.get_inheritable(file.fileno())
    with open(memfd("test"), "r+b") as file, pytest.raises(PermissionError):
        seal(file.fileno())  # by default there are no seals
    with pytest.raises(OSError, match="memfd_create: Invalid argument"):
        memfd(250 * "x")


def test_a_descriptor_of_a_process_tells_its_end_and_takes_signals() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        descriptor = pidfd_open(process.pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert not poll.poll(0)
        assert not os.get_inheritable(descriptor)
        pidfd_send_signal(descriptor, signal.SIGKILL)
        assert poll.poll(30_000)
    with pytest.raises(ProcessLookupError):
        pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)
