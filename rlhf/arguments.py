"""The arguments of the command line, and error messages for invalid ones. It runs no command."""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import NoReturn

from rlhf.commands import COMMANDS
from rlhf.commands.shared import Subparsers
from rlhf.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows what there is")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the words into a command with its options. UserError: the words are invalid."""
    args, extra = _parser().parse_known_args(argv)
    takes_overrides = "overrides" in args
    if extra and (not takes_overrides or any(word.startswith("-") for word in extra)):
        wrong = [word for word in extra if word.startswith("-")] or extra
        raise UserError(
            f"{args.command} does not know {' '.join(wrong)}; `rlhf {args.command} --help` shows what it knows"
        )
    if takes_overrides:
        args.overrides = [*args.overrides, *extra]  # argparse does not parse overrides after an option
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rlhf", description="Post-training on Ray: from a laptop CPU to a cluster.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("ray-rlhf"))
    commands: Subparsers = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        required=True,
        parser_class=_Parser,
    )
    for command in COMMANDS.values():
        command.add(commands)
    for each in commands.choices.values():
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
