"""GSPO (arXiv:2507.18071) uses the importance ratio of the whole response, and clips this ratio."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import clipped
from rlhf.algorithms.online_config import Aggregation, ClippedConfig, StepUse
from rlhf.objectives import sequence_ratios


class SequenceClipConfig(ClippedConfig):
    """Ratios of whole responses are near 1, and so are the bounds."""

    takes_steps: ClassVar[StepUse] = "advantages"
    clip_low: float = Field(default=3e-4, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0.0)
    """The ratio is clipped above at 1 + clip_high."""


class SequenceClip(GroupRelative):
    """Each token's ratio is the geometric mean of the response's token ratios.

    The loss is the paper's token form (eq. 14). The gradient equals the gradient of the sequence form (eq. 5) if all
    tokens of a response share an advantage and a weight: not under corrections, token selection or step credit.
    """

    config: SequenceClipConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        columns = (batch.logprobs, batch.old_logprobs, batch.response_mask, batch.lengths)
        return clipped(self.config, batch, sequence_ratios.sequence_token_ratio(*columns))


class GSPOConfig(SequenceClipConfig):
    """Group sequence policy optimisation, with ratios of whole responses."""

    name: Literal["gspo"]
    aggregation: Aggregation = "sequence_mean_token_mean"


class GSPO(SequenceClip):
    """The loss of a response is the mean over the tokens."""

    config: GSPOConfig
