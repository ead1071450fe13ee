"""The commands, one module each, in the order of the help: `add` declares its arguments, `run` does it.

These are the modules of rlhf that reach into actors, inside functions, so that help stays fast. A command reads its
arguments, makes one call and shows what it gave; the call itself is there for Python too (rlhf/__init__.py).
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
    """What a module of a command has."""

    def add(self, commands: Subparsers) -> None:
        """Declare the command and what it takes."""

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
