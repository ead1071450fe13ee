"""Try a tokenizer's chat template, since a template is a program and may come from anywhere.

transformers runs templates in a sandbox without files and Python, but with no limit of time and memory.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

import psutil

from rlhf.errors import UserError

LIMIT_S = 10.0
_MORE_BYTES = 2**30  # on top of the process's memory at the start
_TRIAL = [{"role": "user", "content": "1 + 1 = ?"}]
_OUT_OF_MEMORY = 3


def refuse_runaway_template(tokenizer: Any, *, limit_s: float = LIMIT_S) -> None:
    """Raise UserError if a forked process cannot render one short message within limits of time and memory.

    An error raised by the template is ignored here, and comes again with the first rendered row.
    """
    if tokenizer.chat_template is None:
        return
    child = os.fork()
    if child == 0:
        _render_and_exit(tokenizer, limit_s)
    status = _wait(child, time.monotonic() + limit_s)
    if status is None or os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == _OUT_OF_MEMORY:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} does not render a message of a few words within "
            f"{limit_s:g} s and 1 GiB of memory. Use another tokenizer, or replace the template."
        )


def _render_and_exit(tokenizer: Any, limit_s: float) -> None:
    code = 0
    try:
        seconds = int(limit_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        most = psutil.Process().memory_info().vms + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        tokenizer.apply_chat_template(_TRIAL, tokenize=False)
    except MemoryError:
        code = _OUT_OF_MEMORY
    finally:
        os._exit(code)  # catches everything, since nothing of the parent may run here


def _wait(child: int, deadline: float) -> int | None:
    """Return the exit status of the child. None: killed after the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
