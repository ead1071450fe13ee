"""Which tokens drive the entropy: those of high entropy, and those whose logprob and advantage move together.

Masks over the tokens that count, computed on data (no gradient). The entropy itself comes from logprobs.py; its bonus
is `-coef * entropy` with the weights of the policy loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import masked_mean


def high_entropy_tokens(
    entropy: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"], *, quantile: float
) -> Bool[Tensor, "*N"]:
    """Tokens whose entropy is at least that quantile of all tokens that count (arXiv:2506.01939).

    quantile 0.8 keeps the top fifth. The quantile is that of the tokens given: pass the whole step's.
    """
    if not bool(mask.any()):
        return mask
    return mask & (entropy.detach() >= entropy.detach()[mask].quantile(quantile))


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
