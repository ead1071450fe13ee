"""Which tokens drive the entropy: those of high entropy, and those whose logprob and advantage move together.

Masks over the tokens that count, computed on data (no gradient): pass those of the whole optimizer step, for what is
chosen depends on all of them. The entropy itself comes from logprobs.py; its bonus is `-coef * entropy` with the
weights of the policy loss, and adaptive_entropy_coef moves the coefficient.
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
    """Tokens whose entropy is at least that quantile of all tokens that count (arXiv:2506.01939).

    quantile 0.8 keeps the top fifth; of equals at the quantile all are kept.
    """
    counted = entropy.detach()[mask]
    if len(counted) == 0:
        return mask
    lowest = counted.kthvalue(math.ceil(quantile * (len(counted) - 1)) + 1).values  # the first at or above the quantile
    return mask & (entropy.detach() >= lowest)


def advantage_covariance(
    logprobs: Float[Tensor, "*N"], advantages: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """(A - mean A) * (logprob - mean logprob) of each token, zero outside mask (arXiv:2505.22617).

    Its mean is what the entropy falls by in a policy-gradient step. The means are those of the tokens given.
    """
    logprobs = logprobs.detach()
    centered = (advantages - masked_mean(advantages, mask)) * (logprobs - masked_mean(logprobs, mask))
    return torch.where(mask, centered, 0.0)


def top_covariance_tokens(
    covariance: Float[Tensor, " N"], mask: Bool[Tensor, " N"], *, fraction: float
) -> Bool[Tensor, " N"]:
    """The given fraction of the tokens that count with the largest covariance, at least one (KL-Cov, arXiv:2505.22617).

    KL-Cov adds `coef * |logprobs - old_logprobs|` to the loss of these tokens.
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
    """Tokens with a covariance between low and high, at most the given fraction of those that count, at least one.

    Of more than that the first by `order`, a random number for each (Clip-Cov, arXiv:2505.22617). Clip-Cov takes the
    gradient from these tokens.
    """
    between = mask & (covariance > low) & (covariance < high)
    count = min(max(1, int(int(mask.sum()) * fraction)), int(between.sum()))
    if count == 0:
        return torch.zeros_like(mask)
    chosen: Int[Tensor, " K"] = order.masked_fill(~between, torch.inf).topk(count, largest=False).indices
    return torch.zeros_like(mask).index_fill(0, chosen, True)


def adaptive_entropy_coef(coef: float, *, entropy: float, target: float, step: float, max_coef: float) -> float:
    """The next coefficient: a step up if the entropy is below its target, a step down if above, within [0, max_coef].

    The bonus is given at or below the target only (Skywork-OR1, arXiv:2505.22312).
    """
    change = step if entropy < target else -step if entropy > target else 0.0
    return min(max(coef + change, 0.0), max_coef)
