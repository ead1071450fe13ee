"""The coefficient of the entropy bonus from step to step. It knows scalars alone; the loss is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.algorithms.shared import EntropyConfig
from rlhf.objectives.entropy import adaptive_entropy_coef


class EntropyBonus:
    """`in_force` is what the next step's losses weigh the entropy by. `entropy` is the last that was measured."""

    def __init__(self, config: EntropyConfig) -> None:
        self.adaptive = config.adaptive
        self.coef = config.coef
        self.entropy: float | None = None

    @property
    def in_force(self) -> float:
        """The coefficient; 0 while an adaptive one's entropy is above its target."""
        if self.adaptive is not None and self.entropy is not None and self.entropy > self.adaptive.target:
            return 0.0
        return self.coef

    def adapt(self, entropy: float | None) -> None:
        """Take a step's measured entropy in; None: the policy was not trained in it."""
        if self.adaptive is None or entropy is None:
            return
        self.entropy = entropy
        self.coef = adaptive_entropy_coef(
            self.coef,
            entropy=entropy,
            target=self.adaptive.target,
            step=self.adaptive.step,
            max_coef=self.adaptive.max_coef,
        )

    def state(self) -> Mapping[str, float | None]:
        """For a checkpoint."""
        return {"coef": self.coef, "measured": self.entropy}

    def restore(self, state: Mapping[str, float | None]) -> None:
        """From one."""
        coef = state["coef"]
        assert coef is not None
        self.coef, self.entropy = coef, state["measured"]
