"""Define the exceptions that end a command. The command line reports each with its exit code."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong: config, data or arguments. Exit code 2. The message names the place and the fix."""


class RunError(Exception):
    """Something failed at run time. Exit code 1. The message names stage, actor, rank and cause."""


class Preempted(Exception):
    """A signal ended the run, and --resume auto continues it. Exit code 75. The message names the results kept."""
