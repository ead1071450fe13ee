"""OTB (arXiv:2602.07078): a token's baseline is the mean return of its group at the same step, weighted by energy."""

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
    """The return from a token on, less the baseline of its group's tokens at that step.

    A response's weight in it is its energy so far, which stands for its squared gradient: a wandering response counts
    for more than a certain one. The policy worker computes it, since a group's responses may lie on several ranks.

    Deviations from the paper: 1. tokens beyond the end of all other responses of the group have no baseline, as in
    verl; 2. the weights of algorithm.correction do not enter the energy; 3. where a batch is trained on in several
    optimizer steps, token ratios are clipped as PPO's are.
    """

    has_step_baseline = True

    def __init__(self, config: OTBConfig) -> None:
        self.config = config

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
