"""What a run has measured of its prompts, and which of them it passes over for that.

Stands between the stream, whose order it does not change, and the rollouts. A prompt that has not been measured is
never passed over. What is decided depends on the seed and on the scores before it alone. It reads no score's making.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any


class Curriculum:
    """Running mean scores by prompt. `low` to `high` is the band of what is worth asking again."""

    def __init__(self, *, seed: int, low: float, high: float, outside: float, newest: float) -> None:
        self._seed = seed
        self._low, self._high = low, high
        self._outside = outside
        self._newest = newest
        self._scores: dict[int, float] = {}

    def measure(self, prompt_id: int, score: float) -> None:
        """Take in the mean score of one more group of a prompt's responses."""
        before = self._scores.get(prompt_id, score)
        self._scores[prompt_id] = before + self._newest * (score - before)

    def takes(self, prompt_id: int, epoch: int) -> bool:
        """Whether a prompt is asked, now that it comes up in an epoch."""
        score = self._scores.get(prompt_id)
        if score is None or self._low <= score <= self._high:
            return True
        return random.Random(f"curriculum/{self._seed}/{epoch}/{prompt_id}").random() < self._outside

    def counts(self) -> tuple[int, int]:
        """Prompts that have been measured, and those of them that are within the band."""
        return len(self._scores), sum(self._low <= score <= self._high for score in self._scores.values())

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"prompt_ids": list(self._scores), "scores": list(self._scores.values())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self._scores = dict(zip(state["prompt_ids"], state["scores"], strict=True))
