"""Turn a score per sequence into token rewards with a KL penalty, and shape scores.

Shaping runs with the scores and token_rewards with the tokens, before any advantage.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts


def token_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    kl_coef: float,
) -> Float[Tensor, " N"]:
    """Return -kl_coef * kl on each sampled token plus the score on the last token, zero elsewhere.

    arXiv:1909.08593, eq. 2. `kl` is a per-token estimate of KL(policy || reference), usually kl_k1. ValueError for a
    sequence without a sampled token: no token could carry the score.
    """
    counts = sequence_counts(response_mask, lengths)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"token_rewards: sequences {empty[:8]} have no sampled token to carry their score")
    last = response_mask.nonzero().flatten()[counts.cumsum(0) - 1]
    penalties = torch.where(response_mask, -kl_coef * kl, 0.0)
    return penalties.index_add(0, last, scores.to(penalties.dtype))


def step_rewards(
    ends: Int[Tensor, " S"], values: Float[Tensor, " S"], response_mask: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return each step's value on the step's last token, zero elsewhere. Steps with the same last token are summed.

    ValueError for a step with an unsampled last token: no token could be credited.
    """
    if wrong := ends[~response_mask[ends]].tolist():
        raise ValueError(f"step_rewards: steps end at {wrong[:8]}, where no token was sampled")
    return torch.zeros(len(response_mask)).index_add(0, ends, values.float())


def overlong_penalty(num_tokens: Int[Tensor, " B"], *, max_tokens: int, buffer: int | float) -> Float[Tensor, " B"]:
    """Return 0 up to max_tokens - buffer, then linearly down to -1 at max_tokens and beyond (arXiv:2503.14476, eq. 13).

    Add the penalty, times a factor, to the score.
    """
    excess = (num_tokens.double() - (max_tokens - buffer)).clamp(0.0, buffer)
    return -excess / buffer


def relative_length(
    num_tokens: Int[Tensor, " B"], right: Bool[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Return z minus the mean z of the group's right responses, z = (length - min) / (max - min); 0 for the rest.

    Minimum, maximum and mean are over the right responses, so the terms of a group sum to 0. Equal lengths and a single
    right response give 0. The equation equals NeMo-RL's group relative-length scaling with the opposite sign: subtract
    the terms, times a weight, from the scores. Responses are prompt-major.
    """
    lengths_P_G, right_P_G = num_tokens.double().view(-1, group_size), right.view(-1, group_size)
    z_P_G = _within_range(lengths_P_G, right_P_G)
    z_P_G = torch.where(right_P_G, z_P_G, 0.0)
    mean_P = z_P_G.sum(dim=1, keepdim=True) / right_P_G.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(right_P_G, z_P_G - mean_P, 0.0).flatten()


def relative_length_of_all(
    num_tokens: Int[Tensor, " B"], right: Bool[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Return z - 1/2 for right responses and max(z - 1/2, 0) for wrong responses, z = (length - min) / (max - min).

    Minimum and maximum are over all responses of the group (the length reward of Kimi k1.5, arXiv:2501.12599, section
    2.3.3, negated): a wrong response is never rewarded for being short. Equal lengths give 0. Subtract the terms, times
    a weight, from the scores. Responses are prompt-major.
    """
    lengths_P_G = num_tokens.double().view(-1, group_size)
    span = lengths_P_G.amax(dim=1, keepdim=True) - lengths_P_G.amin(dim=1, keepdim=True)
    z_P_G = _within_range(lengths_P_G, torch.ones_like(lengths_P_G, dtype=torch.bool)) - 0.5
    terms = torch.where(right.view(-1, group_size), z_P_G, z_P_G.clamp(min=0.0))
    return torch.where(span > 0, terms, 0.0).flatten()


def pass_rate_length(
    num_tokens: Int[Tensor, " B"], right: Bool[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    """Return (share of right responses) * length / (longest right response of the group), 0 for wrong responses.

    Prompts that are mostly answered right press more for short responses (NeMo-RL's pass-rate-scaled penalty). Subtract
    the terms, times a weight, from the scores. Responses are prompt-major.
    """
    lengths_P_G, right_P_G = num_tokens.double().view(-1, group_size), right.view(-1, group_size)
    lengths_P_G = torch.where(right_P_G, lengths_P_G, 0.0)
    longest_P = lengths_P_G.amax(dim=1, keepdim=True).clamp(min=1.0)
    return (right_P_G.double().mean(dim=1, keepdim=True) * lengths_P_G / longest_P).flatten()


def length_band(
    num_tokens: Int[Tensor, " B"], right: Bool[Tensor, " B"], *, start: int, end: int
) -> Float[Tensor, " B"]:
    """Return 0 for right responses up to `start` tokens, then linearly up to 1 at `end` and beyond; 0 for the rest.

    Subtract the terms, times a weight, from the scores. For scores of 0 and 1 the result is that of NeMo-RL's profile
    band, whose factor at `end` is 1 - weight.
    """
    return torch.where(right, ((num_tokens.double() - start) / (end - start)).clamp(0.0, 1.0), 0.0)


def _within_range(lengths_P_G: Float[Tensor, "P G"], counted_P_G: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Return (length - min) / (max - min) over a group's counted responses, and 0 where they are equally long."""
    least = torch.where(counted_P_G, lengths_P_G, torch.inf).amin(dim=1, keepdim=True)
    most = torch.where(counted_P_G, lengths_P_G, -torch.inf).amax(dim=1, keepdim=True)
    span = most - least
    return torch.where(counted_P_G & (span > 0), (lengths_P_G - least) / span, 0.0)
