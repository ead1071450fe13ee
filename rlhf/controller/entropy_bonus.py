"""Adapt the coefficient of the entropy bonus from step to step, from scalars alone. The loss is in rlhf.algorithms."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.algorithms.online_config import EntropyConfig
from rlhf.objectives.entropy import adaptive_entropy_coef


class EntropyBonus:
    """`in_force` is the entropy coefficient of the next step's losses. `entropy` is the last measured value."""

    def __init__(self, config: EntropyConfig) -> None:
        self.adaptive = config.adaptive
        self.coef = config.coef
        self.entropy: float | None = None

    @property
    def in_force(self) -> float:
        """Return the coefficient. An adaptive coefficient is 0 while the entropy is above the target."""
        if self.adaptive is not None and self.entropy is not None and self.entropy > self.adaptive.target:
            return 0.0
        return self.coef

    def adapt(self, entropy: float | None) -> None:
        """Adapt to a step's measured entropy; None if the step did not train the policy."""
        if self.adaptive is not None and entropy is not None:
            self.entropy = entropy
            self.coef = adaptive_entropy_coef(self.coef, entropy=entropy, **self.adaptive.model_dump())

    def state(self) -> Mapping[str, float | None]:
        return {"coef": self.coef, "measured": self.entropy}

    def restore(self, state: Mapping[str, float | None]) -> None:
        coef = state["coef"]
        assert coef is not None
        self.coef, self.entropy = coef, state["measured"]
