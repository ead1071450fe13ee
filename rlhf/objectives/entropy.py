"""Select the tokens with most effect on the entropy: by high entropy, or by covariance of logprob and advantage.

The masks are data (no gradient). Pass the sampled tokens of the whole optimizer step, because the selection depends on
all tokens. The entropy comes from logprobs.py. The bonus is `-coef * entropy` with the weights of the policy loss, and
adaptive_entropy_coef updates the coefficient.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def high_entropy_tokens(entropy: Float[Tensor, " N"], *, quantile: float) -> Bool[Tensor, " N"]:
    """Return True for tokens with an entropy of at least the quantile over all tokens (arXiv:2506.01939).

    quantile 0.8 keeps the top fifth; all tokens equal to the quantile are kept.
    """
    if len(entropy) == 0:
        return entropy.bool()
    lowest = entropy.kthvalue(math.ceil(quantile * (len(entropy) - 1)) + 1).values  # the first at or above the quantile
    return entropy >= lowest


def advantage_covariance(logprobs: Float[Tensor, " N"], advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return (A - mean A) * (logprob - mean logprob) of each token (arXiv:2505.22617).

    The mean covariance is the decrease of the entropy in a policy-gradient step.
    """
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def top_covariance_tokens(covariance: Float[Tensor, " N"], *, fraction: float) -> Bool[Tensor, " N"]:
    """Return True for the given fraction of the tokens with the largest covariance (KL-Cov, arXiv:2505.22617).

    At least one token is selected. KL-Cov adds `coef * |logprobs - old_logprobs|` to the loss of the selected tokens.
    """
    count = min(max(1, int(len(covariance) * fraction)), len(covariance))
    chosen = covariance.topk(count).indices
    return torch.zeros_like(covariance, dtype=torch.bool).index_fill(0, chosen, True)


def drawn_covariance_tokens(
    covariance: Float[Tensor, " N"], order: Float[Tensor, " N"], *, low: float, high: float, fraction: float
) -> Bool[Tensor, " N"]:
    """Return True for tokens with a covariance between low and high.

    At most the given fraction of the tokens is selected, and at least one token. If more tokens qualify, the first by
    `order` are taken, a random number for each (Clip-Cov, arXiv:2505.22617). Clip-Cov removes the gradient of the
    selected tokens.
    """
    between = (covariance > low) & (covariance < high)
    count = min(max(1, int(len(covariance) * fraction)), int(between.sum()))
    chosen = order.masked_fill(~between, torch.inf).topk(count, largest=False).indices
    return torch.zeros_like(between).index_fill(0, chosen, True)


def adaptive_entropy_coef(coef: float, *, entropy: float, target: float, step: float, max_coef: float) -> float:
    """Return the next coefficient within [0, max_coef]: a step up if the entropy is below the target, else a step down.

    The bonus is given at or below the target only (Skywork-OR1, arXiv:2505.22312).
    """
    change = step if entropy < target else -step if entropy > target else 0.0
    return min(max(coef + change, 0.0), max_coef)
