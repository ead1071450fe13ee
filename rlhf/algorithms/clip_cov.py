"""Clip-Cov (arXiv:2505.22617) removes the gradient of some tokens that would lower the entropy most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, StepTokens, Surrogate
from rlhf.algorithms.online import clipped
from rlhf.algorithms.online_config import ClippedConfig, StepUse
from rlhf.deferred import Bool, Tensor
from rlhf.objectives import entropy


class ClipCovConfig(ClippedConfig):
    """Clip-Cov is GRPO without a few tokens whose log-probability and advantage have a high covariance."""

    token_selection_keys: ClassVar[tuple[str, ...]] = ("fraction", "min_covariance", "max_covariance")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["clip_cov"]
    fraction: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens to leave out, at least one token between the bounds."""
    min_covariance: float = 1.0
    """Tokens with a smaller covariance are never left out."""
    max_covariance: float = 5.0
    """Tokens with a larger covariance are never left out."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_covariance >= self.max_covariance:
            raise ValueError(f"min_covariance {self.min_covariance} must be below max_covariance {self.max_covariance}")
        return self


class ClipCov(GroupRelative):
    """A token's covariance compares the token with the mean token of the whole optimizer step.

    Deviations from the paper: 1. covariances use the log-probabilities before the update, equal for every rank and
    micro-batch; 2. PPO's clip stays, as in verl. Raise clip_high and clip_low to match the paper.
    """

    config: ClipCovConfig
    selects_tokens = True

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """Return True for the tokens without a gradient."""
        config, covariance = self.config, entropy.advantage_covariance(step.old_logprobs, step.advantages)
        low, high = config.min_covariance, config.max_covariance
        return entropy.drawn_covariance_tokens(covariance, step.order, low=low, high=high, fraction=config.fraction)

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        assert batch.selected is not None
        whole = clipped(self.config, batch)
        return dataclasses.replace(whole, per_token=whole.per_token.masked_fill(batch.selected, 0.0))
