"""Select the tokens with most effect on the entropy: by high entropy, or by covariance of logprob and advantage.

The masks are data (no gradient). Pass the tokens of the whole optimizer step, because the selection depends on all
tokens. The entropy comes from logprobs.py. The bonus is `-coef * entropy` with the weights of the policy loss, and
adaptive_entropy_coef updates the coefficient.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import masked_mean


def high_entropy_tokens(
    entropy: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"], *, quantile: float
) -> Bool[Tensor, "*N"]:
    """Return True for tokens with an entropy of at least the quantile over all counted tokens (arXiv:2506.01939).

    quantile 0.8 keeps the top fifth; all tokens equal to the quantile are kept.
    """
    counted = entropy.detach()[mask]
    if len(counted) == 0:
        return mask
    lowest = counted.kthvalue(math.ceil(quantile * (len(counted) - 1)) + 1).values  # the first at or above the quantile
    return mask & (entropy.detach() >= lowest)


def advantage_covariance(
    logprobs: Float[Tensor, "*N"], advantages: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return (A - mean A) * (logprob - mean logprob) of each token, zero outside mask (arXiv:2505.22617).

    The mean covariance is the decrease of the entropy in a policy-gradient step. Means are over the given tokens.
    """
    logprobs = logprobs.detach()
    centered = (advantages - masked_mean(advantages, mask)) * (logprobs - masked_mean(logprobs, mask))
    return torch.where(mask, centered, 0.0)


def top_covariance_tokens(
    covariance: Float[Tensor, " N"], mask: Bool[Tensor, " N"], *, fraction: float
) -> Bool[Tensor, " N"]:
    """Return True for the given fraction of counted tokens with the largest covariance (KL-Cov, arXiv:2505.22617).

    At least one token is selected. KL-Cov adds `coef * |logprobs - old_logprobs|` to the loss of the selected tokens.
    """
    count = int(mask.sum())
    if count == 0:
        return mask
    chosen: Int[Tensor, " K"] = covariance.masked_fill(~mask, -torch.inf).topk(max(1, int(count * fraction))).indices
    return torch.zeros_like(mask).index_fill(0, chosen, True)


def drawn_covariance_tokens(
    covariance: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    order: Float[Tensor, " N"],
    *,
    low: float,
    high: float,
    fraction: float,
) -> Bool[Tensor, " N"]:
    """Return True for tokens with a covariance between low and high.

    At most the given fraction of the counted tokens is selected, and at least one token. If more tokens qualify, the
    first by `order` are taken, a random number for each (Clip-Cov, arXiv:2505.22617). Clip-Cov removes the gradient of
    the selected tokens.
    """
    between = mask & (covariance > low) & (covariance < high)
    count = min(max(1, int(int(mask.sum()) * fraction)), int(between.sum()))
    if count == 0:
        return torch.zeros_like(mask)
    chosen: Int[Tensor, " K"] = order.masked_fill(~between, torch.inf).topk(count, largest=False).indices
    return torch.zeros_like(mask).index_fill(0, chosen, True)


def adaptive_entropy_coef(coef: float, *, entropy: float, target: float, step: float, max_coef: float) -> float:
    """Return the next coefficient within [0, max_coef]: a step up if the entropy is below the target, else a step down.

    The bonus is given at or below the target only (Skywork-OR1, arXiv:2505.22312).
    """
    change = step if entropy < target else -step if entropy > target else 0.0
    return min(max(coef + change, 0.0), max_coef)
