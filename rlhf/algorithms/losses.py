"""The loss of one micro-batch, composed from rlhf.objectives by an algorithm's configuration. No mathematics here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms.correction_weights import Correction, corrected
from rlhf.algorithms.shared import ClippedConfig, Estimator, OnlineConfig
from rlhf.objectives import kl, policy_loss, value_loss
from rlhf.objectives.aggregation import token_weights
from rlhf.objectives.masking import bin_counts, masked_sum
from rlhf.tracking.histograms import RATIO_EDGES

KL_ESTIMATORS: Mapping[Estimator, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl.kl_k1,
    "k2": kl.kl_k2,
    "k3": kl.kl_k3,
    "k1_straight_through": kl.kl_k1_straight_through,
    "k3_straight_through": kl.kl_k3_straight_through,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What the losses of one optimizer step are divided by: over all its ranks and micro-batches."""

    num_tokens: int
    num_sequences: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """All sampled tokens of one optimizer step, over its ranks and micro-batches, before its update. No gradient.

    They stand in the order of their sequences' ids, so that nothing depends on the ranks that hold them.
    """

    old_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    order: Float[Tensor, " N"]  # a random number for each, the same whenever the step is repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMicrobatch:
    """One micro-batch of the policy in flat columns. Only logprobs and entropy carry a gradient."""

    lengths: Int[Tensor, " B"]
    response_mask: Bool[Tensor, " N"]
    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    old_logprobs: Float[Tensor, " N"]
    rollout_logprobs: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"] | None  # None: the run has no reference
    advantages: Float[Tensor, " N"]
    high_entropy: Bool[Tensor, " N"] | None = None  # tokens that are trained on; None: all
    selected: Bool[Tensor, " N"] | None = None  # what the algorithm treats apart; None: nothing
    entropy_coef: float = 0.0  # of the bonus, in force


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueMicrobatch:
    """One micro-batch of the critic in flat columns. Only values carries a gradient."""

    lengths: Int[Tensor, " B"]
    response_mask: Bool[Tensor, " N"]
    values: Float[Tensor, " N"]
    old_values: Float[Tensor, " N"]
    returns: Float[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """The policy's term of each token, zero where it was not sampled, and what the metrics say of it."""

    per_token: Float[Tensor, " N"]  # with its graph
    ratio: Float[Tensor, " N"]  # the importance ratio that it reads
    clipped: Bool[Tensor, " N"]  # where the algorithm holds the ratio back
    capped: Bool[Tensor, " N"] | None = None  # where the dual clip does; None: the algorithm has none set


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """This micro-batch's share of the step's loss, and sums over its tokens for the metrics."""

    loss: Float[Tensor, ""]  # with its graph
    surrogate: Float[Tensor, ""]  # its part without KL and entropy, detached
    kl_loss: Float[Tensor, ""]  # its KL part, before the coefficient, detached
    clipped_tokens: Float[Tensor, ""]
    capped_tokens: Float[Tensor, ""] | None
    kl_old_sum: Float[Tensor, ""]
    entropy_sum: Float[Tensor, ""]
    ratio_max: Float[Tensor, ""]
    ratio_counts: Float[Tensor, " n"]  # of the sampled tokens, between rlhf.tracking.histograms.RATIO_EDGES
    correction: Correction | None  # None: the run has none


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLossTerms:
    """The same for a critic."""

    loss: Float[Tensor, ""]  # with its graph
    clipped_tokens: Float[Tensor, ""]


def clipped(config: ClippedConfig, batch: PolicyMicrobatch, ratio: Float[Tensor, " N"] | None = None) -> Surrogate:
    """PPO's clipped surrogate with the configured bounds, of each token's own importance ratio unless one is given."""
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
    """The plain policy gradient: no ratio weighs it, and nothing is clipped."""
    mask = batch.response_mask
    return Surrogate(
        per_token=policy_loss.reinforce(batch.logprobs, batch.advantages, mask),
        ratio=policy_loss.importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask),
        clipped=torch.zeros_like(mask),
    )


def composed_loss(
    config: OnlineConfig, batch: PolicyMicrobatch, counts: StepCounts, surrogate: Surrogate, *, kl_coef: float
) -> LossTerms:
    """The surrogate with the configured correction, KL penalty and entropy bonus.

    The correction weighs the surrogate alone, and tokens that are not trained on are left out of it alone; what it is
    divided by is the same. The KL penalty and the bonus are aggregated as the surrogate is.
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
    """KL(policy || reference) of each token by the configured estimator, zero outside mask."""
    return KL_ESTIMATORS[config.kl.estimator](torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0))


def clipped_critic_loss(
    batch: ValueMicrobatch, counts: StepCounts, *, config: OnlineConfig, value_clip: float | None
) -> ValueLossTerms:
    """Squared error of the values, held near the old ones if value_clip is given; aggregated as the policy's loss."""
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
