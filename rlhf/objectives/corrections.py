"""Corrections for tokens that another policy sampled: vLLM's kernels, or weights of some steps ago.

Weights multiply the per-token policy loss; masks remove tokens from it. Everything here is data (no gradient): with
old_logprobs from the trainer and rollout_logprobs from the sampler, `rollout_ratio = exp(old - rollout)`.
`mask` is True where the policy sampled the token; weights are zero elsewhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_sums, to_tokens

# exp(20) is far beyond any cap; held there so that a product of many ratios stays finite.
MAX_LOG_RATIO = 20.0


def token_ratio(
    old_logprobs: Float[Tensor, "*N"], rollout_logprobs: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """rollout_ratio of each token, zero outside mask."""
    log_ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).detach()
    return torch.where(mask, log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 0.0)


def sequence_ratio(
    old_logprobs: Float[Tensor, " N"],
    rollout_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Product of each sequence's rollout ratios: unbiased, and noisy for long responses."""
    log_ratio = sequence_sums(torch.where(mask, old_logprobs - rollout_logprobs, 0.0).detach(), lengths)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def token_truncated(
    old_logprobs: Float[Tensor, "*N"],
    rollout_logprobs: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    max_ratio: float,
) -> Float[Tensor, "*N"]:
    """Truncated importance sampling per token: min(rollout_ratio, max_ratio) (Yao et al. 2025, after Ionides 2008)."""
    return token_ratio(old_logprobs, rollout_logprobs, mask).clamp(max=max_ratio)


def sequence_truncated(
    old_logprobs: Float[Tensor, " N"],
    rollout_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    max_ratio: float,
) -> Float[Tensor, " N"]:
    """Truncated importance sampling per sequence: min(product of ratios, max_ratio), on each of its tokens."""
    ratio = sequence_ratio(old_logprobs, rollout_logprobs, mask, lengths).clamp(max=max_ratio)
    return torch.where(mask, to_tokens(ratio, lengths, num_tokens=len(mask)), 0.0)
