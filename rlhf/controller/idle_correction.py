"""Warn once if the configured correction of the sampler's mismatch seems never to act.

Reads only the rows of the first steps. On one CPU in float32, engine and trainer agree to rounding, and no bound on the
ratio is ever reached.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rlhf.algorithms.online_config import OnlineConfig

logger = logging.getLogger(__name__)

STEPS = 5  # number of observed steps
NEGLIGIBLE = 1e-3  # nats; the tightest bound of the presets is a mean of 1e-3 over a whole response


class IdleCorrection:
    """Counts the tokens changed by a correction, or by the later clip."""

    def __init__(self, config: OnlineConfig, *, updates_per_step: int) -> None:
        correction = config.correction
        self.steps_left = STEPS
        self.largest = 0.0
        names = ("rollout_weight_truncated", "rollout_weight_masked", "rollout_rejected")
        self.acts = [f"experience/{name}/fraction" for name in names]
        if correction is not None and correction.mode == "bypass":
            self.acts.append("update/clip_fraction/mean")
        moves = config.bypasses_old_logprobs and updates_per_step > 1  # updates move the ratio away from 1 later
        unbounded = correction is not None and correction.weights is None and not correction.rejects
        if correction is None or moves or (unbounded and correction.mode == "policy_gradient"):
            self.steps_left = 0

    @property
    def watches(self) -> bool:
        return self.steps_left > 0

    def see(self, row: Mapping[str, float]) -> None:
        """Observe a step's metrics. Steps without a policy update do not count."""
        difference = row.get("experience/rollout_logprob_diff/max")
        if not self.watches or difference is None or self.acts[0] not in row:
            return
        self.largest = max(self.largest, difference)
        if not difference < NEGLIGIBLE or any(row[key] != 0.0 for key in self.acts):
            self.steps_left = 0
            return
        self.steps_left -= 1
        if self.steps_left == 0:
            logger.warning(
                "algorithm.correction changed no token in %d steps: sampler and trainer differ by at most %.1e nats, "
                "which is within all bounds of the correction. Remove the key, or keep the correction as a guard",
                STEPS,
                self.largest,
            )
