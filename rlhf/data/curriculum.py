"""Keep the mean scores of prompts, and skip prompts outside the useful band.

The curriculum stands between the stream and the rollouts, and does not change the order of the stream. An unmeasured
prompt is never skipped. A decision depends only on the seed and on the earlier scores.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any


class Curriculum:
    """Running mean scores by prompt. Prompts with a score from `low` to `high` are worth sampling again."""

    def __init__(self, *, seed: int, low: float, high: float, outside: float, newest: float) -> None:
        self._seed = seed
        self._low, self._high = low, high
        self._outside = outside
        self._newest = newest
        self._scores: dict[int, float] = {}

    def measure(self, prompt_id: int, score: float) -> None:
        """Add the mean score of another group of a prompt's responses."""
        before = self._scores.get(prompt_id, score)
        self._scores[prompt_id] = before + self._newest * (score - before)

    def takes(self, prompt_id: int, epoch: int) -> bool:
        """Return whether to sample a prompt in an epoch."""
        score = self._scores.get(prompt_id)
        if score is None or self._low <= score <= self._high:
            return True
        return random.Random(f"curriculum/{self._seed}/{epoch}/{prompt_id}").random() < self._outside

    def counts(self) -> tuple[int, int]:
        """Return the number of measured prompts, and the number within the band."""
        return len(self._scores), sum(self._low <= score <= self._high for score in self._scores.values())

    def state(self) -> dict[str, Any]:
        """Return the scores for the checkpoint."""
        return {"prompt_ids": list(self._scores), "scores": list(self._scores.values())}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._scores = dict(zip(state["prompt_ids"], state["scores"], strict=True))
