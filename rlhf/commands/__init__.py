"""The commands, one module each, in the order of the help: `add` declares the arguments, `run` executes the command.

These modules of rlhf import actors, inside functions, so that help stays fast. A command reads its arguments, makes one
call and shows the result. Python code can make the same call (rlhf/__init__.py).
"""

from __future__ import annotations

import argparse
from typing import Protocol

from rlhf.commands import (
    dashboard,
    doctor,
    evaluate,
    export,
    generate,
    merge,
    plan,
    play,
    quickstart,
    report,
    reward,
    serve,
    serve_reward,
    submit,
    sweep,
    train,
    view,
)
from rlhf.commands.shared import Subparsers


class Command(Protocol):
    """The interface of a command's module."""

    def add(self, commands: Subparsers) -> None:
        """Declare the command and its arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit code."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "plan": plan,
    "sweep": sweep,
    "quickstart": quickstart,
    "export": export,
    "merge": merge,
    "generate": generate,
    "eval": evaluate,
    "serve": serve,
    "reward": reward,
    "play": play,
    "serve-reward": serve_reward,
    "view": view,
    "report": report,
    "dashboard": dashboard,
    "submit": submit,
    "doctor": doctor,
}
