"""Define the exceptions that end a command. The command line reports each with its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The user's input is wrong: config, data or arguments. Exit code 2. The message names the place and the fix."""


class RunError(Exception):
    """Something failed at run time. Exit code 1. The message names stage, actor, rank and cause."""


class Preempted(Exception):
    """A signal ended the run, and --resume auto continues it. Exit code 75. The message names the results kept."""


@contextmanager
def prefix_errors(key: str) -> Iterator[None]:
    """Put the key of the configuration in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
