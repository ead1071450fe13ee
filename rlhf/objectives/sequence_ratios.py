"""Compute importance ratios shared by the tokens of a sequence: GSPO, GSPO-token, GMPO.

The ratios replace policy_loss.importance_ratio: [N] columns, 1 where `mask` is False. Advantages matter only for the
sign in GMPO's clip.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_means, to_tokens


def sequence_ratio(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, " N"]:
    """Return the geometric mean of a sequence's token ratios, on each token (GSPO, arXiv:2507.18071, eq. 7).

    The gradient of each copy reaches every token of the sequence. GSPO's loss uses `sequence_token_ratio`.
    """
    log_ratio = sequence_means(logprobs - old_logprobs, mask, lengths)
    return torch.where(mask, to_tokens(log_ratio, lengths, num_tokens=len(mask)), 0.0).exp()


def sequence_token_ratio(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, " N"]:
    """Return sequence_ratio in value, with each token's own gradient (GSPO-token, arXiv:2507.18071, eq. 14).

    If all tokens of a sequence share an advantage and a weight, the gradient equals sequence_ratio's.
    """
    token_gradient = torch.where(mask, logprobs - logprobs.detach(), 0.0).exp()
    return sequence_ratio(logprobs.detach(), old_logprobs, mask, lengths) * token_gradient


def geometric_mean_ratio(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, " N"]:
    """Return sequence_ratio of token ratios, each clipped in log space (GMPO, arXiv:2507.20673).

    A token's log-ratio is clipped above at clip_high for a positive advantage and below at -clip_low for a negative
    advantage. An advantage of zero gives a log-ratio of 0. Use `-ratio * advantage` with the result, without a clip.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    sign = advantages.sign()
    held = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
    return torch.where(mask, to_tokens(sequence_means(held, mask, lengths), lengths, num_tokens=len(mask)), 0.0).exp()
