"""GRPO (arXiv:2402.03300): advantages from a prompt's group of responses, clipped surrogate, no critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.algorithms.shared import OnlineConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from rlhf.algorithms.losses import LossTerms, PolicyMicrobatch, StepCounts, ValueLossTerms, ValueMicrobatch

GROUP_STD_EPS = 1e-6  # the published codes use 1e-4 (TRL), 1e-6 (verl), 1e-8 and 1e-9: it matters only near std 0


class GRPOConfig(OnlineConfig):
    """Group-relative policy optimisation."""

    name: Literal["grpo"]
    """The algorithm."""
    std_normalize: bool = True
    """Divide the centred scores by their group's standard deviation; False is the Dr. GRPO form (arXiv:2503.20783)."""


class GRPO:
    """Group-relative policy optimisation. Every token of a response has the response's advantage.

    Deviations from the paper: 1. the loss is aggregated over the tokens of the whole optimizer step
    (aggregation: token_mean), set sequence_mean_token_mean for the paper's; 2. no KL penalty by default.
    """

    has_critic = False
    critic_warmup_steps = 0
    whitens = False

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config

    def sequence_advantages(self, scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
        """Each score against its group."""
        from rlhf.objectives.advantages import group_centered, group_normalized

        if self.config.std_normalize:
            return group_normalized(scores, group_size=group_size, eps=GROUP_STD_EPS)
        return group_centered(scores, group_size=group_size)

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"],
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """GRPO has no critic."""
        raise TypeError("GRPO has advantages per sequence, not per token")

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        from rlhf.algorithms.losses import clipped_policy_loss

        return clipped_policy_loss(self.config, batch, counts, kl_coef=kl_coef)

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms:
        """GRPO has no critic."""
        raise TypeError("GRPO has no critic")
