"""Resolve a reward's name in a config to a source and columns, before anything starts.

A reward's file is imported in a reward process, never in the caller: a file may hang, exit or take a GPU at import. The
result is a description for pickling; the pool loads the reward again in each process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.extensions import CodeSource, LoadError, find_code
from rlhf.rewards.functions.table import BUILT_INS, score_of_killed
from rlhf.rewards.processes.process import RewardProcess
from rlhf.rewards.processes.program import Signature

MAX_DEPTH = 64  # maximum nesting of lists and objects in a data row


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReward:
    """Describe a loaded reward by source and parameters."""

    function: str  # name in the config
    source: CodeSource
    signature: Signature

    @property
    def score_of_killed(self) -> float | None:
        return score_of_killed(self.function, self.source.args)

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row for the reward's call. KeyError if a required column is missing."""
        fixed = {"prompt", "response", "prompts", "responses", *self.source.args}
        return self.signature.select({name: value for name, value in columns.items() if name not in fixed})


def load_reward(
    function: str,
    *,
    args: Mapping[str, Any],
    folders: Sequence[Path],
    key: str,
    timeout_s: float = 60.0,
    memory_gib: float = 8.0,
) -> LoadedReward:
    """Load a built-in, a package's entry point, or `path/file.py:name` in the first of `folders` with the file.

    `key` is the reward's place in the config, for messages. UserError if the reward is missing or cannot be used.
    """
    source = find_code("reward", function, built_ins=BUILT_INS, args=args, folders=folders, key=key)
    process = RewardProcess([source], memory_gib=memory_gib)
    try:
        (signature,) = process.load(timeout_s)
    except LoadError as error:
        raise UserError(f"{key}: {error}") from error
    finally:
        process.kill()
    return LoadedReward(function=function, source=source, signature=signature)


def is_nested_too_deep(columns: Mapping[str, Any]) -> bool:
    """Return whether lists and objects in a row are nested deeper than MAX_DEPTH, too deep to send to a reward."""
    level: list[Any] = [columns]
    for _ in range(MAX_DEPTH + 1):
        nested = [value for value in level if isinstance(value, Mapping | list | tuple)]
        level = [child for value in nested for child in (value.values() if isinstance(value, Mapping) else value)]
        if not level:
            return False
    return True


def check_columns(reward: LoadedReward, available: Collection[str], *, key: str, data: str) -> None:
    """Raise UserError if the dataset called `data` lacks a required column of the reward."""
    missing = [name for name in reward.signature.required if name not in available]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise UserError(
            f"{key}: `{reward.function}` needs the column {names}, and {data} has {', '.join(available) or 'none'}. "
            "Add it to the data, or map it from another one with data.columns"
        )
