"""The ways in which a run ends other than well. Everything the command line reports is one of them."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong: config, data or arguments. Exit code 2. The message names the place and the fix."""


class RunError(Exception):
    """Something failed at run time. Exit code 1. The message names stage, actor, rank and cause."""


class Preempted(Exception):
    """The run was told to end before it was done, and can go on with --resume auto. Exit code 75. The message says what
    is kept."""
