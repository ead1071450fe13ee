"""Metrics of a micro-batch, as sums and counts. The metrics merge over micro-batches, ranks and minibatches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algorithms.microbatch import Correction, LossTerms
from rlhf.algorithms.online import reference_kl
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.objectives.kl import kl_k1, kl_k3
from rlhf.objectives.masking import Moments, bin_counts, sequence_counts, sequence_means, sequence_sums
from rlhf.roles import SequenceReport
from rlhf.tracking.metrics.histograms import ADVANTAGE_EDGES, RATIO_EDGES
from rlhf.tracking.metrics.reductions import EffectiveShare, Histogram, Max, Mean, Min, Reduction, Std, Sum
from rlhf.types import Rollouts


def sampler_metrics(
    logprobs: Float[Tensor, " N"],
    rollout_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    lags: Int[Tensor, " N"],
) -> dict[str, Reduction]:
    """Measure the gap between trainer and sampler on the sampled tokens.

    Args:
        logprobs: by the trainer, before training on the tokens.
        lags: versions between the trained weights and the sampler's weights of each token.
    """
    old, rollout = (torch.where(mask, column, 0.0).double() for column in (logprobs, rollout_logprobs))
    gap = old - rollout
    ratio, products = gap.exp(), sequence_sums(gap, lengths).exp()  # both are 1 outside the mask
    sampled = sequence_counts(mask, lengths) > 0
    values = torch.stack(
        [
            mask.sum(),
            sampled.sum(),
            gap.abs().sum(),
            gap.abs().max(),
            kl_k1(rollout, old).sum(),
            kl_k3(rollout, old).sum(),
            torch.where(mask, ratio, 0.0).sum(),
            torch.where(mask, ratio, 0.0).max(),
            torch.where(mask, ratio, torch.inf).min(),
            torch.where(mask, ratio.square(), 0.0).sum(),
            torch.where(sampled, products, 0.0).sum(),
            torch.where(sampled, products.square(), 0.0).sum(),
        ]
    ).tolist()  # synchronizes the device once
    tokens, sequences, diff, diff_max, k1, k3, ratios, ratio_max, ratio_min, squares, product, product_squares = values
    return {
        "experience/rollout_logprob_diff/mean": Mean(total=diff, count=tokens),
        "experience/rollout_logprob_diff/max": Max(value=diff_max),
        "experience/kl_rollout/mean": Mean(total=k1, count=tokens),
        "experience/kl_rollout_k3/mean": Mean(total=k3, count=tokens),
        "experience/rollout_ratio/mean": Mean(total=ratios, count=tokens),
        "experience/rollout_ratio/max": Max(value=ratio_max),
        "experience/rollout_ratio/min": Min(value=ratio_min),
        "experience/rollout_chi2_token": Mean(total=squares - tokens, count=tokens),
        "experience/rollout_chi2_sequence": Mean(total=product_squares - sequences, count=sequences),
        "experience/rollout_ess_token": EffectiveShare(total=ratios, squares=squares, count=tokens),
        "experience/rollout_ess_sequence": EffectiveShare(total=product, squares=product_squares, count=sequences),
        **_ess_by_lag(ratio[mask], lags[mask]),
    }


def _ess_by_lag(ratio: Float[Tensor, " n"], lags: Int[Tensor, " n"]) -> dict[str, Reduction]:
    values, which = lags.unique(return_inverse=True)
    sums = ratio.new_zeros(3, len(values))
    for row, column in zip(sums, (ratio, ratio.square(), torch.ones_like(ratio)), strict=True):
        row.index_add_(0, which, column)
    return {
        f"experience/rollout_ess_token/lag_{lag}": EffectiveShare(total=total, squares=squares, count=count)
        for lag, total, squares, count in zip(values.tolist(), *sums.tolist(), strict=True)
    }


def reference_metrics(
    config: OnlineConfig,
    logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"] | None,
    mask: Bool[Tensor, " N"],
) -> dict[str, Reduction]:
    """Measure the divergence of the policy from the reference on the sampled tokens, before training."""
    if ref_logprobs is None:
        return {}
    divergence = reference_kl(config, logprobs, ref_logprobs, mask)
    return {"experience/kl_ref/mean": Mean(total=float(divergence.sum()), count=int(mask.sum()))}


def correction_metrics(correction: Correction, *, sampled: int) -> dict[str, Reduction]:
    """Measure the effect of a correction on a micro-batch with `sampled` tokens in the mask."""
    weights = correction.weights.double()
    sums = (weights, weights.square(), correction.truncated, correction.masked, correction.rejected)
    total, squares, truncated, masked, rejected = torch.stack([column.sum().double() for column in sums]).tolist()
    return {
        "experience/rollout_weight/mean": Mean(total=total, count=sampled),
        "experience/rollout_weight_ess": EffectiveShare(total=total, squares=squares, count=sampled),
        "experience/rollout_weight_truncated/fraction": Mean(total=truncated, count=sampled),
        "experience/rollout_weight_masked/fraction": Mean(total=masked, count=sampled),
        "experience/rollout_rejected/fraction": Mean(total=rejected, count=sampled),
    }


def update_metrics(
    terms: LossTerms, *, sampled: int, passed: int, step_tokens: int, has_kl_loss: bool, imitated: int = 0
) -> dict[str, Reduction]:
    """Return the metrics of a policy micro-batch with `sampled` tokens in the mask and `passed` tokens in all.

    `imitated` counts the tokens of the supervised loss.

    A loss term is this micro-batch's share of the step's loss. The term times the step's tokens is a total over sampled
    tokens. Totals of shares merge to the step's loss, and totals of steps to the token-weighted mean.
    """
    losses = [terms.loss.detach(), terms.surrogate, terms.kl_loss]
    values = torch.stack([*losses, terms.clipped_tokens, terms.kl_old_sum, terms.entropy_sum, terms.ratio_max])
    totals = torch.cat([values.double(), terms.ratio_counts]).tolist()  # synchronizes the device once
    loss, surrogate, kl_loss, clipped, kl_old, entropy, ratio_max, *ratio_counts = totals
    metrics: dict[str, Reduction] = {
        "update/loss/mean": Mean(total=loss * step_tokens, count=sampled),
        "update/policy_loss/mean": Mean(total=surrogate * step_tokens, count=sampled),
        "update/clip_fraction/mean": Mean(total=clipped, count=sampled),
        "update/kl_old/mean": Mean(total=kl_old, count=sampled),
        "update/ratio/max": Max(value=ratio_max),
        "update/ratio/histogram": Histogram(edges=RATIO_EDGES, counts=tuple(ratio_counts)),
        "update/tokens/total": Sum(total=passed),
    }
    if not math.isnan(entropy):  # nan: a server with the policy returns no entropy
        metrics["update/entropy/mean"] = Mean(total=entropy, count=sampled)
    if terms.capped_tokens is not None:
        metrics["update/dual_clip_fraction/mean"] = Mean(total=float(terms.capped_tokens), count=sampled)
    if terms.imitation_sum is not None:
        metrics["update/imitation_loss/mean"] = Mean(total=float(terms.imitation_sum), count=imitated)
    if terms.correction is not None:
        metrics |= correction_metrics(terms.correction, sampled=sampled)
    if has_kl_loss:
        metrics["update/kl_loss/mean"] = Mean(total=kl_loss * step_tokens, count=sampled)
    return metrics


def advantage_metrics(
    spread: Moments, advantages: Float[Tensor, " N"], mask: Bool[Tensor, " N"]
) -> dict[str, Reduction]:
    """Return the metrics of sampled tokens' advantages, with their moments before any whitening."""
    counts = bin_counts(advantages, mask, edges=ADVANTAGE_EDGES)
    return {
        "advantages/mean": Mean(total=spread.mean * spread.count, count=spread.count),
        "advantages/std": as_std(spread),
        "advantages/histogram": Histogram(edges=ADVANTAGE_EDGES, counts=tuple(counts.tolist())),
    }


def as_std(value: Moments) -> Std:
    return Std(count=value.count, mean=value.mean, m2=value.squared_deviation)


def sequence_reports(
    config: OnlineConfig,
    ids: Sequence[int],
    rollouts: Rollouts,
    logprobs: Float[Tensor, " N"],
    ref: Float[Tensor, " N"] | None,
) -> tuple[SequenceReport, ...]:
    """Report each sample of a share, as seen by the policy and the reference. Empty for a rank without a share."""
    if not ids:
        return ()
    mask, lengths = rollouts.response_mask, rollouts.sample_lengths
    olds = sequence_means(logprobs, mask, lengths).tolist()
    kls: Sequence[float | None] = [None] * len(ids)
    refs: Sequence[float | None] = kls
    if ref is not None:
        kls = sequence_sums(reference_kl(config, logprobs, ref, mask), lengths).tolist()
        refs = sequence_means(ref, mask, lengths).tolist()
    return tuple(
        SequenceReport(sequence_id=i, kl_ref=kl, mean_old_logprob=old, mean_ref_logprob=r)
        for i, kl, old, r in zip(ids, kls, olds, refs, strict=True)
    )
