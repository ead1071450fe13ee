"""Reduce a response's token columns to one number for a preference loss, and compute the weight of a pair.

The number comes from any column (`logprobs`, `ref_logprobs` or their difference): masking.sequence_sums adds up the
counted tokens (DPO), and length_desensitized_total weighs the surplus of the longer response (LD-DPO). Losses of
averages (SimPO, ORPO, IPO as run by the authors) divide the sum by masking.sequence_counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts, sequence_means, sequence_sums, to_tokens


def length_desensitized_total(
    values: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    shared: Int[Tensor, " B"],
    *,
    alpha: float,
) -> Float[Tensor, " B"]:
    """Return the sum of the first `shared` counted tokens plus alpha times the rest (LD-DPO, arXiv:2409.06411).

    `shared` is the smaller number of counted tokens of a pair, the same for both responses. alpha 1 is the plain sum,
    alpha 0 ignores the surplus of the longer response. ValueError for a response without a counted token.
    """
    counts = _counts(mask, lengths, needed_by="length_desensitized_total")
    position = mask.cumsum(0) - to_tokens(counts.cumsum(0) - counts, lengths, num_tokens=len(mask))  # counted from 1
    surplus = position > to_tokens(shared, lengths, num_tokens=len(mask))
    kept = torch.where(mask, values, 0.0)
    return sequence_sums(torch.where(surplus, alpha * kept, kept), lengths)


def on_policy_weights(
    logprobs: Float[Tensor, " N"],
    collision_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Return exp of a response's mean of logprob - log sum_v p_v^2, detached (WPO, arXiv:2406.11827, eq. 2).

    The weight is about 1 for a typical sample of the policy, below 1 for an unlikely response, and above 1 for a greedy
    response. The loss of a pair is multiplied by both weights. As in the paper and in TRL, the product is not capped at
    1; the authors' code caps the product. collision_logprobs come from logprobs.chunked_logprobs_and_collisions.
    ValueError for a response without a counted token.
    """
    _counts(mask, lengths, needed_by="on_policy_weights")
    return sequence_means((logprobs - collision_logprobs).detach(), mask, lengths).exp()


def _counts(mask: Bool[Tensor, " N"], lengths: Int[Tensor, " B"], *, needed_by: str) -> Int[Tensor, " B"]:
    counts = sequence_counts(mask, lengths)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"{needed_by}: sequences {empty[:8]} have no token that counts, hence no log-probability")
    return counts
