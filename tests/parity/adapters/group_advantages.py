"""Advantages from the scores of a prompt's group, in verl and OpenRLHF.

verl's groups may differ in size and stand in any order: ours are called group by group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.objectives.advantages import (
    group_best_margin,
    group_centered,
    group_normalized,
    leave_one_out,
    length_weighted_centered,
    reward_to_go,
)
from rlhf.objectives.rewards import token_rewards
from tests.parity.adapters.token_advantages import biased_whiten, verl_whiten, zeroing_gae, zeroing_returns
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout


def by_group(arguments: Arguments, estimate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return advantages [B] of verl's scores: sums of the token rewards, including masked tokens.

    `estimate` maps the scores of a group and the group's places in the batch to advantages.
    """
    scores, places = arguments.tensor("token_level_rewards").sum(-1), [str(name) for name in arguments.raw("index")]
    advantages = torch.empty_like(scores)
    for group in dict.fromkeys(places):
        rows = torch.tensor([row for row, name in enumerate(places) if name == group])
        advantages[rows] = estimate(scores[rows], rows)
    return advantages


def on_tokens(advantages: Tensor, arguments: Arguments) -> Outputs:
    """Expand [B] to [B, T], zero where masked; verl returns the same as returns."""
    tokens = torch.where(arguments.mask("response_mask"), advantages[:, None], 0.0)
    return {"advantages": tokens, "returns": tokens}


def _grpo(arguments: Arguments) -> Tensor:
    eps, by_std = arguments.number("epsilon", 1e-6), arguments.param("norm_adv_by_std_in_grpo", True)

    def estimate(scores: Tensor, rows: Tensor) -> Tensor:
        if by_std:
            return group_normalized(scores, group_size=len(rows), eps=eps)
        return group_centered(scores, group_size=len(rows))

    return by_group(arguments, estimate)


def verl_grpo(arguments: Arguments) -> Outputs:
    return on_tokens(_grpo(arguments), arguments)


def verl_gdpo(arguments: Arguments) -> Outputs:
    """Return verl's advantages for a single reward: GRPO, whitened over the tokens."""
    mask = arguments.mask("response_mask")
    tokens = torch.where(mask, verl_whiten(torch.where(mask, _grpo(arguments)[:, None], 0.0), mask), 0.0)
    return {"advantages": tokens, "returns": tokens}


def verl_passk(arguments: Arguments) -> Outputs:
    """Return the margin of the best response of each group."""
    arguments.ignore("epsilon", "norm_adv_by_std_in_grpo")  # not over the std
    margins = by_group(arguments, lambda scores, rows: group_best_margin(scores, group_size=len(rows), k=len(rows)))
    return on_tokens(margins, arguments)


def verl_rloo(arguments: Arguments) -> Outputs:
    return on_tokens(by_group(arguments, lambda scores, rows: leave_one_out(scores, group_size=len(rows))), arguments)


def verl_opo(arguments: Arguments) -> Outputs:
    num_tokens = arguments.mask("response_mask").sum(-1)

    def estimate(scores: Tensor, rows: Tensor) -> Tensor:
        return length_weighted_centered(scores, num_tokens[rows], group_size=len(rows))

    return on_tokens(by_group(arguments, estimate), arguments)


def verl_gpg(arguments: Arguments) -> Outputs:
    """Return centred scores times the batch over the non-zero scores."""
    scores = arguments.tensor("token_level_rewards").sum(-1)
    scale = len(scores) / max(int(scores.count_nonzero()), 1)
    centered = by_group(arguments, lambda scores, rows: group_centered(scores, group_size=len(rows)))
    return on_tokens(scale * centered, arguments)


def verl_reinforce_plus_plus(arguments: Arguments) -> Outputs:
    """Return the whitened rewards to go."""
    mask, rewards = arguments.mask("response_mask"), arguments.tensor("token_level_rewards")
    layout = Layout(mask)
    flat = reward_to_go(layout.flat(rewards), layout.mask, layout.lengths, gamma=arguments.number("gamma"))
    returns = layout.padded(flat)
    return {"advantages": torch.where(mask, verl_whiten(returns, mask), 0.0), "returns": returns}


def verl_remax(arguments: Arguments) -> Outputs:
    """Return rewards to go minus the score of the greedy response."""
    mask = arguments.mask("response_mask")
    returns = zeroing_returns(arguments.tensor("token_level_rewards"), mask, gamma=1.0)
    baselines = torch.where(mask, arguments.tensor("reward_baselines")[:, None], 0.0)
    return {"advantages": returns - baselines, "returns": returns}


GROUP_BASELINES: dict[str, Callable[..., Tensor]] = {
    "rloo": leave_one_out,
    "reinforce_baseline": group_centered,
    "group_norm": lambda scores, *, group_size: group_normalized(scores, group_size=group_size, eps=1e-9),
}


def openrlhf_pipeline(arguments: Arguments) -> Outputs:
    """Group baseline, token rewards with the KL, returns or GAE, and whitening with the biased variance."""
    estimator = arguments.param("estimator")
    mask, scores, layout = (
        arguments.mask("action_mask"),
        arguments.tensor("rewards"),
        Layout(arguments.mask("action_mask")),
    )
    gamma, lam, size = (arguments.number(name) for name in ("gamma", "lambd", "n_samples_per_prompt"))
    if estimator in GROUP_BASELINES:
        gamma, scores = 1.0, GROUP_BASELINES[estimator](scores, group_size=int(size))
    scores, coef = scores.clamp(*arguments.param("reward_clip_range")), arguments.number("kl_coef")
    flat = token_rewards(scores, layout.flat(arguments.tensor("kl")), layout.mask, layout.lengths, kl_coef=coef)
    rewards, values = layout.padded(flat), arguments.tensor("values")
    if estimator == "gae":
        advantages, returns = zeroing_gae(rewards, values, mask, gamma=gamma, lam=lam)
    else:
        advantages = returns = zeroing_returns(rewards, mask, gamma=gamma)
    scale = not arguments.param("no_std_norm", False)
    if estimator in ("gae", "reinforce", "reinforce_baseline"):
        advantages = biased_whiten(advantages, mask, torch.ones_like(mask), scale=scale)
    return {"advantages": advantages, "returns": returns}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_grpo_outcome_advantage"): verl_grpo,
    ("verl", "compute_grpo_vectorized_outcome_advantage"): verl_grpo,
    ("verl", "compute_gdpo_outcome_advantage"): verl_gdpo,
    ("verl", "compute_grpo_passk_outcome_advantage"): verl_passk,
    ("verl", "compute_reinforce_plus_plus_outcome_advantage"): verl_reinforce_plus_plus,
    ("verl", "compute_rloo_vectorized_outcome_advantage"): verl_rloo,
    ("verl", "compute_opo_outcome_advantage"): verl_opo,
    ("verl", "compute_gpg_outcome_advantage"): verl_gpg,
    ("verl", "compute_remax_outcome_advantage"): verl_remax,
    ("openrlhf", "RemoteExperienceMaker.compute_advantages_and_returns"): openrlhf_pipeline,
}
