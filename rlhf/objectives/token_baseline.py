"""The optimal token baseline (OTB, arXiv:2602.07078): a group's baseline that differs from step to step.

A token's advantage is its reward to go minus the mean reward to go of the group's tokens at the same step, weighted by
each trajectory's energy so far: a proxy of its squared gradient norm. Sequences need not be of one length.
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
    """Running sum over a sequence's sampled tokens of 1 - 2 p + sum_v p_v^2, the squared gradient of the logits.

    collision_logprobs is log sum_v p_v^2 (logprobs.collision_logprob_from_logits). Rollout weights, where the policy
    gradient is corrected by them, enter squared.
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
    """The cell of each token: group * max_steps + step, where steps count a sequence's sampled tokens from 0.

    A cell holds the tokens of one group at one step. A token that was not sampled has some cell of its group.
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
    """Of the tokens of each cell the sums of returns * energy, of energy, and of 1; of all ranks' tokens, added up."""
    terms = torch.stack([returns * energy, energy, torch.ones_like(energy)])
    return terms.new_zeros(3, num_cells).index_add(1, cells, torch.where(mask, terms, 0.0))


def step_baseline(
    sums: Float[Tensor, "3 C"], mask: Bool[Tensor, " N"], cells: Int[Tensor, " N"], *, eps: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """(energy-weighted mean of the returns of each token's cell, whether the token is alone in its cell).

    sums: of `step_sums`. A token alone in its cell would be its own baseline, so that its advantage vanishes: verl
    takes 0 for the baseline in its place. eps is added to the summed energy.
    """
    weighted, energy, count = sums[:, cells]
    return torch.where(mask, weighted / (energy + eps), 0.0), mask & (count == 1)
