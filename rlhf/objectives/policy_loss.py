"""Compute the clipped policy losses: PPO, and its two bounds of the loss on negative advantages.

Each function returns a term per token, and zero where `mask` is False. aggregation.py weights the terms, and the caller
sums the terms. No function here knows the number of tokens in the step, so no function can average over the wrong
tokens.

The ratio comes from importance_ratio or from sequence_ratios.py. With one optimizer step per batch pass
`logprobs.detach()` as old_logprobs: the ratio is then exactly 1, and the gradient is REINFORCE's.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Bound = TypeVar("Bound", float, Tensor)  # bound of the ratios: a number, or a value for each token


def importance_ratio(
    logprobs: Float[Tensor, "*N"], old_logprobs: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return exp(logprobs - old_logprobs), 1 where mask is False. Masking comes before exp, so no gradient is nan."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


def clipped_loss(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: Bound,
    clip_high: Bound,
) -> Float[Tensor, "*N"]:
    """Return PPO's clipped objective -min(ratio * A, clip(ratio) * A) (arXiv:1707.06347, eq. 7, negated).

    The ratio's bounds are 1 - clip_low and 1 + clip_high; equal in PPO, apart in DAPO (arXiv:2503.14476, eq. 10).
    """
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.where(mask, -torch.minimum(ratio * advantages, clipped_ratio * advantages), 0.0)


def dual_clipped_loss(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
    max_ratio: float,
) -> Float[Tensor, "*N"]:
    """Return clipped_loss, at most max_ratio (above 1) times |A| on a negative advantage (arXiv:1912.09729)."""
    clipped = clipped_loss(ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return torch.where(mask & (advantages < 0), torch.minimum(clipped, -max_ratio * advantages), clipped)


def clipped_ratios(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: Bound,
    clip_high: Bound,
) -> tuple[Bool[Tensor, "*N"], Bool[Tensor, "*N"]]:
    """Return two masks of clipped gradients for the clip fraction: below 1 - clip_low, and above 1 + clip_high.

    Below counts only for negative advantages, above only for positive advantages: elsewhere the clip has no effect.
    """
    low = mask & (ratio < 1.0 - clip_low) & (advantages < 0)
    high = mask & (ratio > 1.0 + clip_high) & (advantages > 0)
    return low, high


def reinforce(
    logprobs: Float[Tensor, "*N"], advantages: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return -advantage * logprob (Williams 1992). This loss is right only for samples of the trained policy."""
    return -torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs, 0.0)
