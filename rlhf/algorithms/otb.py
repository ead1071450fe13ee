"""OTB (arXiv:2602.07078) uses the energy-weighted mean return of the group at the same step as a token's baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf.algorithms.shared import Aggregation, ClippedConfig, RewardsToGo, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class OTBConfig(ClippedConfig):
    """Policy gradient with the optimal token baseline."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["otb"]
    """The algorithm."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How per-token losses are weighted over the whole optimizer step."""


class OTB(RewardsToGo):
    """A token's advantage is its return minus the baseline of its group's tokens at the same step.

    A response's weight in the baseline is its energy so far, a proxy of its squared gradient: uncertain responses count
    for more than certain ones. The policy worker computes it, since a group's responses may be on several ranks.

    Deviations from the paper: 1. tokens beyond the end of all other responses of the group have no baseline, as in
    verl; 2. the weights of algorithm.correction do not enter the energy; 3. if a batch takes several optimizer steps,
    token ratios are clipped as in PPO.
    """

    has_step_baseline = True

    def __init__(self, config: OTBConfig) -> None:
        self.config = config

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
