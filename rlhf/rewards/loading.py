"""Resolve a reward's name in a config to its source and its columns, before anything starts.

A reward's file is imported in a reward process, never in the caller: a file may hang, exit or take a GPU at import. The
result is a description for pickling; the pool loads the reward again in its processes.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.rewards.functions.table import BUILT_INS, score_of_killed
from rlhf.rewards.processes.process import RewardProcess
from rlhf.rewards.processes.program import LoadError, Signature, Source

MAX_DEPTH = 64  # maximum nesting of lists and objects in a data row


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReward:
    """A loaded reward: its source and its parameters."""

    function: str  # name in the config
    source: Source
    signature: Signature

    @property
    def score_of_killed(self) -> float | None:
        """Return the score of a response whose process hung or died, or None if the function defines no such score."""
        return score_of_killed(self.function, self.source.args) if self.source.path is None else None

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row for the reward's call. KeyError if a required column is missing."""
        fixed = {"prompt", "response", "prompts", "responses", *self.source.args}
        if self.signature.takes_all:
            wanted = [*columns, *self.signature.required]
        else:
            wanted = [*self.signature.required, *(name for name in self.signature.optional if name in columns)]
        return {name: columns[name] for name in wanted if name not in fixed}


def load_reward(
    function: str,
    *,
    args: Mapping[str, Any],
    folders: Sequence[Path],
    key: str,
    timeout_s: float = 60.0,
    memory_gib: float = 8.0,
) -> LoadedReward:
    """Load a built-in, or `path/file.py:name` relative to the first of `folders` with this file.

    `key` is the reward's place in the config, for messages. UserError if the reward is missing or cannot be used.
    """
    source = resolve(function, args=args, folders=folders, key=key)
    process = RewardProcess([source], memory_gib=memory_gib)
    try:
        (signature,) = process.load(timeout_s)
    except LoadError as error:
        raise UserError(f"{key}: {error}") from error
    finally:
        process.kill()
    return LoadedReward(function=function, source=source, signature=signature)


def resolve(function: str, *, args: Mapping[str, Any], folders: Sequence[Path], key: str) -> Source:
    """Return the source of a reward without reading its code. UserError for an unknown built-in or a missing file."""
    path, colon, name = function.rpartition(":")
    if not colon:
        if function in BUILT_INS:
            return Source(path=None, name=function, args=dict(args))
        if function.endswith(".py"):
            raise UserError(f"{key}: `{function}` names a file and no reward in it: write `{function}:NAME`")
        near = difflib.get_close_matches(function, BUILT_INS, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise UserError(
            f"{key}: there is no built-in reward `{function}`: {hint}"
            f"There are {', '.join(BUILT_INS)}; your own is `path/file.py:NAME`"
        )
    candidates = [(folder / os.path.expanduser(path)).resolve() for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return Source(path=str(candidate), name=name, args=dict(args))
    tried = ", ".join(dict.fromkeys(map(str, candidates)))
    raise UserError(f"{key}: the reward file `{path}` does not exist (looked for {tried})")


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
