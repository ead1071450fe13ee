"""PPO (arXiv:1707.06347) has a critic, generalised advantages and a clipped surrogate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.microbatch import StepCounts, ValueLossTerms, ValueMicrobatch
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import ClippedConfig, RewardKLConfig, StepUse
from rlhf.deferred import Bool, Float, Int, Tensor
from rlhf.objectives import advantages, aggregation, value_loss


class PPOConfig(ClippedConfig):
    """PPO with a separate critic."""

    has_critic: ClassVar[bool] = True
    critic_reuse_keys: ClassVar[tuple[str, ...]] = ("value_clip",)
    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["ppo"]
    kl: RewardKLConfig = RewardKLConfig()
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per sampled token. 1.0 is usual for a single reward at the end of a response."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """Lambda of generalised advantage estimation (arXiv:1506.02438)."""
    whiten_advantages: bool = True
    """Advantages of a batch get mean 0 and variance 1 over all sampled tokens."""
    value_clip: float | None = Field(default=0.5, gt=0.0)
    """New values are held within this distance of the old values in the value loss; null: not clipped."""
    critic_lr: float = Field(default=1e-5, gt=0.0)
    """Peak learning rate of the critic."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Number of first steps for training the critic alone."""

    @property
    def compares_responses(self) -> bool:
        return False  # the critic is the baseline

    @property
    def critic_only_steps(self) -> int:
        return self.critic_warmup_steps

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield a warm-up of the critic as long as the run."""
        warmup, steps = self.critic_warmup_steps, responses.num_steps
        if steps is not None and warmup >= steps:
            text = f"is {warmup} and must be below train.steps = {steps}, or the policy is never trained"
            yield "algorithm.critic_warmup_steps", text


class PPO(OnlineAlgorithm):
    """Token rewards are the score on the last sampled token minus the KL penalty.

    Advantages are GAE; losses are clipped. Deviations from the paper: 1. the penalty towards the reference is from
    arXiv:1909.08593; 2. advantages are whitened over the whole batch before the split into minibatches; 3. policy and
    critic share no parameters.
    """

    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.whitens = config.whiten_advantages

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return generalised advantages and the critic's targets."""
        assert values is not None, "PPO has a critic"
        return advantages.gae(rewards, values, response_mask, lengths, gamma=self.config.gamma, lam=self.config.lam)

    def critic_loss(self, batch: ValueMicrobatch, counts: StepCounts) -> ValueLossTerms:
        """Return this micro-batch's share of the critic's loss, aggregated like the policy loss."""
        mask, clip = batch.response_mask, self.config.value_clip
        if clip is None:
            per_token = value_loss.value_loss(batch.values, batch.returns, mask)
            num_clipped = batch.values.new_zeros(())
        else:
            columns = (batch.values, batch.old_values, batch.returns, mask)
            per_token = value_loss.clipped_value_loss(*columns, clip=clip)
            num_clipped = value_loss.clipped_values(*columns, clip=clip).sum().float()
        mode, of_samples = self.config.aggregation, batch.sample_tokens
        weights = aggregation.token_weights(mask, batch.lengths, mode=mode, sample_tokens=of_samples, **asdict(counts))
        return ValueLossTerms(loss=(per_token * weights).sum(), clipped_tokens=num_clipped)
