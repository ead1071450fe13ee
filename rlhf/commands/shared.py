"""Options of several commands, and output to stdout for all commands. It runs nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config.files.load import LoadedConfig

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add the `key=value` words, allowed anywhere on the line."""
    command.add_argument("overrides", metavar="key=value", nargs="*", help="set a key of the configuration")


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add the option --quiet."""
    command.add_argument("--quiet", action="store_true", help="no progress")


def add_progress(command: argparse.ArgumentParser) -> None:
    """Add the options --quiet and --json."""
    modes = command.add_mutually_exclusive_group()
    modes.add_argument("--quiet", action="store_true", help="no progress")
    modes.add_argument("--json", action="store_true", help="progress as JSON lines on stdout, for programs")


def configuration_or_name(target: str, overrides: Sequence[str]) -> LoadedConfig | str:
    """Return a YAML file's configuration, or the name unchanged. UserError: overrides are given for a name."""
    if target.endswith((".yaml", ".yml")):
        from rlhf.config.files.load import load

        return load(target, overrides)
    if overrides:
        raise UserError(
            f"{overrides[0]}: changes a configuration, and {target} is none. Give a CONFIG.yaml, or options such as "
            "--column prompt=question in place of keys."
        )
    return target


def say(text: str) -> None:
    """Write a line to stdout and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def typed_lines() -> Iterator[str]:
    """Yield the lines of stdin, asked for where a person types them. Blank lines are passed over."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            say("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
