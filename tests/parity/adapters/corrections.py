"""Importance weights, rejection masks and drift metrics for tokens sampled by another policy.

verl also holds log-ratios in +-20, further than those of any case.
"""

from __future__ import annotations

import math

import torch

from rlhf.objectives import corrections
from rlhf.objectives.kl import kl_k1, kl_k3
from rlhf.objectives.masking import sequence_sums
from tests.parity.adapters.aggregation import EPS, shrunk, verl_mean
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout

LEVELS: dict[str, corrections.Level] = {
    "token": "token",
    "seq_sum": "sequence_sum",
    "seq_mean": "sequence_mean",
    "seq_max": "sequence_max",
}


def _bounds(value: object) -> tuple[float, float | None]:
    """Read verl's threshold: an upper bound, or "lower_upper"."""
    *lower, upper = str(value).strip().split("_")
    return float(upper), float(lower[0]) if lower else None


def verl_weights(arguments: Arguments) -> Outputs:
    """Return verl's weights: truncated under one bound, masked under two; normalised to mean 1 on demand."""
    layout, is_token = Layout(arguments.mask("response_mask")), arguments.param("rollout_is", "token") == "token"
    log_ratio, mask = layout.flat(arguments.tensor("log_ratio")), layout.mask
    upper, lower = _bounds(arguments.param("rollout_is_threshold", 2.0))
    zeros = torch.zeros_like(log_ratio)
    if is_token:
        ratio = corrections.token_ratio(log_ratio, zeros, mask)
    else:
        ratio = corrections.product_ratio(log_ratio, zeros, mask, layout.lengths)
    if lower is None:
        weights = corrections.truncated(ratio, mask, max_ratio=upper)
    else:
        weights = corrections.masked(ratio, mask, min_ratio=lower, max_ratio=upper)
    if arguments.param("rollout_is_batch_normalize", False):
        mean = verl_mean(weights, mask)
        if not is_token:
            by_sequence = sequence_sums(weights, layout.lengths) / (layout.counts.to(weights.dtype) + EPS)
            mean = by_sequence.sum() / len(by_sequence)
        weights = weights / mean
    return {"weights": layout.padded(weights)}


def verl_rejection_mask(arguments: Arguments) -> Outputs:
    """Every named criterion must hold: k1, k2 or k3 of a token, or summed, averaged or largest over a sequence."""
    layout = Layout(arguments.mask("response_mask"))
    log_ratio = layout.flat(arguments.tensor("log_ratio"))
    options, thresholds = (str(arguments.param(f"rollout_rs{kind}")).split(",") for kind in ("", "_threshold"))
    keep = layout.mask
    for option, threshold in zip(options, thresholds, strict=True):
        level, _, estimator = option.strip().rpartition("_")
        upper, lower = _bounds(threshold)
        low, high = -math.inf, upper
        if estimator == "k1":
            low, high = math.log(1.0 / upper if lower is None else lower), math.log(upper)
        columns = (log_ratio, torch.zeros_like(log_ratio), layout.mask, layout.lengths)
        keep = keep & corrections.accepted(*columns, statistic=estimator, level=LEVELS[level], low=low, high=high)
    return {"mask": layout.padded(keep)}


def verl_metrics(arguments: Arguments) -> Outputs:
    """Perplexities and divergences between trainer and sampler."""
    layout = Layout(arguments.mask("response_mask"))
    mask, lengths = layout.mask, layout.lengths
    old, rollout = (layout.flat(arguments.tensor(name)) for name in ("old_log_prob", "rollout_log_prob"))
    training, sampler = (
        sequence_sums(torch.where(mask, logprobs * shrunk(layout, logprobs), 0.0), lengths) / layout.counts
        for logprobs in (old, rollout)
    )
    gap = sampler - training
    squared = corrections.token_ratio(old, rollout, mask).square()
    sequence = sequence_sums(torch.where(mask, old - rollout, 0.0), lengths).exp()
    return {
        "training_ppl": (-training).exp().mean(),
        "training_log_ppl": (-training).mean(),
        "kl": verl_mean(kl_k1(rollout, old), mask),
        "k3_kl": verl_mean(kl_k3(rollout, old), mask),
        "rollout_ppl": (-sampler).exp().mean(),
        "rollout_log_ppl": (-sampler).mean(),
        "log_ppl_diff": gap.mean(),
        "log_ppl_abs_diff": gap.abs().mean(),
        "log_ppl_diff_max": gap.max(),
        "log_ppl_diff_min": gap.min(),
        "ppl_ratio": gap.exp().mean(),
        "chi2_token": verl_mean(squared, mask) - 1.0,
        "chi2_seq": sequence.square().mean() - 1.0,
    }


def trl_sampler_correction(arguments: Arguments) -> Outputs:
    """Return the weights of TRL's four modes. A token without a sampler's logprob (nan) has ratio 1."""
    mask = arguments.mask("mask")
    old, sampling = arguments.tensor("old_logps"), arguments.tensor("sampling_logps")
    level, _, how = arguments.param("vllm_importance_sampling_mode", "sequence_mask").partition("_")
    bounds = {"min_ratio": arguments.optional("clip_min") or 0.0, "max_ratio": arguments.number("clip_max", 3.0)}
    scored = mask & ~sampling.isnan()
    # TRL gives masked tokens the log-ratio 0 and weighs them too: all positions count, with 0 where masked.
    layout = Layout.full(mask.shape)
    flat = layout.flat(torch.where(scored, old - sampling, 0.0))
    columns = (flat, torch.zeros_like(flat), layout.mask)
    is_token = level == "token"
    ratio = corrections.token_ratio(*columns) if is_token else corrections.product_ratio(*columns, layout.lengths)
    weigh = {"truncate": corrections.truncated, "mask": corrections.masked}[how]
    weights = layout.padded(weigh(ratio, layout.mask, **bounds))
    weights = weights if is_token else weights[:, :1]
    shown, gaps = weights[mask] if is_token else weights, kl_k1(old, sampling).abs()[scored]
    return {
        "importance_sampling_ratio": weights,
        "sampling/sampling_logp_difference/mean": gaps.mean(),
        "sampling/sampling_logp_difference/max": gaps.max(),
        "sampling/importance_sampling_ratio/min": shown.min(),
        "sampling/importance_sampling_ratio/mean": shown.mean(),
        "sampling/importance_sampling_ratio/max": shown.max(),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_rollout_correction_weights"): verl_weights,
    ("verl", "compute_rollout_rejection_mask"): verl_rejection_mask,
    ("verl", "compute_offpolicy_metrics"): verl_metrics,
}
