"""Compute losses of single responses with labels (KTO, APO-zero, BCO).

Each function returns a loss per response; the caller weights each loss and divides by the responses of the whole
optimizer step. `log_ratios` are log pi - log pi_ref summed over the response (sequence_logprobs.py); `labels` are True
for good responses. Baselines (KTO's KL, BCO's running mean) are data, merged over ranks by the caller.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def kto(log_ratios: Float[Tensor, " B"], labels: Bool[Tensor, " B"], *, beta: float, kl: float) -> Float[Tensor, " B"]:
    """Return 1 - sigmoid(beta (c - kl)) if good, 1 - sigmoid(beta (kl - c)) if bad (KTO, arXiv:2402.01306, 4.1).

    kl is the paper's z0, max(0, mean log-ratio) of completions with mismatched prompts of the batch: mismatched_kl,
    without a gradient. Use label_weights for lambda_D and lambda_U.
    """
    return torch.sigmoid(_towards_label(beta * (kl - log_ratios), labels))


def mismatched_kl(log_ratio_sum: float, num_sequences: int) -> float:
    """Return KTO's z0: the mean log-ratio of completions under mismatched prompts, at least 0.

    The sum and the count are taken over all ranks.
    """
    return max(0.0, log_ratio_sum / num_sequences)


def apo_zero_unpaired(
    log_ratios: Float[Tensor, " B"], labels: Bool[Tensor, " B"], *, beta: float
) -> Float[Tensor, " B"]:
    """Return kto with kl 0: each half of apo_zero separately (APO, arXiv:2408.06266, eq. 7)."""
    return torch.sigmoid(_towards_label(-beta * log_ratios, labels))


def bco(
    log_ratios: Float[Tensor, " B"], labels: Bool[Tensor, " B"], *, beta: float, delta: float
) -> Float[Tensor, " B"]:
    """Return the cross-entropy of the label with sigmoid(beta c - delta) (BCO, arXiv:2404.04656).

    delta is the running mean of beta c over all responses so far, including this step: masking.merge_moments of
    masking.moments.
    """
    return -logsigmoid(_towards_label(beta * log_ratios - delta, labels))


def label_weights(
    labels: Bool[Tensor, " B"], *, desirable: float, undesirable: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " B"]:
    """Return the weight of each response by the response's label."""
    weights = torch.tensor([undesirable, desirable], dtype=dtype, device=labels.device)
    return weights[labels.long()]


def _towards_label(values: Float[Tensor, " B"], labels: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return the values, negated where the label is bad."""
    return torch.where(labels, values, -values)
