"""Importance weights, rejection masks and drift metrics for tokens sampled by another policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.objectives import corrections
from rlhf.objectives.kl import kl_k1, kl_k3
from rlhf.objectives.masking import masked_mean, masked_sum, sequence_counts, sequence_sums
from tests.parity.adapters.aggregation import EPS, shrunk, verl_mean
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout

SAFETY = 20.0  # verl holds log-ratios in +-20
LEVELS: dict[str, corrections.Level] = {
    "token": "token",
    "seq_sum": "sequence_sum",
    "seq_mean": "sequence_mean",
    "seq_max": "sequence_max",
}


def _bounds(value: object) -> tuple[float, float | None]:
    """Read verl's threshold: an upper bound, or "lower_upper"."""
    try:
        if isinstance(value, str) and "_" in value:
            lower, upper = value.split("_", 1)
            return float(upper), float(lower)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value), None
    except ValueError as error:
        raise Unsupported(f"threshold {value!r}") from error
    raise Unsupported(f"threshold {value!r}")


def verl_weights(arguments: Arguments) -> Outputs:
    """Return verl's weights: truncated under one bound, masked under two; normalised to mean 1 on demand."""
    layout = Layout(arguments.mask("response_mask"))
    log_ratio, zeros = layout.flat(arguments.tensor("log_ratio")), torch.zeros(len(layout.mask), dtype=arguments.dtype)
    level = arguments.choice("rollout_is", {"token": "token", "sequence": "sequence"}, "token")
    upper, lower = _bounds(arguments.param("rollout_is_threshold", 2.0))
    if level == "token":
        ratio = corrections.token_ratio(log_ratio.clamp(-SAFETY, SAFETY), zeros, layout.mask)
    else:
        ratio = corrections.product_ratio(_held_sequence_sums(log_ratio, layout), zeros, layout.mask, layout.lengths)
    if lower is None:
        weights = corrections.truncated(ratio, layout.mask, max_ratio=upper)
    else:
        weights = corrections.masked(ratio, layout.mask, min_ratio=lower, max_ratio=upper)
    if arguments.flag("rollout_is_batch_normalize", False):
        mean = verl_mean(weights, layout.mask)
        if level == "sequence":
            counts = sequence_counts(layout.mask, layout.lengths)
            by_sequence = sequence_sums(weights, layout.lengths) / (counts.to(weights.dtype) + EPS)
            mean = masked_sum(by_sequence, counts > 0) / (counts > 0).sum().clamp(min=EPS)
        weights = weights / mean if mean > EPS else weights
    return {"weights": layout.padded(weights)}


def _held_sequence_sums(log_ratio: Tensor, layout: Layout) -> Tensor:
    """Return columns whose sum over each sequence is verl's: the sum of log_ratio, held in +-20."""
    sums = sequence_sums(torch.where(layout.mask, log_ratio, 0.0), layout.lengths)
    held = sums.clamp(-SAFETY, SAFETY)
    counts = sequence_counts(layout.mask, layout.lengths).clamp(min=1)
    return torch.where(layout.spread(held == sums), log_ratio, layout.spread(held / counts))


def verl_rejection_mask(arguments: Arguments) -> Outputs:
    """Every named criterion must hold: k1, k2 or k3 of a token, or summed, averaged or largest over a sequence."""
    layout = Layout(arguments.mask("response_mask"))
    log_ratio = layout.flat(arguments.tensor("log_ratio")).clamp(-SAFETY, SAFETY)
    named = arguments.param("rollout_rs", "token_k1")
    if not isinstance(named, str):
        raise Unsupported(f"rollout_rs {named!r}")
    options = list(dict.fromkeys(option.strip() for option in named.split(",") if option.strip()))
    thresholds = str(arguments.param("rollout_rs_threshold")).split(",")
    if len(thresholds) == 1:
        thresholds *= len(options)
    keep = layout.mask
    for option, threshold in zip(options, thresholds, strict=True):
        level, _, estimator = option.rpartition("_")
        if estimator not in ("k1", "k2", "k3") or level not in LEVELS or option == "seq_max_k1":
            raise Unsupported(f"rollout_rs {option!r}")
        upper, lower = _bounds(threshold.strip())
        if estimator == "k1":
            low, high = math.log(1.0 / upper if lower is None else lower), math.log(upper)
        elif lower is None:
            low, high = -math.inf, upper
        else:
            raise Unsupported(f"two bounds for {option!r}")
        keep = keep & corrections.accepted(
            log_ratio,
            torch.zeros_like(log_ratio),
            layout.mask,
            layout.lengths,
            statistic=estimator,
            level=LEVELS[level],
            low=low,
            high=high,
        )
    return {"mask": layout.padded(keep)}


