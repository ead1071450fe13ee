"""What Ctrl-C does to the command line outside of `run_stoppable`. `import rlhf` imports this module first.

While modules are loaded, Ctrl-C ends the process at once, because Python would print a traceback of the import. A
program that imports rlhf keeps its own handler.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

CODE = 128 + signal.SIGINT
INTERRUPTED = (
    threading.Event()
)  # set by Ctrl-C in a command, because libraries turn KeyboardInterrupt into other errors


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt in a command."""
    _handle_with(_raise)


def end_in_silence() -> None:
    """Let Ctrl-C end the process at once, without a line, because the command has said its last line."""
    _handle_with(lambda *_: os._exit(CODE))


def _handle_with(handler: Callable[..., object]) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _raise(*_: object) -> None:
    INTERRUPTED.set()
    raise KeyboardInterrupt


def _end(*_: object) -> None:
    os.write(2, b"rlhf: interrupted\n")
    os._exit(CODE)


_words = sys.orig_argv[1:3]
if _words == ["-m", "rlhf.cli"] or (_words and _words[0].endswith("/rlhf")):  # not in a child process of a command
    _handle_with(_end)
