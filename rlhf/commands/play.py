"""`rlhf play CONFIG`: play the configuration's environment by hand, in the policy's place."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import AnyConfig, loaded_config, starts_work, typed_lines, write_stdout

if TYPE_CHECKING:
    from rlhf.rollouts.records.spans import Played


@starts_work
def play(
    config: AnyConfig, turns: Iterable[str], show: Callable[[str], None], overrides: Sequence[str] = (), *, row: int = 1
) -> Played:
    """Play one conversation with the configuration's environment by hand, without a model.

    Each element of `turns` stands for a turn of the policy. `show` gets the policy's input before the turn.

    Args:
        config (CONFIG): a YAML file with rollouts.environment.
        row (N): the row of the training data, from 1.
    """
    from actors.rollout.play import play_conversation

    return play_conversation(loaded_config(config, overrides), turns, show, row=row)


def _present(args: argparse.Namespace) -> None:
    from actors.rollout.play import Left

    try:
        played = COMMAND.call(args, turns=typed_lines(), show=lambda text: write_stdout(f"{text}\n"))
    except Left:
        write_stdout("\nleft before the conversation was over\n")
        return
    rewards = played.rewards or ()
    end = "over" if played.finish_reason == "stop" else "stopped at a limit"
    write_stdout(f"{end}: rewards {', '.join(f'{reward:g}' for reward in rewards)}; together {sum(rewards):g}\n")


COMMAND = Command(play, _present, changes={"turns": None, "show": None})