def verl_metrics(arguments: Arguments) -> Outputs:
    """Perplexities and divergences between trainer and sampler."""
    layout = Layout(arguments.mask("response_mask"))
    mask, lengths = layout.mask, layout.lengths
    old = layout.flat(arguments.tensor("old_log_prob"))
    rows = torch.ones(len(lengths), dtype=torch.bool)

    def mean_of(logprobs: Tensor) -> Tensor:
        return sequence_sums(torch.where(mask, logprobs * shrunk(layout, logprobs), 0.0), lengths) / sequence_counts(
            mask, lengths
        ).clamp(min=1)

    training = mean_of(old)
    metrics = {"training_ppl": (-training).exp().mean(), "training_log_ppl": (-training).mean()}
    if not arguments.has("rollout_log_prob"):
        arguments.ignore("rollout_log_prob")
        return metrics
    rollout = layout.flat(arguments.tensor("rollout_log_prob"))
    sampler = mean_of(rollout)
    gap = sampler - training
    held = (old - rollout).clamp(-SAFETY, SAFETY)
    zeros = torch.zeros_like(held)
    squared = corrections.token_ratio(held, zeros, mask).square()
    sequence = sequence_sums(torch.where(mask, _held_sequence_sums(old - rollout, layout), 0.0), lengths).exp()
    return {
        **metrics,
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
        "chi2_seq": masked_mean(sequence.square(), rows) - 1.0,
    }


def trl_sampler_correction(arguments: Arguments) -> Outputs:
    """Return the weights of TRL's four modes. A token without a sampler's logprob (nan) has ratio 1."""
    mask = arguments.mask("mask")
    old, sampling = arguments.tensor("old_logps"), arguments.tensor("sampling_logps")
    mode = arguments.param("vllm_importance_sampling_mode", "sequence_mask")
    upper, lower = arguments.optional("clip_max", 3.0), arguments.optional("clip_min")
    bounds = {"min_ratio": 0.0 if lower is None else lower, "max_ratio": math.inf if upper is None else upper}
    scored = mask & ~sampling.isnan()
    # TRL gives masked tokens the log-ratio 0 and weighs them too: all positions count, with 0 where masked.
    layout = Layout.full(mask.shape)
    flat = layout.flat(torch.where(scored, old - sampling, 0.0))
    columns = (flat, torch.zeros_like(flat), layout.mask)
    level, _, how = mode.partition("_")
    if level not in ("token", "sequence") or how not in ("truncate", "mask"):
        raise Unsupported(f"vllm_importance_sampling_mode {mode!r}")
    is_token = level == "token"
    ratio = corrections.token_ratio(*columns) if is_token else corrections.product_ratio(*columns, layout.lengths)
    weigh = corrections.truncated if how == "truncate" else corrections.masked
    weights = layout.padded(weigh(ratio, layout.mask, **bounds))
    weights = weights if is_token else weights[:, :1]
    shown = weights[mask] if mode.startswith("token") else weights.flatten()
    gaps = kl_k1(old, sampling).abs()[scored]
    return {
        "importance_sampling_ratio": weights,
        "sampling/sampling_logp_difference/mean": gaps.mean() if gaps.numel() else 0.0,
        "sampling/sampling_logp_difference/max": gaps.max() if gaps.numel() else 0.0,
        "sampling/importance_sampling_ratio/min": shown.min() if shown.numel() else 0.0,
        "sampling/importance_sampling_ratio/mean": shown.mean() if shown.numel() else 0.0,
        "sampling/importance_sampling_ratio/max": shown.max() if shown.numel() else 0.0,
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_rollout_correction_weights"): verl_weights,
    ("verl", "compute_rollout_rejection_mask"): verl_rejection_mask,
    ("verl", "compute_offpolicy_metrics"): verl_metrics,
}
