"""Compute losses of reward models on pairs and on steps, step aggregates, and calibration of margins.

There is a loss per pair or per token; the caller divides by the counts of the whole optimizer step.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], *, margin: Float[Tensor, " B"] | float = 0.0
) -> Float[Tensor, " B"]:
    """Return -log sigmoid(chosen - rejected - margin) of two scores (InstructGPT, arXiv:2203.02155, eq. 1).

    A margin asks for more distance where the preference was clear (Llama 2, arXiv:2307.09288, eq. 2). Without a margin
    the loss also equals OpenRLHF's LogExpLoss, log(1 + exp(rejected - chosen)).
    """
    return -logsigmoid(chosen - rejected - margin)


def centering(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return (chosen + rejected)^2 (arXiv:2312.09244). Pairs do not determine the zero of the scores."""
    return (chosen + rejected).square()


def combined_steps(
    scores: Float[Tensor, " N"],
    ends: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    by: Literal["min", "mean", "product"],
) -> Float[Tensor, " B"]:
    """Return a process reward model's score of each whole response.

    The score is the minimum (arXiv:2312.08935), mean, or product (arXiv:2305.20050) of the probabilities sigmoid(score)
    that the steps are right. ends: True for the last token of each step, the place of the step's score. ValueError for
    a response without a step.
    """
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)[ends]
    if len(rows.unique()) < len(lengths):
        raise ValueError("combined_steps needs a step in every response: one of these has none")
    reduce = {"min": "amin", "mean": "mean", "product": "prod"}[by]
    empty = scores.new_zeros(len(lengths))
    return empty.scatter_reduce(0, rows, scores[ends].sigmoid(), reduce=reduce, include_self=False)


def ensemble_scores(scores: Float[Tensor, "M B"], *, coef: float) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return mean - coef * std over M reward models, and the std, for each response.

    The std divides by M. The penalty of Coste et al. (arXiv:2310.02743, uncertainty-weighted optimisation) is the
    variance, coef * std^2; the std has the unit of the scores, so coef means the same on any scale. ValueError for a
    single model.
    """
    if len(scores) < 2:
        raise ValueError(f"ensemble_scores needs the scores of two reward models or more, got {len(scores)}")
    std = scores.std(dim=0, correction=0)
    return scores.mean(dim=0) - coef * std, std


def step_cross_entropy(
    scores: Float[Tensor, " N"], labels: Float[Tensor, " N"], mask: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return the cross-entropy of sigmoid(score) with the label at the end of each step, zero where mask is False.

    Process supervision (arXiv:2305.20050): mask is True at the last token of a step; labels are 0 or 1, or the share of
    correct continuations (arXiv:2312.08935). With a head of two classes pass the difference of their logits.
    """
    kept = torch.where(mask, labels, 0.0)
    losses = binary_cross_entropy_with_logits(torch.where(mask, scores, 0.0), kept, reduction="none")
    return torch.where(mask, losses, 0.0)


def calibration_bins(margins: Float[Tensor, " B"], *, num_bins: int) -> Float[Tensor, "num_bins 3"]:
    """Return (pairs, summed confidence, correct pairs) in equal bins of the confidence sigmoid(|margin|), from 1/2 on.

    margins are chosen - rejected. A pair is correct for a positive margin, half correct for a margin of 0. Bins of
    several ranks or batches can be added; CalibrationError reduces the sums to a single number.
    """
    margins = margins.detach().double()
    confidence = margins.abs().sigmoid()
    bin_index = ((confidence - 0.5) * 2.0 * num_bins).long().clamp(max=num_bins - 1)
    correct = 0.5 * (margins.sign() + 1.0)
    rows = torch.stack([torch.ones_like(confidence), confidence, correct], dim=1)
    return rows.new_zeros(num_bins, 3).index_add(0, bin_index, rows)
