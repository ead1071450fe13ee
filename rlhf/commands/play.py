"""`rlhf play CONFIG`: play the configuration's environment by hand, in the policy's place."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say, typed_lines

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig
    from rlhf.rollouts.records.spans import Played


def add(commands: Subparsers) -> None:
    command = commands.add_parser("play", help="play the configuration's environment by hand, without a model")
    command.add_argument("config", metavar="CONFIG", help="YAML file with rollouts.environment")
    command.add_argument("--row", type=int, default=1, metavar="N", help="row of the training data, from 1; 1")
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Play, and say how it ended."""
    from actors.rollout.play import Left
    from rlhf.config.files.load import load

    try:
        played = play(load(args.config, args.overrides), typed_lines(), lambda text: say(f"{text}\n"), row=args.row)
    except Left:
        say("\nleft before the conversation was over\n")
        return 0
    rewards = played.rewards or ()
    ended = "over" if played.finish_reason == "stop" else "cut at a limit"
    say(f"{ended}: rewards {', '.join(f'{reward:g}' for reward in rewards)}; together {sum(rewards):g}\n")
    return 0


def play(loaded: LoadedConfig, turns: Iterable[str], show: Callable[[str], None], *, row: int = 1) -> Played:
    """Play one conversation. `turns` stand for the policy's turns; `show` gets the policy's input before each."""
    from actors.rollout.play import play as converse

    return converse(loaded, turns, show, row=row)
