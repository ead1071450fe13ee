"""The clip family of policy losses: PPO, and its two ways to bound the loss on negative advantages.

Each returns one term per token, zero where `mask` is False; aggregation.py weighs and the caller sums them. No
function here knows how many tokens the step has, so none can average over the wrong ones.

`*_surrogate` and clipped_tokens take logprobs and use importance_ratio; `*_loss` and clipped_ratios take any ratio,
such as those of sequence_ratios.py. With one optimizer step per batch pass `logprobs.detach()` as old_logprobs: the
ratio is then exactly 1 and the gradient that of REINFORCE.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def importance_ratio(
    logprobs: Float[Tensor, "*N"], old_logprobs: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """exp(logprobs - old_logprobs), 1 where mask is False. Masked before exp, so that no nan comes back as gradient."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


def clipped_surrogate(
    logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "*N"]:
    """PPO's clipped objective (arXiv:1707.06347, eq. 7), negated.

    The ratio's bounds are 1 - clip_low and 1 + clip_high; equal in PPO, apart in DAPO (arXiv:2503.14476, eq. 10).
    """
    ratio = importance_ratio(logprobs, old_logprobs, mask)
    return clipped_loss(ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high)


def dual_clipped_surrogate(
    logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
    max_ratio: float,
) -> Float[Tensor, "*N"]:
    """clipped_surrogate whose loss on a negative advantage stops growing at ratio max_ratio: see dual_clipped_loss."""
    ratio = importance_ratio(logprobs, old_logprobs, mask)
    return dual_clipped_loss(ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, max_ratio=max_ratio)


def clipped_tokens(
    logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Bool[Tensor, "*N"], Bool[Tensor, "*N"]]:
    """clipped_ratios of importance_ratio."""
    ratio = importance_ratio(logprobs, old_logprobs, mask)
    return clipped_ratios(ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high)


def clipped_loss(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "*N"]:
    """-min(ratio * A, clip(ratio) * A) (arXiv:1707.06347, eq. 7, negated)."""
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
    """clipped_loss, on a negative advantage at most max_ratio * |A| (dual clip, arXiv:1912.09729).

    ValueError unless max_ratio > 1. At or below 1 + clip_high the cap would replace the clip.
    """
    if max_ratio <= 1.0:
        raise ValueError(f"dual_clipped_loss needs max_ratio > 1, got {max_ratio}")
    clipped = clipped_loss(ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return torch.where(mask & (advantages < 0), torch.minimum(clipped, -max_ratio * advantages), clipped)


def two_sided_clipped_loss(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
    max_ratio: float,
) -> Float[Tensor, "*N"]:
    """-min(min(ratio, max_ratio) * A, clip(ratio) * A) (INTELLECT-2, arXiv:2505.07291).

    The same as dual_clipped_loss for max_ratio >= 1 + clip_high, as the paper asks.
    """
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio.clamp(max=max_ratio) * advantages, clipped_ratio * advantages)
    return torch.where(mask, -objective, 0.0)


def clipped_ratios(
    ratio: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Bool[Tensor, "*N"], Bool[Tensor, "*N"]]:
    """Where the clip stops the gradient: (below 1 - clip_low, above 1 + clip_high). For the clip fraction.

    Below counts only where the advantage is negative, above only where it is positive: elsewhere the clip is not felt.
    """
    low = mask & (ratio < 1.0 - clip_low) & (advantages < 0)
    high = mask & (ratio > 1.0 + clip_high) & (advantages > 0)
    return low, high


def reinforce(
    logprobs: Float[Tensor, "*N"], advantages: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """-advantage * logprob (Williams 1992): right only for samples of the policy being trained."""
    return -torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs, 0.0)
