"""Guess the number: the policy names a number, and reads whether the secret is higher or lower.

This is the smallest multi-turn environment. Copy this file to write a new environment.
"""

from __future__ import annotations

import random
import re

_NUMBER = re.compile(r"-?\d+")


class GuessNumber:
    """The secret is the column `secret` or, without the column, a random number from low to high.

    The reward is 1 for the right number, and ends the game. A response without a number, or with a number out of range,
    also counts as an attempt.
    """

    def __init__(self, low: int = 1, high: int = 100) -> None:
        if low >= high:
            raise ValueError(f"low is {low} and must be below high, which is {high}")
        self.low = low
        self.high = high

    def reset(self, seed: int, secret: int | None = None) -> None:
        """Choose the secret. There is no observation, since the prompt explains the game."""
        self.secret = random.Random(seed).randint(self.low, self.high) if secret is None else int(secret)

    def step(self, response: str) -> tuple[str, float, bool]:
        """Take the last number of the response as the guess."""
        numbers = _NUMBER.findall(response)
        guess = int(numbers[-1][:20]) if numbers else None
        if guess is None or not self.low <= guess <= self.high:
            return f"a number from {self.low} to {self.high}", 0.0, False
        if guess == self.secret:
            return "right", 1.0, True
        return "higher" if guess < self.secret else "lower", 0.0, False
