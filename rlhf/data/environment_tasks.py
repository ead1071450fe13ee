"""Make rows for the built-in environments: prompts to play, and conversations to learn the format from.

This module is a part of `rlhf.data.tasks`, where the splits are defined. The module imports no environment code, and
repeats the answers of each game.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.errors import UserError

Columns = dict[str, Any]

GUESSING_GAME = "guessing_game"
CALCULATOR = "calculator"


def guessing_game(split: str, size: int, seed: int, args: Mapping[str, Any]) -> list[Columns]:
    """Return prompts `LOW-HIGH?`, cycling through every `secret`. Split sft has whole games, each played to the win.

    The player uses the hints only every other time: half of the guesses are drawn from all numbers.
    """
    low, high = _whole_numbers(GUESSING_GAME, args, low=1, high=7)
    if low >= high:
        raise UserError(f"Task {GUESSING_GAME}: args.low is {low} and must be below args.high, which is {high}.")
    secrets = list(range(low, high + 1))
    rows = []
    for index in range(size):
        draw = random.Random(f"{GUESSING_GAME} {split} {seed} {index}")
        secret = secrets[index % len(secrets)]
        messages = [{"role": "user", "content": f"{low}-{high}?"}]
        if split == "sft":
            messages += _game(secret, low, high, draw)
        rows.append({"messages": messages, "secret": secret, "answer": str(secret)})
    return rows


def _game(secret: int, low: int, high: int, draw: random.Random) -> list[dict[str, str]]:
    least, most = low, high
    turns = []
    while True:
        guess = draw.randint(low, high) if draw.random() < 0.5 else draw.randint(least, most)
        turns.append({"role": "assistant", "content": str(guess)})
        if guess == secret:
            return turns
        if guess < secret:
            least = max(least, guess + 1)
        else:
            most = min(most, guess - 1)
        turns.append({"role": "user", "content": "higher" if guess < secret else "lower"})


_CALL = '<tool_call>\n{{"name": "calculate", "arguments": {{"expression": "{}"}}}}\n</tool_call>'
_INSTRUCTIONS = (
    "You have a calculator. To use it, write a call like this one and nothing else:\n"
    + _CALL.format("12 * 3")
    + "\nYou are then told the result. Answer with the result only."
)


def calculator(split: str, size: int, seed: int, args: Mapping[str, Any]) -> list[Columns]:
    """Return products of two numbers plus a third, all up to `max_value`. The system prompt explains the tool call.

    Split sft has whole conversations with the call.
    """
    (most,) = _whole_numbers(CALCULATOR, args, max_value=99)
    if most < 9:  # otherwise a split could have no questions
        raise UserError(f"Task {CALCULATOR}: args.max_value is {most}, expected 9 or more.")
    rows = []
    for index in range(size):
        draw = random.Random(f"{CALCULATOR} {split} {seed} {index}")
        while True:
            first, second, third = (draw.randint(2, most) for _ in range(3))
            if _split_of(first + second + third) == split:
                break
        expression, answer = f"{first} * {second} + {third}", str(first * second + third)
        messages = [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": f"What is {expression}?"}]
        if split == "sft":
            messages += [
                {"role": "assistant", "content": _CALL.format(expression)},
                {"role": "tool", "content": answer},
                {"role": "assistant", "content": answer},
            ]
        rows.append({"messages": messages, "answer": answer})
    return rows


def _split_of(total: int) -> str:
    """Return the only split a question belongs to: an eighth is held out, and a quarter is for SFT."""
    return "eval" if total % 8 == 0 else "sft" if total % 8 <= 2 else "train"


def _whole_numbers(task: str, args: Mapping[str, Any], **defaults: int) -> list[int]:
    """Return the args in the order of the defaults. UserError for an unknown arg or a value that is not whole."""
    unknown = [name for name in args if name not in defaults]
    if unknown:
        raise UserError(f"Task {task} takes the args {', '.join(defaults)}; found {', '.join(unknown)}.")
    values = [args.get(name, default) for name, default in defaults.items()]
    for name, value in zip(defaults, values, strict=True):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"Task {task}: args.{name} is {value!r}, expected a whole number.")
    return values


ENVIRONMENT_TASKS: Mapping[str, Callable[[str, int, int, Mapping[str, Any]], list[Columns]]] = {
    GUESSING_GAME: guessing_game,
    CALCULATOR: calculator,
}
