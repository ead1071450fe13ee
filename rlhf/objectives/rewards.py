"""Turn a score per sequence into token rewards with a KL penalty, and shape scores.

Shaping runs with the scores and token_rewards with the tokens, before any advantage.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts


def token_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    kl_coef: float,
) -> Float[Tensor, " N"]:
    """Return -kl_coef * kl on each sampled token plus the score on the last token, zero elsewhere.

    arXiv:1909.08593, eq. 2. `kl` is a per-token estimate of KL(policy || reference), usually kl_k1. ValueError for a
    sequence without a sampled token: no token could carry the score.
    """
    counts = sequence_counts(response_mask, lengths)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"token_rewards: sequences {empty[:8]} have no sampled token to carry their score")
    last = response_mask.nonzero().flatten()[counts.cumsum(0) - 1]
    penalties = torch.where(response_mask, -kl_coef * kl, 0.0)
    return penalties.index_add(0, last, scores.to(penalties.dtype))


def step_rewards(
    ends: Int[Tensor, " S"], values: Float[Tensor, " S"], response_mask: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return each step's value on the step's last token, zero elsewhere. Steps with the same last token are summed.

    ValueError for a step with an unsampled last token: no token could be credited.
    """
    if wrong := ends[~response_mask[ends]].tolist():
        raise ValueError(f"step_rewards: steps end at {wrong[:8]}, where no token was sampled")
    return torch.zeros(len(response_mask)).index_add(0, ends, values.float())


def overlong_penalty(num_tokens: Int[Tensor, " B"], *, max_tokens: int, buffer: int | float) -> Float[Tensor, " B"]:
    """Return 0 up to max_tokens - buffer, then linearly down to -1 at max_tokens and beyond (arXiv:2503.14476, eq. 13).

    Add the penalty, times a factor, to the score.
    """
    excess = (num_tokens.double() - (max_tokens - buffer)).clamp(0.0, buffer)
    return -excess / buffer
