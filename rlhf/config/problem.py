"""Describe mistakes of a configuration by key and text, and raise all mistakes with their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.config.yaml_tree import Key, kind
from rlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class Problem:
    """Describe a mistake by its key and by a text with the value, the rule and the fix."""

    key: Key
    text: str
    meant: tuple[str, ...] = ()  # probably meant instead of an unknown key, so that none of these keys is missing


def problem(dotted: str, text: str) -> Problem:
    return Problem(tuple(dotted.split(".")), text)


def refuse(problems: Sequence[Problem], place: Callable[[Key], str]) -> None:
    """Raise UserError with a line for each problem, if there is any."""
    if problems:
        raise UserError("\n".join(f"{place(p.key)}: {_shown(p.key)}: {p.text}" for p in problems))


def _shown(key: Key) -> str:
    text = ".".join(key)
    return text if text and text.isprintable() and len(text) <= 200 else kind(text)
