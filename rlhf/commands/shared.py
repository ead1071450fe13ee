"""What several commands take, and how all of them write to stdout. Runs nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.config.load import LoadedConfig

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_overrides(command: argparse.ArgumentParser) -> None:
    """`key=value` words, anywhere on the line."""
    command.add_argument("overrides", metavar="key=value", nargs="*", help="set a key of the configuration")


def add_quiet(command: argparse.ArgumentParser) -> None:
    """--quiet."""
    command.add_argument("--quiet", action="store_true", help="no progress")


def add_progress(command: argparse.ArgumentParser) -> None:
    """--quiet or --json."""
    modes = command.add_mutually_exclusive_group()
    modes.add_argument("--quiet", action="store_true", help="no progress")
    modes.add_argument("--json", action="store_true", help="progress as JSON lines on stdout, for programs")


def add_decoding(command: argparse.ArgumentParser) -> None:
    """Options of sampling. None of those of a Decoding has a default here: what is not given is not said."""
    add = command.add_argument
    add("--samples", type=int, metavar="N", help="responses to each prompt; 1")
    add("--temperature", type=float, help="0 is greedy; generate: 1, eval: 0")
    add("--top-p", type=float, help="nucleus sampling; 1 keeps all tokens")
    add("--top-k", type=int, help="sample among the k likeliest tokens")
    add("--max-new-tokens", type=int, metavar="N", help="tokens of a response, at most; 256")
    add("--stop", action="append", metavar="TEXT", help="ends a response; may be repeated")
    add("--seed", type=int, help="of sampling and intervals; 0")
    add("--system-prompt", metavar="TEXT", help="put before every prompt by the chat template")
    add("--no-chat-template", action="store_true", default=None, help="string prompts go to the model as they are")
    add("--device", choices=("cpu", "cuda"), help="cpu if not given")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def said_of_decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Decoding that the arguments give."""
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "system_prompt")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stop is not None:
        given["stop"] = tuple(args.stop)
    if args.no_chat_template is not None:
        given["apply_chat_template"] = False
    return given


def configuration_or_name(target: str, overrides: Sequence[str]) -> LoadedConfig | str:
    """A YAML file's configuration, or the name as it is. UserError for overrides of what has no keys."""
    if target.endswith((".yaml", ".yml")):
        from rlhf.config.load import load

        return load(target, overrides)
    if overrides:
        raise UserError(f"{overrides[0]}: changes a configuration, and {target} is none; give a CONFIG.yaml")
    return target


def say(text: str) -> None:
    """Write to stdout, now."""
    sys.stdout.write(text)
    sys.stdout.flush()
