"""DRO (arXiv:2405.19107) is REINFORCE with a quadratic penalty on the distance from the policy that sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.shared import OnlineConfig, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class DROConfig(OnlineConfig):
    """Direct reward optimisation with a quadratic penalty."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("beta",)
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dro"]
    """The algorithm."""
    beta: float = Field(default=0.05, gt=0.0)
    """Weight of half the squared log-ratio of a token."""


class DRO(GroupRelative):
    """The gradient has no ratio and no clip. The penalty alone keeps the policy near the sampler.

    Deviations from the paper: 1. the penalty is towards the weights at the start of the update, not a fixed reference;
    2. it applies to each token, not to the whole response; 3. the baseline is GRPO's, not a trained value function.
    """

    config: DROConfig

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
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
