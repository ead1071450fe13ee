"""Guess the number: the policy names one, and is told whether the secret is higher or lower.

The smallest environment of several turns, and the one to copy from.
"""

from __future__ import annotations

import random
import re

_NUMBER = re.compile(r"-?\d+")


class GuessNumber:
    """The secret is the column `secret` or, without one, a number from low to high that the seed decides.

    Rewards 1 for the right number, on which the game is over. What holds no number, or one out of range, is an attempt.
    """

    def __init__(self, low: int = 1, high: int = 100) -> None:
        if low >= high:
            raise ValueError(f"low is {low} and must be below high, which is {high}")
        self.low = low
        self.high = high

    def reset(self, seed: int, secret: int | None = None) -> None:
        """The prompt says what the game is, so there is nothing to observe yet."""
        self.secret = random.Random(seed).randint(self.low, self.high) if secret is None else int(secret)

    def step(self, response: str) -> tuple[str, float, bool]:
        """The last number of the response is the guess."""
        found = _NUMBER.findall(response)
        guess = int(found[-1][:20]) if found else None
        if guess is None or not self.low <= guess <= self.high:
            return f"a number from {self.low} to {self.high}", 0.0, False
        if guess == self.secret:
            return "right", 1.0, True
        return "higher" if guess < self.secret else "lower", 0.0, False
