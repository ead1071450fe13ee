"""Compare next-token distributions over different vocabularies, as GOLD does over the spans of a text.

Both sides give the log-probability of a span: of the tokens before the last one, plus the distribution of the last
token (the chain rule; TRL's merge strategy `bayesian`). The probabilities of a span may thus sum to less than 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_LEAST = 1e-8  # smallest probability in a comparison of tokens, as in TRL


def sorted_distance(student_probs: Float[Tensor, "*B V"], teacher_probs: Float[Tensor, "*B W"]) -> Float[Tensor, "*B"]:
    """Return the L1 distance of the probabilities in order of their size; the smaller vocabulary is filled with 0.

    ULD, arXiv:2402.12030, eq. 3, with the cost of 1 for each pair.
    """
    size = max(student_probs.shape[-1], teacher_probs.shape[-1])
    ours, theirs = (
        F.pad(probs.sort(-1, descending=True).values, (0, size - probs.shape[-1]))
        for probs in (student_probs, teacher_probs)
    )
    return (ours - theirs).abs().sum(-1)


def hybrid_distance(
    student_logprobs: Float[Tensor, "*B V"],
    teacher_logprobs: Float[Tensor, "*B W"],
    pairs: Int[Tensor, "P 2"],
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "*B"]:
    """Return w * divergence over the tokens of `pairs` + (1 - w) * sorted_distance over all other tokens.

    w is the share of the teacher's tokens in a pair (student's id, teacher's id). GOLD's hybrid loss, as in
    TRL 1.16, `ULDLoss._compute_hybrid_uld_loss`. If one side has no other tokens, the second term is 0.
    """
    weight = len(pairs) / teacher_logprobs.shape[-1]
    ours, theirs = student_logprobs.exp(), teacher_logprobs.exp()
    distance = torch.zeros_like(ours[..., 0])
    if len(pairs):
        same = (
            probs.index_select(-1, ids).clamp(min=_LEAST).log()
            for probs, ids in ((ours, pairs[:, 0]), (theirs, pairs[:, 1]))
        )
        distance = weight * divergence(*same)
    if len(pairs) in (ours.shape[-1], theirs.shape[-1]):
        return distance
    others = (probs[..., _others(pairs[:, side], probs.shape[-1])] for side, probs in enumerate((ours, theirs)))
    return distance + (1.0 - weight) * sorted_distance(*others)


def _others(ids: Int[Tensor, " P"], size: int) -> Int[Tensor, " R"]:
    """Return the token ids below `size` without `ids`."""
    is_other = torch.ones(size, dtype=torch.bool, device=ids.device)
    is_other[ids] = False
    return is_other.nonzero()[:, 0]
