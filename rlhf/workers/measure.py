"""Metrics of a micro-batch, as sums and counts that merge over micro-batches, ranks and minibatches."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms.losses import LossTerms, ValueLossTerms, reference_kl
from rlhf.algorithms.shared import OnlineConfig
from rlhf.objectives import corrections
from rlhf.objectives.masking import Moments, to_tokens
from rlhf.roles import Metrics
from rlhf.tracking.reductions import Max, Mean, Reduction, Std, Sum


def sampler_metrics(
    logprobs: Float[Tensor, " N"], rollout_logprobs: Float[Tensor, " N"], mask: Bool[Tensor, " N"]
) -> dict[str, Reduction]:
    """How far trainer and sampler are apart on the sampled tokens; `logprobs` by the weights that sampled them."""
    count = int(mask.sum())
    diff = torch.where(mask, logprobs - rollout_logprobs, 0.0)
    return {
        "experience/rollout_logprob_diff/mean": Mean(total=float(diff.abs().sum()), count=count),
        "experience/rollout_logprob_diff/max": Max(value=float(diff.abs().max())),
        "experience/kl_rollout/mean": Mean(total=-float(diff.sum()), count=count),
    }


def experience_metrics(
    config: OnlineConfig,
    old_logprobs: Float[Tensor, " N"],
    rollout_logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"] | None,
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
) -> Metrics:
    """How far trainer, sampler and reference are apart on the sampled tokens, before they are trained on."""
    count = int(mask.sum())
    found = sampler_metrics(old_logprobs, rollout_logprobs, mask)
    if ref_logprobs is not None:
        divergence = reference_kl(config, old_logprobs, ref_logprobs, mask)
        found["experience/kl_ref/mean"] = Mean(total=float(divergence.sum()), count=count)
    if config.correction is not None:
        if config.correction.level == "token":
            ratio = corrections.token_ratio(old_logprobs, rollout_logprobs, mask)
        else:
            per_sequence = corrections.sequence_ratio(old_logprobs, rollout_logprobs, mask, lengths)
            ratio = to_tokens(per_sequence, lengths, num_tokens=len(mask))
        ratio = ratio[mask]
        found["experience/rollout_weight/mean"] = Mean(
            total=float(ratio.clamp(max=config.correction.max_ratio).sum()), count=count
        )
        found["experience/rollout_weight_truncated/fraction"] = Mean(
            total=float((ratio > config.correction.max_ratio).sum()), count=count
        )
    return found


def update_metrics(terms: LossTerms, *, sampled: int, passed: int, step_tokens: int, has_kl_loss: bool) -> Metrics:
    """Of a policy micro-batch with `sampled` tokens in its mask and `passed` tokens in all.

    A loss term is this micro-batch's share of the step's loss; times the step's tokens it becomes a total whose count
    is the sampled tokens, so that shares merge to the loss of the step and steps to their token-weighted mean.
    """
    values = torch.stack(
        [
            terms.loss.detach(),
            terms.surrogate,
            terms.kl_loss,
            terms.clipped_tokens,
            terms.kl_old_sum,
            terms.entropy_sum,
            terms.ratio_max,
        ]
    )
    loss, surrogate, kl_loss, clipped, kl_old, entropy, ratio_max = values.tolist()  # one wait for the device
    found: dict[str, Reduction] = {
        "update/loss/mean": Mean(total=loss * step_tokens, count=sampled),
        "update/policy_loss/mean": Mean(total=surrogate * step_tokens, count=sampled),
        "update/clip_fraction/mean": Mean(total=clipped, count=sampled),
        "update/kl_old/mean": Mean(total=kl_old, count=sampled),
        "update/entropy/mean": Mean(total=entropy, count=sampled),
        "update/ratio/max": Max(value=ratio_max),
        "update/tokens/total": Sum(total=passed),
    }
    if terms.capped_tokens is not None:
        found["update/dual_clip_fraction/mean"] = Mean(total=float(terms.capped_tokens), count=sampled)
    if has_kl_loss:
        found["update/kl_loss/mean"] = Mean(total=kl_loss * step_tokens, count=sampled)
    return found


def critic_metrics(terms: ValueLossTerms, *, sampled: int, step_tokens: int, clips: bool) -> Metrics:
    """Of a critic micro-batch; losses add up as the policy's do."""
    loss, clipped = torch.stack([terms.loss.detach(), terms.clipped_tokens]).tolist()
    found: dict[str, Reduction] = {"update/value_loss/mean": Mean(total=loss * step_tokens, count=sampled)}
    if clips:
        found["update/value_clip_fraction/mean"] = Mean(total=clipped, count=sampled)
    return found


def as_std(found: Moments) -> Std:
    """Moments as a metric."""
    return Std(count=found.count, mean=found.mean, m2=found.squared_deviation)
