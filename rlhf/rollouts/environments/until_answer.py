"""An environment with the tools of servers: the conversation ends with the first turn without a call."""

from __future__ import annotations


class UntilAnswer:
    """Leaves the answer to the rewards. The environment's reward is always 0."""

    def reset(self, seed: int) -> None:
        """Do nothing: the prompt already asks the question."""

    def step(self, response: str) -> tuple[str, float, bool]:
        """End the conversation: the turn calls no tool."""
        return "", 0.0, True
