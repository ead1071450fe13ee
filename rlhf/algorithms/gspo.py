"""GSPO (arXiv:2507.18071) uses the importance ratio of the whole response, and clips that ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.shared import Aggregation, ClippedConfig, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class SequenceClipConfig(ClippedConfig):
    """Ratios of whole responses are near 1, and so are the bounds."""

    takes_steps: ClassVar[StepUse] = "advantages"
    clip_low: float = Field(default=3e-4, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0.0)
    """The ratio is clipped above at 1 + clip_high."""


class GSPOConfig(SequenceClipConfig):
    """Group sequence policy optimisation, with ratios of whole responses."""

    name: Literal["gspo"]
    """The algorithm."""
    aggregation: Aggregation = "sequence_mean_token_mean"
    """How per-token losses are weighted over the whole optimizer step."""


class GSPO(GroupRelative):
    """Each token's ratio is the geometric mean of the response's token ratios.

    The loss is the paper's token form (eq. 14). Its gradient equals that of the sequence form (eq. 5) if all tokens of
    a response have one advantage and one weight. Corrections, token selection or step credit give tokens unequal
    weights. In the token form each weight then multiplies its token's gradient.
    """

    config: SequenceClipConfig

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss
        from rlhf.objectives.sequence_ratios import sequence_token_ratio

        ratio = sequence_token_ratio(batch.logprobs, batch.old_logprobs, batch.response_mask, batch.lengths)
        return composed_loss(self.config, batch, counts, clipped(self.config, batch, ratio), kl_coef=kl_coef)
