"""The two ways in which a run ends other than well. Everything the command line reports is one of them."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong: config, data or arguments. Exit code 2. The message names the place and the fix."""


class RunError(Exception):
    """Something failed at run time. Exit code 1. The message names stage, actor, rank and cause."""
