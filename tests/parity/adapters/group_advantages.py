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
from rlhf.objectives.token_baseline import realized_energy, step_baseline, step_sums
from tests.parity.adapters.aggregation import EPS
from tests.parity.adapters.token_advantages import verl_whiten, zeroing_gae, zeroing_returns
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout


class GroupEstimator(Protocol):
    """Scores of one group to its advantages; `rows` says which of the batch they are."""

    def __call__(self, scores: Tensor, rows: Tensor) -> Tensor: ...


def groups_of(arguments: Arguments) -> list[Tensor]:
    """Rows of each group, in the order in which groups first appear."""
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
    """[B] to [B, T], zero where masked; verl returns them as returns too."""
    tokens = torch.where(mask, advantages[:, None], 0.0)
    return {"advantages": tokens, "returns": tokens}


def simple(function: Callable[..., Tensor]) -> Adapter:
    """An estimator without parameters: epsilon is in its signature but not in its formula."""

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
    """Of one reward: GRPO, whitened over the tokens."""
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
    """Centred, times the batch over its non-zero scores; verl overwrites the alpha that it is given."""
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


def optimal_token_baseline(*, by_column: bool) -> Adapter:
    """Steps are columns of the padded array, or counted over the sampled tokens only (the multi-turn form)."""

    def adapter(arguments: Arguments) -> Outputs:
        mask, rewards = arguments.mask("response_mask"), arguments.tensor("token_level_rewards")
        groups = groups_of(arguments)
        group = torch.zeros(len(mask), dtype=torch.int64)
        for number, rows in enumerate(groups):
            group_centered(torch.zeros(len(rows)), group_size=len(rows))  # refuses a group of one
            group[rows] = number
        layout = Layout(mask)
        returns = zeroing_returns(rewards, mask, gamma=1.0)
        weights = arguments.maybe("rollout_is_weights")
        energy = realized_energy(
            layout.flat(arguments.tensor("old_log_probs")),
            layout.flat(arguments.tensor("sum_pi_squared")).log(),
            layout.mask,
            layout.lengths,
            rollout_weights=None if weights is None else layout.flat(weights),
        )
        steps = layout.columns() if by_column else layout.flat((mask.cumsum(1) - 1).clamp(min=0))
        cells = layout.spread(group) * layout.width + steps
        sums = step_sums(layout.flat(returns), energy, layout.mask, cells, num_cells=len(groups) * layout.width)
        baseline, alone = step_baseline(sums, layout.mask, cells, eps=arguments.number("epsilon", EPS))
        if not arguments.flag("handle_zero_tail", True):
            tail = torch.zeros_like(alone) if by_column else layout.mask & layout.flat(_only_rows(mask, groups))
        else:
            tail = layout.mask & layout.flat(_tails(mask, groups)) if by_column else alone
        advantages = layout.flat(returns) - torch.where(tail, 0.0, baseline)
        return {"advantages": torch.where(mask, layout.padded(advantages), 0.0), "returns": returns}

    return adapter


def _tails(mask: Tensor, groups: list[Tensor]) -> Tensor:
    """Columns of a group's longest row at or after the number of tokens of its second longest."""
    counts = mask.sum(-1)
    tails = torch.zeros_like(mask)
    for rows in groups:
        longest, second = counts[rows].topk(2).values.tolist()
        if longest > second:
            tails[rows[counts[rows].argmax()], second:] = True
    return tails


def _only_rows(mask: Tensor, groups: list[Tensor]) -> Tensor:
    """The rows that have a group's only tokens: nothing is left to compare them with."""
    counts = mask.sum(-1)
    only = torch.zeros_like(mask)
    for rows in groups:
        if int((counts[rows] > 0).sum()) == 1:
            only[rows] = True
    return only


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
    ("verl", "compute_optimal_token_baseline_advantage"): optimal_token_baseline(by_column=True),
    ("verl", "compute_multi_turn_optimal_token_baseline_advantage"): optimal_token_baseline(by_column=False),
    ("openrlhf", "RemoteExperienceMaker.compute_advantages_and_returns"): openrlhf_pipeline,
}
