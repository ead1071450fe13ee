"""PPO (arXiv:1707.06347): critic, generalised advantages, clipped surrogate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.algorithms.shared import KLConfig, OnlineConfig


class PPOConfig(OnlineConfig):
    """PPO with a critic of its own."""

    name: Literal["ppo"]
    """The algorithm."""
    kl: KLConfig = KLConfig(coef=0.01, estimator="k1", place="reward")
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
    """First steps in which only the critic is trained."""
