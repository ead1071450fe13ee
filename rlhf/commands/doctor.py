"""`rlhf doctor`: what is installed here, and what to do about it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    """Its arguments."""
    commands.add_parser("doctor", help="what is installed, and what to do about it")


def run(args: argparse.Namespace) -> int:
    """Look, and print what was found."""
    from actors.doctor import doctor

    return doctor()
