"""Equations on whole logits, and losses on whole columns, with which the chunked computations are compared."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.supervised import negative_logprob
from rlhf.objectives.vocabulary_head import widened


def logprobs_from_logits(logits: Float[Tensor, "*B V"], targets: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Return log softmax(logits)[target], for callers with whole logits. Divide by the temperature beforehand."""
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return widened(chosen) - widened(logits).logsumexp(-1)


def entropy_from_logits(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Return the entropy of softmax(logits), in nats. A logit of -inf is an impossible token and adds nothing."""
    log_p = widened(logits).log_softmax(-1)
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)


def collision_logprob_from_logits(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Return log sum_v p_v^2, minus the order-2 Renyi entropy: the log-probability that two independent draws are the
    same token."""
    return (2.0 * widened(logits).log_softmax(-1)).logsumexp(-1)


def is_top1_from_logits(logits: Float[Tensor, "*B V"], targets: Int[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
    """Return True if greedy decoding would choose the target; of equal logits, the first counts."""
    return logits.argmax(-1) == targets


def dynamic_fine_tuning(logprobs: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return negative_logprob times the token's probability without gradient (DFT, arXiv:2508.05629)."""
    losses = negative_logprob(logprobs, mask)
    return losses * (-losses).detach().exp()


def masked_mean(values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Return the mean of the counted values."""
    return values[mask].mean()
