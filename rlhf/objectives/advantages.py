"""Advantages: from token rewards and values (GAE), from rewards to come, or from the scores of a prompt's group.

Sequence-level ones (`group_*`, `leave_one_out`) are computed from scalars where the scores are; token-level ones
where the tokens are. None of them whitens by itself: moments may have to be merged over ranks first.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts


def gae(
    rewards: Float[Tensor, " N"],
    values: Float[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) over sampled tokens: (advantages, returns).

    Positions outside response_mask are stepped over: tool output between two sampled tokens neither earns credit
    nor discounts it, and a reward that stands there is not seen (verl). OpenRLHF instead keeps such a position as a
    step of reward 0 and value 0. Both results are zero there. The state after the last token is worth 0.
    """
    counts = sequence_counts(response_mask, lengths)
    sampled_rewards, sampled_values = rewards[response_mask], values[response_mask]
    next_values = torch.zeros_like(sampled_values)
    next_values[:-1] = sampled_values[1:]
    next_values[counts.cumsum(0)[counts > 0] - 1] = 0.0
    deltas = sampled_rewards + gamma * next_values - sampled_values
    sampled_advantages = _discounted_to_go(deltas, counts, factor=gamma * lam)
    advantages = torch.zeros_like(rewards).masked_scatter(response_mask, sampled_advantages)
    returns = torch.zeros_like(rewards).masked_scatter(response_mask, sampled_advantages + sampled_values)
    return advantages, returns


def reward_to_go(
    rewards: Float[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    gamma: float,
) -> Float[Tensor, " N"]:
    """Discounted sum of the rewards of a sequence from each sampled token on; zero outside response_mask.

    Steps over unsampled positions as `gae` does.
    """
    counts = sequence_counts(response_mask, lengths)
    sums = _discounted_to_go(rewards[response_mask], counts, factor=gamma)
    return torch.zeros_like(rewards).masked_scatter(response_mask, sums)


def _discounted_to_go(terms: Float[Tensor, " M"], counts: Int[Tensor, " B"], *, factor: float) -> Float[Tensor, " M"]:
    """y[t] = terms[t] + factor * y[t + 1] within each of B sequences of `counts` terms.

    One vector operation per time step, over the sequences that reach it: with the longest first, step t of all of
    them is one contiguous slice, so there is no padding and unequal lengths cost nothing.
    """
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    step = torch.arange(len(terms), device=terms.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    reached = torch.bincount(step)  # sequences that have a step t
    place = (reached.cumsum(0) - reached)[step] + rank.repeat_interleave(counts)
    by_step = torch.empty_like(terms)
    by_step[place] = terms
    steps = by_step.split(reached.tolist())
    for now, later in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        now[: len(later)].add_(later, alpha=factor)
    return by_step[place]


def whiten(
    values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"], *, mean: float, variance: float, eps: float = 1e-8
) -> Float[Tensor, "*N"]:
    """(values - mean) / sqrt(variance + eps), zero outside mask.

    Mean and variance come from masking.moments, merged over all ranks. We pass the unbiased variance (as verl does;
    OpenRLHF takes the biased one).
    """
    return torch.where(mask, (values - mean) * (variance + eps) ** -0.5, 0.0)


def group_centered(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Score minus the mean of its prompt's group (arXiv:2503.20783, Dr. GRPO: no division by the std).

    Scores are prompt-major. ValueError for a group of one, which has no baseline, and for a score that is not finite.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_centered")
    return (scores_P_G - scores_P_G.mean(dim=1, keepdim=True)).flatten()


def group_normalized(scores: Float[Tensor, " B"], *, group_size: int, eps: float) -> Float[Tensor, " B"]:
    """Score minus its group's mean, over the group's std plus eps (arXiv:2402.03300, section 4.1.2: GRPO).

    The std is the unbiased one. A group of equal scores gives zeros. eps is 1e-4 in TRL, 1e-6 in verl, 1e-9 in
    OpenRLHF. Scores are prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_normalized")
    centered_P_G = scores_P_G - scores_P_G.mean(dim=1, keepdim=True)
    return (centered_P_G / (scores_P_G.std(dim=1, keepdim=True) + eps)).flatten()


def leave_one_out(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Score minus the mean of the other scores of its group (RLOO, arXiv:2402.14740).

    It is group_centered times G / (G - 1). Scores are prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="leave_one_out")
    others_P_G = (scores_P_G.sum(dim=1, keepdim=True) - scores_P_G) / (group_size - 1)
    return (scores_P_G - others_P_G).flatten()


def group_std(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Unbiased std of each score's group. Scores are prompt-major; ValueError as in group_centered."""
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_std")
    return scores_P_G.std(dim=1, keepdim=True).expand_as(scores_P_G).flatten()


def uneven_group_scale(scores: Float[Tensor, " B"], *, group_size: int) -> float:
    """Groups over those whose scores differ (GPG's alpha, arXiv:2504.02546); 1 if none does.

    Groups of equal scores have no gradient but count in the mean; this factor takes them out of it. Scores are
    prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="uneven_group_scale")
    uneven = int((scores_P_G != scores_P_G[:, :1]).any(dim=1).sum())
    return len(scores_P_G) / uneven if uneven else 1.0


def group_best_margin(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """How far the best score of a group is above the second best; 0 for all others (pass@k, arXiv:2503.19595).

    Of equal best scores none has a margin. Scores are prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_best_margin")
    best, second = scores_P_G.topk(2, dim=1).values.split(1, dim=1)
    return torch.where(scores_P_G == best, best - second, 0.0).flatten()


def length_weighted_centered(
    scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Score minus the mean of its group weighted by response length (OPO, arXiv:2505.23585).

    The baseline of least variance if a response's squared gradient grows with its length. ValueError as in
    group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="length_weighted_centered")
    weights_P_G = num_tokens.view(-1, group_size).to(scores.dtype)
    baseline = (weights_P_G * scores_P_G).sum(dim=1, keepdim=True) / weights_P_G.sum(dim=1, keepdim=True)
    return (scores_P_G - baseline).flatten()


def _grouped(scores: Float[Tensor, " B"], *, group_size: int, needed_by: str) -> Float[Tensor, "P G"]:
    if group_size < 2:
        raise ValueError(f"{needed_by} needs group_size >= 2, got {group_size}: a group of one has no baseline")
    if len(scores) % group_size:
        raise ValueError(f"{needed_by} needs whole groups: {len(scores)} scores are not a multiple of {group_size}")
    if not bool(scores.isfinite().all()):
        bad = scores.isfinite().logical_not().nonzero().flatten().tolist()
        raise ValueError(
            f"{needed_by} needs finite scores: those at {bad[:8]} are not (first: {scores[bad[0]].item()})"
        )
    return scores.view(-1, group_size)
