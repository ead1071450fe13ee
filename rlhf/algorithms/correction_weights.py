"""Compute the correction of one micro-batch: a factor for each token's policy loss, and the columns for its metrics.

The mathematics is in rlhf.objectives. A rejected or masked token has factor 0 and still counts in the denominator of
the step's loss. The number of such tokens may be known only during the step. A denominator of local tokens would depend
on micro-batches and ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf.algorithms.correction import CorrectionConfig
from rlhf.algorithms.microbatch import Correction
from rlhf.objectives import corrections, policy_loss
from rlhf.objectives.masking import to_tokens

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate

_LEVELS: dict[str, corrections.Level] = {"geometric_mean": "sequence_mean", "sequence": "sequence_sum"}


def corrected(config: CorrectionConfig, batch: PolicyMicrobatch, surrogate: Surrogate) -> tuple[Surrogate, Correction]:
    """Return the surrogate multiplied by the correction weights, and the correction.

    In mode policy_gradient the surrogate is the plain policy gradient instead of the algorithm's own.
    """
    result = correction(config, batch)
    if config.mode == "policy_gradient":
        mask = batch.response_mask
        surrogate = replace(
            surrogate,
            per_token=policy_loss.reinforce(batch.logprobs, batch.advantages, mask),
            ratio=policy_loss.importance_ratio(batch.logprobs.detach(), batch.rollout_logprobs, mask),
            clipped=torch.zeros_like(mask),
            capped=None,
        )
    return replace(surrogate, per_token=surrogate.per_token * result.weights), result


def correction(config: CorrectionConfig, batch: PolicyMicrobatch) -> Correction:
    """Return the configured correction of each token."""
    mask, lengths = batch.response_mask, batch.lengths
    trained = batch.old_logprobs if config.mode == "decoupled" else batch.logprobs.detach()
    gap = (trained, batch.rollout_logprobs, mask)
    low, high = config.min_ratio, config.max_ratio
    if config.weights is None:
        weights = mask.to(trained.dtype)
    elif config.weights == "token_truncated":
        weights = corrections.token_truncated(*gap, max_ratio=high, min_ratio=low)
    elif config.weights == "token_masked":
        weights = corrections.token_masked(*gap, max_ratio=high, min_ratio=low)
    elif config.weights == "sequence_truncated":
        weights = corrections.sequence_truncated(*gap, lengths, max_ratio=high, min_ratio=low)
    else:
        weights = corrections.sequence_masked(*gap, lengths, max_ratio=high, min_ratio=low)
    if config.weights in ("sequence_truncated", "sequence_masked"):
        ratio = to_tokens(corrections.product_ratio(*gap, lengths), lengths, num_tokens=len(mask))
    else:
        ratio = weights if config.weights is None else corrections.token_ratio(*gap)
    outside, nowhere = mask & (weights != ratio), torch.zeros_like(mask)
    masks = config.weights in ("token_masked", "sequence_masked")
    keep = _kept(config, batch, gap)
    return Correction(
        weights=torch.where(keep, weights, 0.0),
        truncated=nowhere if masks else outside,
        masked=outside if masks else nowhere,
        rejected=mask & ~keep,
    )


def _kept(config: CorrectionConfig, batch: PolicyMicrobatch, gap: tuple[Tensor, Tensor, Tensor]) -> Bool[Tensor, " N"]:
    """Return True for the tokens within all configured bounds."""
    mask, lengths = batch.response_mask, batch.lengths
    keep = mask
    for name, (low, high) in config.reject.bounds.items():
        level, _, statistic = name.rpartition("_")
        keep = keep & corrections.accepted(
            *gap,
            lengths,
            statistic=cast(corrections.Statistic, statistic),
            level=_LEVELS.get(level, cast(corrections.Level, level)),
            low=-math.inf if low is None else low,
            high=math.inf if high is None else high,
        )
    if config.off_policy_mask is not None:
        keep = keep & corrections.on_policy_sequences(
            batch.logprobs.detach(),
            batch.rollout_logprobs,
            batch.advantages,
            mask,
            lengths,
            max_kl=config.off_policy_mask,
        )
    return keep
