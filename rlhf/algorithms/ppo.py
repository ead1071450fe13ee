"""PPO (arXiv:1707.06347) has a critic, generalised advantages and a clipped surrogate."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.shared import ClippedConfig, OnlineDefaults, RewardKLConfig, SequenceOutcomes, StepUse

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts, ValueLossTerms, ValueMicrobatch


class PPOConfig(ClippedConfig):
    """PPO with a separate critic."""

    critic_reuse_keys: ClassVar[tuple[str, ...]] = ("value_clip",)
    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["ppo"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per sampled token. 1.0 is usual for one reward at the end of a response."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """Lambda of generalised advantage estimation (arXiv:1506.02438)."""
    whiten_advantages: bool = True
    """Advantages of a batch get mean 0 and variance 1 over all its sampled tokens."""
    value_clip: float | None = Field(default=0.5, gt=0.0)
    """New values are held within this distance of the old ones in the value loss; null: not clipped."""
    critic_lr: float = Field(default=1e-5, gt=0.0)
    """Peak learning rate of the critic."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Number of first steps that train only the critic."""


class PPO(OnlineDefaults):
    """Token rewards are the score on the last sampled token minus the KL penalty. Advantages are GAE; losses are
    clipped.

    Deviations from the paper: 1. the penalty towards the reference is the one of arXiv:1909.08593; 2. advantages are
    whitened over the whole batch before it is split into minibatches; 3. policy and critic share no parameters.
    """

    has_critic = True
    compares_responses = False

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.critic_warmup_steps = config.critic_warmup_steps

    @property
    def whitens(self) -> bool:
        """Whether advantages get mean 0 and variance 1 over the sampled tokens of the batch."""
        return self.config.whiten_advantages

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> None:
        """Return None: PPO's advantages are per token."""
        return None

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return generalised advantages and the critic's targets."""
        from rlhf.objectives.advantages import gae

        assert values is not None, "PPO has a critic"
        return gae(rewards, values, response_mask, lengths, gamma=self.config.gamma, lam=self.config.lam)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms:
        """Return this micro-batch's share of the critic's loss."""
        from rlhf.algorithms.losses import clipped_critic_loss

        return clipped_critic_loss(batch, counts, config=self.config, value_clip=self.config.value_clip)
