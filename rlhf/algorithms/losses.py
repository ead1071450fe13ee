"""Compose the loss of one micro-batch from rlhf.objectives. The mathematics is there, not here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.algorithms.correction_weights import corrected
from rlhf.algorithms.microbatch import (
    LossTerms,
    PolicyMicrobatch,
    StepCounts,
    Surrogate,
    ValueLossTerms,
    ValueMicrobatch,
)
from rlhf.algorithms.shared import ClippedConfig, Estimator, OnlineConfig
from rlhf.objectives import kl, policy_loss, value_loss
from rlhf.objectives.aggregation import token_weights
from rlhf.objectives.masking import bin_counts, masked_sum
from rlhf.tracking.metrics.histograms import RATIO_EDGES

KL_ESTIMATORS: Mapping[Estimator, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl.kl_k1,
    "k2": kl.kl_k2,
    "k3": kl.kl_k3,
    "k1_straight_through": kl.kl_k1_straight_through,
    "k3_straight_through": kl.kl_k3_straight_through,
}


def clipped(config: ClippedConfig, batch: PolicyMicrobatch, ratio: Float[Tensor, " N"] | None = None) -> Surrogate:
    """Return PPO's clipped surrogate with the configured bounds.

    ratio: replaces each token's importance ratio, if given.
    """
    mask, advantages = batch.response_mask, batch.advantages
    if ratio is None:
        ratio = policy_loss.importance_ratio(batch.logprobs, batch.old_logprobs, mask)
    columns, low, high = (ratio, advantages, mask), config.clip_low, config.clip_high
    below, above = policy_loss.clipped_ratios(*columns, clip_low=low, clip_high=high)
    capped = None
    if config.dual_clip is None:
        per_token = policy_loss.clipped_loss(*columns, clip_low=low, clip_high=high)
    else:
        per_token = policy_loss.dual_clipped_loss(*columns, clip_low=low, clip_high=high, max_ratio=config.dual_clip)
        capped = mask & (advantages < 0) & (ratio > config.dual_clip)
    return Surrogate(per_token=per_token, ratio=ratio.detach(), clipped=below | above, capped=capped)


def unweighted(batch: PolicyMicrobatch) -> Surrogate:
    """Return the plain policy gradient, without a ratio and without a clip."""
    mask = batch.response_mask
    return Surrogate(
        per_token=policy_loss.reinforce(batch.logprobs, batch.advantages, mask),
        ratio=policy_loss.importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask),
        clipped=torch.zeros_like(mask),
    )


def composed_loss(
    config: OnlineConfig, batch: PolicyMicrobatch, counts: StepCounts, surrogate: Surrogate, *, kl_coef: float
) -> LossTerms:
    """Return the loss: the surrogate with the configured correction, KL penalty and entropy bonus.

    The correction multiplies only the surrogate. Unselected tokens are masked from the surrogate alone; the denominator
    is unchanged. The KL penalty and the bonus are aggregated like the surrogate.
    """
    mask = batch.response_mask
    weights = token_weights(
        mask,
        batch.lengths,
        mode=config.aggregation,
        num_tokens=counts.num_tokens,
        num_sequences=counts.num_sequences,
        max_new_tokens=counts.max_new_tokens,
    )
    correction = None
    if config.correction is not None:
        surrogate, correction = corrected(config.correction, batch, surrogate)
    trained = mask if batch.high_entropy is None else mask & batch.high_entropy
    surrogate_loss = (torch.where(trained, surrogate.per_token, 0.0) * weights).sum()
    loss = surrogate_loss
    kl_loss = torch.zeros((), device=mask.device)
    if batch.ref_logprobs is not None and config.kl.place == "loss":
        kl_loss = (reference_kl(config, batch.logprobs, batch.ref_logprobs, mask) * weights).sum()
        loss = loss + kl_coef * kl_loss
    if batch.entropy_coef:
        loss = loss - batch.entropy_coef * (torch.where(mask, batch.entropy, 0.0) * weights).sum()

    with torch.no_grad():
        old, new = torch.where(mask, batch.old_logprobs, 0.0), torch.where(mask, batch.logprobs, 0.0)
        return LossTerms(
            loss=loss,
            surrogate=surrogate_loss.detach(),
            kl_loss=kl_loss.detach(),
            clipped_tokens=surrogate.clipped.sum().float(),
            capped_tokens=None if surrogate.capped is None else surrogate.capped.sum().float(),
            kl_old_sum=kl.kl_k3(old, new).sum(),
            entropy_sum=masked_sum(batch.entropy, mask),
            ratio_max=surrogate.ratio.max(),
            ratio_counts=bin_counts(surrogate.ratio, mask, edges=RATIO_EDGES),
            correction=correction,
        )


def reference_kl(
    config: OnlineConfig,
    logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Return KL(policy || reference) of each token by the configured estimator, zero outside mask."""
    return KL_ESTIMATORS[config.kl.estimator](torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0))


def clipped_critic_loss(
    batch: ValueMicrobatch, counts: StepCounts, *, config: OnlineConfig, value_clip: float | None
) -> ValueLossTerms:
    """Return the squared error of the values, aggregated like the policy loss.

    value_clip: keeps each value within this distance of the old one; None disables the clip.
    """
    mask = batch.response_mask
    weights = token_weights(
        mask,
        batch.lengths,
        mode=config.aggregation,
        num_tokens=counts.num_tokens,
        num_sequences=counts.num_sequences,
        max_new_tokens=counts.max_new_tokens,
    )
    if value_clip is None:
        per_token = value_loss.value_loss(batch.values, batch.returns, mask)
        clipped = torch.zeros((), device=mask.device)
    else:
        columns = (batch.values, batch.old_values, batch.returns, mask)
        per_token = value_loss.clipped_value_loss(*columns, clip=value_clip)
        clipped = value_loss.clipped_values(*columns, clip=value_clip).sum().float()
    return ValueLossTerms(loss=(per_token * weights).sum(), clipped_tokens=clipped)
