"""Build the kernel restrictions of a sandboxed program: a seccomp filter and a Landlock ruleset.

The parent builds both, and the process of the program applies them (`rlhf.rewards.sandbox.program`). The filter lists
the system calls a single computing process needs, and answers "not implemented" to every call outside the list. There
is therefore no fork, no exec, no socket to the outside, no signal to a second process and no change of a file, for
every C library and kernel. Always list allowed calls: never invert the list.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Iterator

# System call numbers on x86_64 and aarch64 (None if the machine has no such call).
_CALLS: dict[str, tuple[int, int | None]] = {
    # open files, and files permitted by Landlock or the mounts
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "open": (2, None), "openat": (257, 56), "close": (3, 57), "close_range": (436, 436),
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "lseek": (8, 62), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "ftruncate": (77, 46), "fsync": (74, 82),
    "fadvise64": (221, 223),
    # waiting, pipes and socket pairs within the process (asyncio)
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "pipe": (22, None), "pipe2": (293, 59), "recvfrom": (45, 207), "sendto": (44, 206),
    "shutdown": (48, 210), "getsockopt": (55, 209), "getsockname": (51, 204),
    "getpeername": (52, 205),
    # memory, threads, time, signals to itself
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "arch_prctl": (158, None), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "restart_syscall": (219, 128),
    # identity and limits
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "umask": (95, 166),
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "wait4": (61, 260), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Calls allowed only with some arguments.
_CLONE, _FCNTL, _IOCTL, _PRLIMIT, _SOCKETPAIR = (56, 220), (72, 25), (16, 29), (302, 261), (53, 199)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of _CALLS, AUDIT_ARCH

_CLONE_THREAD = 0x10000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Not F_SETOWN: a file's owner receives signals.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONBIO, FIONCLEX, FIOCLEX
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF  # a datagram socket could be sent to another process

_LOAD, _EQUAL, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06  # classic BPF: 32-bit words
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ARGUMENT = 16  # offset of the first argument in struct seccomp_data; the low half comes first on both machines

_CREATE_RULESET, _ADD_RULE = 444, 445  # on every machine
_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # number of file rights by ABI version; 16 from version 5 on


class Unavailable(Exception):
    """Raised if this kernel or machine cannot confine a process. The message says why."""


def seccomp_filter() -> bytes:
    """Return the filter as an array of struct sock_filter. Unavailable on an unknown machine type."""
    machine = platform.machine()
    if machine not in _MACHINES:
        raise Unavailable(f"the system calls of machine type {machine} are not known")
    column, architecture = _MACHINES[machine]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code += _when(_CLONE[column], 0, [(_ANY_BIT, 0, 1, _CLONE_THREAD)])
    code += _when(_PRLIMIT[column], 0, [(_EQUAL, 0, 1, 0)])  # only the limits of the calling process
    for numbers, commands in ((_FCNTL, _FCNTL_COMMANDS), (_IOCTL, _IOCTL_COMMANDS)):
        for command in commands:
            code += _when(numbers[column], 1, [(_EQUAL, 0, 1, command)])
    is_stream = [(_LOAD, 0, 0, _ARGUMENT + 8), (_AND, 0, 0, _SOCK_TYPE_MASK), (_EQUAL, 0, 1, _SOCK_STREAM)]
    code += _when(_SOCKETPAIR[column], 0, [(_EQUAL, 0, 4, _AF_UNIX), *is_stream])
    code.append((_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _when(number: int, argument: int, test: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Allow a call if `test` falls through to the end. `test` starts with an argument loaded."""
    yield (_EQUAL, 0, len(test) + 3, number)
    yield (_LOAD, 0, 0, _ARGUMENT + 8 * argument)
    yield from test
    yield (_RETURN, 0, 0, _ALLOW)
    yield (_LOAD, 0, 0, 0)  # reload the call number for the next test


def landlock_ruleset(readable: Iterable[str], writable: Iterable[str]) -> int:
    """Return a ruleset's file descriptor: all beneath `readable` may be read, and the files `writable` also written.

    Missing paths are left out. Unavailable if the kernel has no Landlock.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        raise Unavailable(f"the kernel has no Landlock ({os.strerror(ctypes.get_errno())})")
    handled = struct.pack("=Q", (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1)
    ruleset: int = libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
    if ruleset < 0:
        raise Unavailable(f"the Landlock ruleset could not be created ({os.strerror(ctypes.get_errno())})")
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in writable]
    for path, rights in [rule for rule in rules if os.path.exists(rule[0])]:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            allowed = rights if os.path.isdir(path) else rights & ~_READ_DIR
            rule = struct.pack("=Qi", allowed, parent)
            if libc.syscall(_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0)) != 0:
                reason = os.strerror(ctypes.get_errno())
                os.close(ruleset)
                raise Unavailable(f"Landlock refused a rule for {path} ({reason})")
        finally:
            os.close(parent)
    return ruleset
