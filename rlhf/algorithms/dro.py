"""DRO (arXiv:2405.19107): REINFORCE with a quadratic penalty on the distance from the policy that sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.shared import OnlineConfig, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class DROConfig(OnlineConfig):
    """Direct reward optimisation."""

    felt_off_policy: ClassVar[tuple[str, ...]] = ("beta",)
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dro"]
    """The algorithm."""
    beta: float = Field(default=0.05, gt=0.0)
    """Weight of half the squared log-ratio of a token."""


class DRO(GroupRelative):
    """No ratio weighs the gradient, and nothing is clipped: the penalty alone holds the policy.

    Deviations from the paper: 1. the penalty is towards the weights at the start of the update, not a fixed reference;
    2. it is of each token, not of the whole response; 3. the baseline is GRPO's, not a learnt value.
    """

    config: DROConfig

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        import torch

        from rlhf.algorithms.losses import composed_loss
        from rlhf.algorithms.microbatch import Surrogate
        from rlhf.objectives.policy_loss import importance_ratio
        from rlhf.objectives.weighted_loss import dro

        mask = batch.response_mask
        surrogate = Surrogate(
            per_token=dro(batch.logprobs, batch.old_logprobs, batch.advantages, mask, beta=self.config.beta),
            ratio=importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask),
            clipped=torch.zeros_like(mask),
        )
        return composed_loss(self.config, batch, counts, surrogate, kl_coef=kl_coef)
