"""Compute the optimal token baseline (OTB, arXiv:2602.07078): a group's baseline per step.

A token's advantage is its reward to go minus the mean reward to go of the group's tokens at the same step. The mean is
weighted by each trajectory's energy so far, a proxy of its squared gradient norm. Sequences may differ in length.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts, to_tokens


def realized_energy(
    logprobs: Float[Tensor, " N"],
    collision_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    rollout_weights: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Return the running sum over a sequence's sampled tokens of 1 - 2 p + sum_v p_v^2, the squared gradient of the
    logits.

    collision_logprobs is log sum_v p_v^2 (logprobs.collision_logprob_from_logits). Rollout weights that correct the
    policy gradient enter squared.
    """
    energy = 1.0 - 2.0 * logprobs.exp() + collision_logprobs.exp()
    if rollout_weights is not None:
        energy = energy * rollout_weights.square()
    running = torch.where(mask, energy, 0.0).double().cumsum(0)
    before = torch.nn.functional.pad(running, (1, 0))[lengths.cumsum(0) - lengths]
    return (running - to_tokens(before, lengths, num_tokens=len(mask))).to(logprobs.dtype)


def step_cells(
    mask: Bool[Tensor, " N"], lengths: Int[Tensor, " B"], groups: Int[Tensor, " B"], *, max_steps: int
) -> Int[Tensor, " N"]:
    """Return the cell of each token: group * max_steps + step, where steps count a sequence's sampled tokens from 0.

    A cell holds the tokens of one group at one step. Unsampled tokens get some cell of their group.
    """
    counts = sequence_counts(mask, lengths)
    steps = mask.cumsum(0) - 1 - to_tokens(counts.cumsum(0) - counts, lengths, num_tokens=len(mask))
    return to_tokens(groups, lengths, num_tokens=len(mask)) * max_steps + steps.clamp(min=0)


def step_sums(
    returns: Float[Tensor, " N"],
    energy: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    cells: Int[Tensor, " N"],
    *,
    num_cells: int,
) -> Float[Tensor, "3 C"]:
    """Return the sums of returns * energy, of energy, and of 1 over the tokens of each cell. Ranks add them up."""
    terms = torch.stack([returns * energy, energy, torch.ones_like(energy)])
    return terms.new_zeros(3, num_cells).index_add(1, cells, torch.where(mask, terms, 0.0))


def step_baseline(
    sums: Float[Tensor, "3 C"], mask: Bool[Tensor, " N"], cells: Int[Tensor, " N"], *, eps: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return (energy-weighted mean of the returns of each token's cell, whether the token is alone in its cell).

    sums: from `step_sums`. A token alone in its cell would be its own baseline, with an advantage of 0: verl uses a
    baseline of 0 instead. eps is added to the summed energy.
    """
    weighted, energy, count = sums[:, cells]
    return torch.where(mask, weighted / (energy + eps), 0.0), mask & (count == 1)
