"""ReMax (arXiv:2310.10505) is REINFORCE with the score of the prompt's greedy response as the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.algorithms.shared import Aggregation, ClippedConfig, RewardKLConfig, SequenceOutcomes, WithoutCritic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class ReMaxConfig(ClippedConfig):
    """REINFORCE with a greedy baseline."""

    name: Literal["remax"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How per-token losses are weighted over the whole optimizer step."""


class ReMax(WithoutCritic):
    """One response to a prompt is enough. The greedy response is scored by the same rewards and never trained on.

    Deviations from the paper: 1. a KL penalty in the reward is subtracted from the whole score, whereas the paper gives
    each token the penalties from it on; 2. if a batch takes several optimizer steps, token ratios are clipped as in
    PPO.
    """

    wants_greedy = True

    def __init__(self, config: ReMaxConfig) -> None:
        self.config = config

    @property
    def compares_responses(self) -> bool:
        """Return False: a response is compared only with the greedy one."""
        return False

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the score of the greedy response."""
        from rlhf.objectives.advantages import greedy_centered

        assert outcomes.greedy_scores is not None, "ReMax asks for greedy responses"
        return greedy_centered(outcomes.scores, outcomes.greedy_scores, group_size=outcomes.group_size)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
