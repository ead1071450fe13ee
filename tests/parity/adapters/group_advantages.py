"""Advantages from the scores of a prompt's group, in verl and OpenRLHF.

verl's groups may differ in size and stand in any order: ours are called group by group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rlhf.objectives.advantages import (
    group_best_margin,
    group_centered,
    group_normalized,
    leave_one_out,
    length_weighted_centered,
    reward_to_go,
    whiten,
)
from rlhf.objectives.masking import moments
from rlhf.objectives.rewards import token_rewards
from tests.parity.adapters.aggregation import EPS
from tests.parity.adapters.token_advantages import verl_whiten, zeroing_gae, zeroing_returns
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout


class GroupEstimator(Protocol):
    """Maps the scores of a group to advantages; `rows` are the group's places in the batch."""

    def __call__(self, scores: Tensor, rows: Tensor) -> Tensor: ...


def groups_of(arguments: Arguments) -> list[Tensor]:
    """Return the rows of each group, in the order of the groups' first rows."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(arguments.raw("index")):
        rows.setdefault(str(name), []).append(row)
    return [torch.tensor(group) for group in rows.values()]


def by_group(arguments: Arguments, estimate: GroupEstimator) -> Tensor:
    """[B] advantages of verl's scores: the sum of the token rewards, masked or not."""
    scores = arguments.tensor("token_level_rewards").sum(-1)
    advantages = torch.empty_like(scores)
    for rows in groups_of(arguments):
        advantages[rows] = estimate(scores[rows], rows)
    return advantages


def on_tokens(advantages: Tensor, mask: Tensor) -> Outputs:
    """Expand [B] to [B, T], zero where masked; verl returns the same as returns."""
    tokens = torch.where(mask, advantages[:, None], 0.0)
    return {"advantages": tokens, "returns": tokens}


def simple(function: Callable[..., Tensor]) -> Adapter:
    """Return an estimator without parameters: epsilon is in the signature but not in the formula."""

    def adapter(arguments: Arguments) -> Outputs:
        arguments.ignore("epsilon")
        mask = arguments.mask("response_mask")
        return on_tokens(by_group(arguments, lambda scores, rows: function(scores, group_size=len(rows))), mask)

    return adapter


def verl_grpo(arguments: Arguments) -> Outputs:
    """With or without the division by the std."""
    return on_tokens(_grpo(arguments), arguments.mask("response_mask"))


def _grpo(arguments: Arguments) -> Tensor:
    eps, by_std = arguments.number("epsilon", 1e-6), arguments.flag("norm_adv_by_std_in_grpo", True)

    def estimate(scores: Tensor, rows: Tensor) -> Tensor:
        if by_std:
            return group_normalized(scores, group_size=len(rows), eps=eps)
        return group_centered(scores, group_size=len(rows))

    return by_group(arguments, estimate)


def verl_gdpo(arguments: Arguments) -> Outputs:
    """Return verl's advantages for a single reward: GRPO, whitened over the tokens."""
    mask = arguments.mask("response_mask")
    return _whitened(_grpo(arguments), mask)


def verl_reinforce_plus_plus_baseline(arguments: Arguments) -> Outputs:
    """Centred by group, whitened over the tokens."""
    arguments.ignore("epsilon")
    mask = arguments.mask("response_mask")
    return _whitened(by_group(arguments, lambda scores, rows: group_centered(scores, group_size=len(rows))), mask)


def _whitened(advantages: Tensor, mask: Tensor) -> Outputs:
    tokens = torch.where(mask, verl_whiten(torch.where(mask, advantages[:, None], 0.0), mask), 0.0)
    return {"advantages": tokens, "returns": tokens}


def verl_passk(arguments: Arguments) -> Outputs:
    """The best response's margin, over the group's std or not."""
    eps, by_std = arguments.number("epsilon", 1e-6), arguments.flag("norm_adv_by_std_in_grpo", True)

    def estimate(scores: Tensor, rows: Tensor) -> Tensor:
        margin = group_best_margin(scores, group_size=len(rows), k=len(rows))
        return margin / (scores.std() + eps) if by_std else margin

    return on_tokens(by_group(arguments, estimate), arguments.mask("response_mask"))


def verl_opo(arguments: Arguments) -> Outputs:
    """Centred by the mean weighted with the lengths."""
    arguments.ignore("epsilon")
    mask = arguments.mask("response_mask")
    num_tokens = mask.sum(-1)

    def estimate(scores: Tensor, rows: Tensor) -> Tensor:
        return length_weighted_centered(scores, num_tokens[rows], group_size=len(rows))

    return on_tokens(by_group(arguments, estimate), mask)


