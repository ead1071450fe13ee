"""Weigh tokens by the change of the policy over the rest of the response (FIPO, arXiv:2603.19835).

All columns are flat, as in policy_loss.py. Nothing here carries a gradient.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts

CAUTIOUS_WEIGHTS = (0.8, 1.0)  # bounds for tokens made much likelier against a negative advantage


def future_kl(
    log_ratio: Float[Tensor, " N"], mask: Bool[Tensor, " N"], lengths: Int[Tensor, " B"], *, half_life: float
) -> Float[Tensor, " N"]:
    """Return the sum over k >= t of 2^(-(k - t) / half_life) * log_ratio_k within each sequence; zero outside mask.

    Distances count sampled tokens, as in advantages.gae: tool output between two tokens neither adds nor discounts. The
    sums take log2(longest sequence) vector operations, since this function runs in every micro-batch.
    """
    counts = sequence_counts(mask, lengths)
    sums = log_ratio.detach()[mask]
    following = counts.cumsum(0).repeat_interleave(counts) - 1 - torch.arange(len(sums), device=sums.device)
    distance, longest = 1, int(counts.max())  # the only wait for the device
    while distance < longest:
        further = torch.where(following[:-distance] >= distance, sums[distance:], 0.0)
        sums = sums + 0.5 ** (distance / half_life) * torch.nn.functional.pad(further, (0, distance))
        distance *= 2
    return torch.zeros_like(log_ratio).masked_scatter(mask, sums)


def influence_weights(
    log_ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    half_life: float,
    min_weight: float,
    max_weight: float,
    max_ratio: float | None,
    safe_ratio: float,
) -> Float[Tensor, " N"]:
    """Return exp(future_kl), clipped to [min_weight, max_weight], to multiply the advantages with.

    log_ratio is logprobs - old_logprobs. Tokens with a ratio above max_ratio add nothing to the sums: the dual clip
    stops their gradient (null: no dual clip). Tokens with a negative advantage and a ratio above safe_ratio get a
    weight of 0.8 to 1. Multiplying by a positive weight commutes with the clips of the ratio.
    """
    log_ratio = log_ratio.detach().where(mask, 0.0)
    counted = log_ratio if max_ratio is None else log_ratio.where(log_ratio <= math.log(max_ratio), 0.0)
    weights = future_kl(counted, mask, lengths, half_life=half_life).exp().clamp(min_weight, max_weight)
    unsafe = (advantages < 0) & (log_ratio > math.log(safe_ratio))
    return torch.where(unsafe, weights.clamp(*CAUTIOUS_WEIGHTS), weights)
