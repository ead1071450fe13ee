"""Compute advantages from token rewards and values (GAE), from rewards to come, or from the scores of a prompt's group.

Sequence-level functions (`group_*`, `leave_one_out`, `greedy_centered`) run on scalars, with the scores. Token-level
functions run with the tokens. No function whitens: moments may have to be merged over ranks first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts

_MOST_GAP = 20.0  # nats, far beyond every clip of the weights


def gae(
    rewards: Float[Tensor, " N"],
    values: Float[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    gamma: float,
    lam: float | Float[Tensor, " B"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return (advantages, returns) by generalised advantage estimation (arXiv:1506.02438, eq. 16) over sampled tokens.

    `lam` is one number, or one number for each sequence (see length_adaptive_lambda).

    Positions outside response_mask are skipped, as in verl: tool output between two sampled tokens neither earns credit
    nor discounts it, and a reward at such a position is ignored. OpenRLHF instead keeps such a position as a step of
    reward 0 and value 0. Advantages and returns are zero there. The state after the last token has value 0.
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


def length_adaptive_lambda(num_tokens: Int[Tensor, " B"], *, alpha: float) -> Float[Tensor, " B"]:
    """Return 1 - 1 / (alpha * l) for sequences of l sampled tokens, at least 0 (VAPO, arXiv:2504.05118, section 4.2).

    The weights lambda^k of the temporal differences then sum to alpha * l, so credit reaches back over a fixed share
    of the response. The paper takes alpha 0.05 for responses of thousands of tokens. Where alpha * l <= 1 the equation
    has no positive result, and lambda is 0.
    """
    return (1.0 - 1.0 / (alpha * num_tokens.float())).clamp(min=0.0)


def reward_to_go(
    rewards: Float[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    gamma: float,
) -> Float[Tensor, " N"]:
    """Return the discounted sum of a sequence's rewards from each sampled token on; zero outside response_mask.

    Unsampled positions are skipped as in `gae`.
    """
    counts = sequence_counts(response_mask, lengths)
    sums = _discounted_to_go(rewards[response_mask], counts, factor=gamma)
    return torch.zeros_like(rewards).masked_scatter(response_mask, sums)


def _discounted_to_go(
    terms: Float[Tensor, " M"], counts: Int[Tensor, " B"], *, factor: float | Float[Tensor, " B"]
) -> Float[Tensor, " M"]:
    """Return y[t] = terms[t] + factor * y[t + 1] within each of B sequences of `counts` terms.

    Each time step is one vector operation over the sequences of sufficient length. With the longest sequence first,
    step t of all sequences is a contiguous slice. So there is no padding, and unequal lengths cost nothing.
    """
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    step = torch.arange(len(terms), device=terms.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    reached = torch.bincount(step)  # sequences that have a step t
    position = (reached.cumsum(0) - reached)[step] + rank.repeat_interleave(counts)
    by_step = torch.empty_like(terms)
    by_step[position] = terms
    steps = by_step.split(reached.tolist())
    by_rank = factor[order].to(terms.dtype) if isinstance(factor, Tensor) else None
    for now, later in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        if by_rank is None:
            now[: len(later)].add_(later, alpha=factor)
        else:
            now[: len(later)].addcmul_(later, by_rank[: len(later)])
    return by_step[position]


def whiten(
    values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"], *, mean: float, variance: float, eps: float = 1e-8
) -> Float[Tensor, "*N"]:
    """Return (values - mean) / sqrt(variance + eps), zero outside mask.

    Mean and variance come from masking.moments, merged over all ranks. We pass the unbiased variance, as verl does;
    OpenRLHF takes the biased variance.
    """
    return torch.where(mask, (values - mean) * (variance + eps) ** -0.5, 0.0)


def group_centered(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Return each score minus the group's mean (Dr. GRPO, arXiv:2503.20783: no division by the std).

    Scores are prompt-major. ValueError for a group of one, because there is no baseline, and for a non-finite score.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_centered")
    return (scores_P_G - scores_P_G.mean(dim=1, keepdim=True)).flatten()


def batch_centered(scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return each score minus the mean of all responses (FlashREINFORCE). ValueError for a single response."""
    return group_centered(scores, group_size=len(scores))