def verl_gpg(arguments: Arguments) -> Outputs:
    """Return centred scores times the batch over the non-zero scores; verl overwrites the given alpha."""
    arguments.ignore("epsilon", "alpha")
    scores = arguments.tensor("token_level_rewards").sum(-1)
    scale = len(scores) / max(int(scores.count_nonzero()), 1) / arguments.number("f_norm", 1.0)
    centered = by_group(arguments, lambda scores, rows: group_centered(scores, group_size=len(rows)))
    return on_tokens(scale * centered, arguments.mask("response_mask"))


def verl_reinforce_plus_plus(arguments: Arguments) -> Outputs:
    """Whitened rewards to go."""
    mask, rewards = arguments.mask("response_mask"), arguments.tensor("token_level_rewards")
    layout = Layout(mask)
    flat = reward_to_go(layout.flat(rewards), layout.mask, layout.lengths, gamma=arguments.number("gamma"))
    returns = layout.padded(flat)
    return {"advantages": torch.where(mask, verl_whiten(returns, mask), 0.0), "returns": returns}


def verl_remax(arguments: Arguments) -> Outputs:
    """Rewards to go minus the score of the greedy response."""
    mask = arguments.mask("response_mask")
    returns = zeroing_returns(arguments.tensor("token_level_rewards"), mask, gamma=1.0)
    baselines = torch.where(mask, arguments.tensor("reward_baselines")[:, None], 0.0)
    return {"advantages": returns - baselines, "returns": returns}


GROUP_BASELINES: dict[str, Callable[..., Tensor]] = {
    "rloo": leave_one_out,
    "reinforce_baseline": group_centered,
    "dr_grpo": group_centered,
    "group_norm": lambda scores, *, group_size: group_normalized(scores, group_size=group_size, eps=1e-9),
}


def openrlhf_pipeline(arguments: Arguments) -> Outputs:
    """Group baseline, token rewards with the KL, returns or GAE, and whitening with the biased variance."""
    estimator = arguments.param("estimator")
    if estimator not in (*GROUP_BASELINES, "gae", "reinforce"):
        raise Unsupported(f"estimator {estimator!r}")
    mask, scores = arguments.mask("action_mask"), arguments.tensor("rewards")
    group_size = arguments.whole("n_samples_per_prompt")
    gamma, lam = arguments.number("gamma"), arguments.number("lambd")
    if estimator in GROUP_BASELINES:
        gamma = 1.0
        scores = GROUP_BASELINES[estimator](scores, group_size=group_size)
    if clip := arguments.param("reward_clip_range", None):
        scores = scores.clamp(*clip)
    layout = Layout(mask)
    coef = max(arguments.number("kl_coef"), 0.0)
    there = layout.lengths > 0  # a fully masked row earns nothing: OpenRLHF masks the reward that it puts there
    kl, lengths = layout.flat(arguments.tensor("kl")), layout.lengths[there]
    flat = token_rewards(scores[there], kl, layout.mask, lengths, kl_coef=coef)
    rewards = layout.padded(flat)
    if estimator == "gae":
        advantages, returns = zeroing_gae(rewards, arguments.tensor("values"), mask, gamma=gamma, lam=lam)
    else:
        arguments.ignore("values")
        advantages = returns = zeroing_returns(rewards, mask, gamma=gamma)
    without_std = arguments.flag("no_std_norm", False)
    if estimator in ("gae", "reinforce", "reinforce_baseline"):
        found = moments(advantages, mask)
        variance = 1.0 if without_std else max(found.squared_deviation / found.count, EPS)
        advantages = whiten(advantages, torch.ones_like(mask), mean=found.mean, variance=variance, eps=0.0)
    return {"advantages": advantages, "returns": returns}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_grpo_outcome_advantage"): verl_grpo,
    ("verl", "compute_grpo_vectorized_outcome_advantage"): verl_grpo,
    ("verl", "compute_gdpo_outcome_advantage"): verl_gdpo,
    ("verl", "compute_grpo_passk_outcome_advantage"): verl_passk,
    ("verl", "compute_reinforce_plus_plus_baseline_outcome_advantage"): verl_reinforce_plus_plus_baseline,
    ("verl", "compute_reinforce_plus_plus_outcome_advantage"): verl_reinforce_plus_plus,
    ("verl", "compute_rloo_outcome_advantage"): simple(leave_one_out),
    ("verl", "compute_rloo_vectorized_outcome_advantage"): simple(leave_one_out),
    ("verl", "compute_opo_outcome_advantage"): verl_opo,
    ("verl", "compute_gpg_outcome_advantage"): verl_gpg,
    ("verl", "compute_remax_outcome_advantage"): verl_remax,
    ("openrlhf", "RemoteExperienceMaker.compute_advantages_and_returns"): openrlhf_pipeline,
}
