"""FIPO (arXiv:2603.19835) weighs a token by how the policy has since changed the tokens after it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import clipped
from rlhf.algorithms.online_config import ClippedConfig, StepUse
from rlhf.objectives import future_kl

SAFE_RATIO = 4.0  # the default of both published codes


class FIPOConfig(ClippedConfig):
    """Future-KL influenced policy optimisation: DAPO's clip, with advantages weighted by the later change."""

    off_policy_keys: ClassVar[tuple[str, ...]] = (
        *ClippedConfig.off_policy_keys,
        "half_life",
        "min_weight",
        "max_weight",
    )
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["fipo"]
    clip_high: float = Field(default=0.28, gt=0.0)
    """The ratio is clipped above at 1 + clip_high. The default is above clip_low, so that unlikely tokens can become
    likely."""
    dual_clip: float | None = Field(default=10.0, gt=1.0)
    """Largest loss of a token with negative advantage, as a multiple of the advantage. Tokens beyond the limit do not
    count as a change for the weights of earlier tokens. null: no limit."""
    half_life: float = Field(default=32.0, gt=0.0)
    """Number of sampled tokens after which the change of a later token counts half. Choose a smaller number for short
    responses."""
    min_weight: float = Field(default=1.0, gt=0.0, le=1.0)
    """Smallest weight of an advantage. The paper uses 1 for a 32B model, and the paper's code recommends 0.8 for small
    models.
    """
    max_weight: float = Field(default=1.2, ge=1.0)
    """Largest weight of an advantage."""


class FIPO(GroupRelative):
    """A token's advantage is multiplied by exp of the discounted log-ratios from the token to the response's end.

    Deviations from the published code: 1. distances count sampled tokens, so that tool output is skipped; 2. responses
    with several tokens beyond the dual clip stay in the loss, as in ms-swift; 3. tokens of negative advantage get a
    weight of at most 1 at ratios above 4, the default of the code and of ms-swift (the paper's run: 10).
    """

    config: FIPOConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        weights = future_kl.influence_weights(
            batch.logprobs.detach() - batch.old_logprobs,
            batch.advantages,
            batch.response_mask,
            batch.lengths,
            half_life=self.config.half_life,
            min_weight=self.config.min_weight,
            max_weight=self.config.max_weight,
            max_ratio=self.config.dual_clip,
            safe_ratio=SAFE_RATIO,
        )
        return clipped(self.config, replace(batch, advantages=weights * batch.advantages))