def soft_value_centered(scores: Float[Tensor, " B"], *, group_size: int, temperature: float) -> Float[Tensor, " B"]:
    """Return each score minus t * log(mean(exp(score / t))) of the group, t the temperature (OAPL, arXiv:2602.19362).

    The subtracted value estimates the optimal value of the score minus t * KL to the sampler. The value is the group's
    maximum at temperature 0 and the mean at infinity. Scores are prompt-major; ValueError as in group_centered.
    """
    return scores - soft_values(scores, group_size=group_size, temperature=temperature).repeat_interleave(group_size)


def soft_values(scores: Float[Tensor, " B"], *, group_size: int, temperature: float) -> Float[Tensor, " P"]:
    """Return t * log(mean(exp(score / t))) of each group, t the temperature (A*-PO, arXiv:2505.20686, eq. 4).

    With responses of the reference, this estimates the optimal value of the score minus t * KL to the reference.
    Scores are prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="soft_values")
    return temperature * ((scores_P_G / temperature).logsumexp(dim=1) - math.log(group_size))


def class_weights(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Return 1 / (1 + n) for the n scores above the group's mean, and -1 / (1 + n) for the n other scores.

    The signs are the labels of REAL (arXiv:2602.05630), and n gives the size of the class to `classification`. Groups
    of equal scores have a single class and get 0. Scores are prompt-major; ValueError as in group_centered.
    """
    good_P_G = group_centered(scores, group_size=group_size).view(-1, group_size) > 0
    flat_P = (scores.view(-1, group_size) == scores.view(-1, group_size)[:, :1]).all(dim=1, keepdim=True)
    count_P = good_P_G.sum(dim=1, keepdim=True).to(scores.dtype)
    weights_P_G = torch.where(good_P_G, 1.0 / (1.0 + count_P), -1.0 / (1.0 + group_size - count_P))
    return torch.where(flat_P, 0.0, weights_P_G).flatten()


def group_normalized(
    scores: Float[Tensor, " B"], *, group_size: int, eps: float, counted: Bool[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """Return each score minus the group's mean, divided by the group's std plus eps (GRPO, arXiv:2402.03300, 4.1.2).

    The std is unbiased. A group of equal scores gives zeros. eps is 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF. Scores
    are prompt-major; ValueError as in group_centered.

    counted: True for responses with a score. Mean and std are taken over the group's counted scores, and the remaining
    responses get 0. None: all responses count.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_normalized")
    if counted is None:
        centered_P_G = scores_P_G - scores_P_G.mean(dim=1, keepdim=True)
        return (centered_P_G / (scores_P_G.std(dim=1, keepdim=True) + eps)).flatten()
    counted_P_G = counted.view_as(scores_P_G)
    num_counted = counted_P_G.sum(dim=1, keepdim=True)
    mean = torch.where(counted_P_G, scores_P_G, 0.0).sum(dim=1, keepdim=True) / num_counted.clamp(min=1)
    centered_P_G = torch.where(counted_P_G, scores_P_G - mean, 0.0)
    variance = centered_P_G.square().sum(dim=1, keepdim=True) / (num_counted - 1).clamp(min=1)
    return (centered_P_G / (variance.sqrt() + eps)).flatten()


def group_relative_to_mean(scores: Float[Tensor, " B"], *, group_size: int, eps: float = 0.0) -> Float[Tensor, " B"]:
    """Return each score minus the group's mean, divided by the group's mean plus eps (MaxRL, arXiv:2602.02710).

    A group with a mean of 0 or less gives zeros. Scores should be at least 0. With scores of 0 and 1, a group has the
    gradient of the log pass rate, truncated at the order of group_size. eps is 1e-6 in SkyRL, 0 in prime-rl. Scores are
    prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_relative_to_mean")
    mean = scores_P_G.mean(dim=1, keepdim=True)
    return torch.where(mean > 0.0, (scores_P_G - mean) / (mean + eps), 0.0).flatten()


def steps_centered(rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Return the step rewards of a prompt's responses minus the mean; see steps_normalized."""
    return group_centered(rewards, group_size=len(rewards)) if len(rewards) > 1 else torch.zeros_like(rewards)


def steps_normalized(rewards: Float[Tensor, " S"], *, eps: float) -> Float[Tensor, " S"]:
    """Return the step rewards of a prompt's responses minus the mean, divided by the std plus eps.

    Process supervision (arXiv:2402.03300, section 4.1.3): a token's advantage is the sum of the terms of all steps that
    end at or after the token, reward_to_go with gamma 1. With a single step per response the result equals
    group_normalized. A single step gives 0.
    """
    if len(rewards) < 2:
        return torch.zeros_like(rewards)
    return group_normalized(rewards, group_size=len(rewards), eps=eps)


def anchor_relative(
    returns: Float[Tensor, " S"], anchors: Sequence[str], *, std_normalize: bool, eps: float
) -> Float[Tensor, " S"]:
    """Return each turn's return minus the mean over the turns of equal anchors (GiGPO, arXiv:2505.10978, eq. 7).

    `anchors` names the state before each turn of a prompt's responses. std_normalize: also divided by the unbiased std
    of these turns plus eps. If no other turn has the anchor of a turn, the result for this turn is 0.
    """
    places: dict[str, list[int]] = {}
    for place, anchor in enumerate(anchors):
        places.setdefault(anchor, []).append(place)
    relative = torch.zeros_like(returns)
    for same in places.values():
        turns = returns[same]
        relative[same] = steps_normalized(turns, eps=eps) if std_normalize else steps_centered(turns)
    return relative


def leave_one_out(scores: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Return each score minus the mean of the group's remaining scores (RLOO, arXiv:2402.14740).

    The result is group_centered times G / (G - 1). Scores are prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="leave_one_out")
    others_P_G = (scores_P_G.sum(dim=1, keepdim=True) - scores_P_G) / (group_size - 1)
    return (scores_P_G - others_P_G).flatten()


def uneven_group_scale(scores: Float[Tensor, " B"], *, group_size: int) -> float:
    """Return the number of groups divided by the number of groups with unequal scores (GPG's alpha, arXiv:2504.02546).

    The result is 1 if all groups have equal scores. Groups of equal scores have no gradient but count in the mean. The
    factor corrects the mean for these groups. Scores are prompt-major; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="uneven_group_scale")
    uneven = int((scores_P_G != scores_P_G[:, :1]).any(dim=1).sum())
    return len(scores_P_G) / uneven if uneven else 1.0


def group_best_margin(scores: Float[Tensor, " B"], *, group_size: int, k: int) -> Float[Tensor, " B"]:
    """Return each response's contribution to the best score of k, averaged over all sets of k in the group.

    Sets without the response contribute 0. The contributions are the weights of an unbiased gradient of the expected
    best of k, with a leave-one-out baseline (arXiv:2505.15201). With k = group_size the best score gets the distance to
    the second best, and all other scores get 0 (pass@k, arXiv:2503.19595). Equal best scores have no margin. Scores
    are prompt-major, and 2 <= k <= group_size; ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_best_margin")
    ascending, order = (scores_P_G - scores_P_G.amin(dim=1, keepdim=True)).sort(dim=1, stable=True)
    # number of sets with i best and j second best, divided by all sets: the others are chosen below j
    sets = [math.comb(j, k - 2) / math.comb(group_size, k) for j in range(group_size)]
    weights = torch.tensor(sets, dtype=scores.dtype, device=scores.device)
    below = (weights.cumsum(0) - weights) * ascending
    margins = below - ((weights * ascending).cumsum(dim=1) - weights * ascending)
    return torch.empty_like(margins).scatter(1, order, margins).flatten()


def group_best_normalized(scores: Float[Tensor, " B"], *, group_size: int, k: int, eps: float) -> Float[Tensor, " B"]:
    """Return (mean best score of the sets of k with the response - mean best over all sets) / standard deviation.

    Pass@k training (arXiv:2508.10751, the analytic form) for scores of any value: exact over all sets of k of a group.
    The deviation is the population's. Where the deviation is at most eps, the sets do not differ and advantages are 0.
    Scores are prompt-major, and 1 <= k < group_size: one set has no baseline. ValueError as in group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="group_best_normalized")
    ascending, order = (scores_P_G - scores_P_G.amin(dim=1, keepdim=True)).sort(dim=1, stable=True)

    def column(counts: list[float]) -> Tensor:
        return torch.tensor(counts, dtype=scores.dtype, device=scores.device)

    ranks, sets, sets_of_one = range(group_size), math.comb(group_size, k), math.comb(group_size - 1, k - 1)
    best = column([math.comb(j, k - 1) / sets for j in ranks])  # share of the sets whose best is at rank j
    itself = column([math.comb(i, k - 1) / sets_of_one for i in ranks])  # share of the sets with i that i leads
    above = column([math.comb(j - 1, k - 2) / sets_of_one if j and k > 1 else 0.0 for j in ranks])  # j, with i below j
    mean = (best * ascending).sum(dim=1, keepdim=True)
    std = (best * (ascending - mean).square()).sum(dim=1, keepdim=True).sqrt()
    from_above = (above * ascending).flip(1).cumsum(dim=1).flip(1) - above * ascending
    advantages = torch.where(std > eps, (itself * ascending + from_above - mean) / std, 0.0)
    return torch.empty_like(advantages).scatter(1, order, advantages).flatten()


def group_normalized_sum(
    by_reward: Mapping[str, Float[Tensor, " B"]],
    weights: Mapping[str, float],
    *,
    group_size: int,
    eps: float,
    counted: Mapping[str, Bool[Tensor, " B"]],
) -> Float[Tensor, " B"]:
    """Return the weighted sum of the rewards, each normalised within the group (GDPO, arXiv:2601.05242).

    GDPO then normalises the sum over the batch. Rewards are prompt-major; ValueError as in group_centered.

    counted: by reward, True for responses with a value. A reward without an entry counts for all responses.
    """
    normalized = [
        weights[name] * group_normalized(scores, group_size=group_size, eps=eps, counted=counted.get(name))
        for name, scores in by_reward.items()
    ]
    return torch.stack(normalized).sum(dim=0)


def greedy_centered(
    scores: Float[Tensor, " B"], greedy_scores: Float[Tensor, " P"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Return each score minus the score of the greedy response to the same prompt (ReMax, arXiv:2310.10505).

    Scores are prompt-major. ValueError unless each prompt has one greedy score.
    """
    if len(scores) != len(greedy_scores) * group_size:
        raise ValueError(
            f"greedy_centered needs a greedy score a prompt: {len(greedy_scores)} for {len(scores)} scores in groups "
            f"of {group_size}"
        )
    return scores - greedy_scores.repeat_interleave(group_size)


def length_weighted_centered(
    scores: Float[Tensor, " B"], num_tokens: Int[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Return each score minus the length-weighted mean of the group (OPO, arXiv:2505.23585).

    This baseline has the least variance if the squared gradient grows with a response's length. ValueError as in
    group_centered.
    """
    scores_P_G = _grouped(scores, group_size=group_size, needed_by="length_weighted_centered")
    weights_P_G = num_tokens.view(-1, group_size).to(scores.dtype)
    baseline = (weights_P_G * scores_P_G).sum(dim=1, keepdim=True) / weights_P_G.sum(dim=1, keepdim=True)
    return (scores_P_G - baseline).flatten()


def teacher_weighed(
    advantages: Float[Tensor, "*N"],
    logprobs: Float[Tensor, "*N"],
    teacher_logprobs: Float[Tensor, "*N"],
    *,
    share: float,
    clip: float,
) -> Float[Tensor, "*N"]:
    """Return A ((1 - share) + share clip(exp(sign(A) (log q - log p)), 1 - clip, 1 + clip)) for each sampled token.

    RLSD, arXiv:2604.03128, in the form of ms-swift 4.6 (`apply_rlsd_reweight`). p is the student and q the teacher.
    The weight is above 0, so no advantage changes its sign.
    """
    gaps = advantages.sign() * (teacher_logprobs - logprobs)
    return advantages * ((1.0 - share) + share * gaps.clamp(-_MOST_GAP, _MOST_GAP).exp().clamp(1.0 - clip, 1.0 + clip))


def _grouped(scores: Float[Tensor, " B"], *, group_size: int, needed_by: str) -> Float[Tensor, "P G"]:
    if group_size < 2:
        raise ValueError(f"{needed_by} needs group_size >= 2, got {group_size}: a group of one has no baseline")
    if len(scores) % group_size:
        raise ValueError(f"{needed_by} needs whole groups: {len(scores)} scores are not a multiple of {group_size}")
    if bad := scores.isfinite().logical_not().nonzero().flatten().tolist():
        raise ValueError(
            f"{needed_by} needs finite scores: those at {bad[:8]} are not (first: {scores[bad[0]].item()})"
        )
    return scores.view(-1, group_size)
