"""TRL's GRPO and RLOO advantages from several reward functions, and RLOO's loss.

A nan reward did not apply. A response without an applied reward has no score, and our functions refuse such a response.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.objectives.advantages import group_normalized, leave_one_out, whiten
from rlhf.objectives.kl import kl_k1
from rlhf.objectives.masking import sequence_sums
from rlhf.objectives.policy_loss import clipped_loss, clipped_ratios, importance_ratio
from tests.parity.adapters.corrections import trl_sampler_correction
from tests.parity.adapters.token_advantages import COUNT_ROUNDING, all_moments
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, clip_metrics, gradient

STD_EPS = 1e-4


def weighted_scores(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [B, K], their weights [K], scores [B])."""
    rewards, weights = arguments.tensor("rewards_per_func"), arguments.tensor("reward_weights")
    scores = (rewards * weights).nansum(1)
    scores[rewards.isnan().all(1)] = math.nan
    return rewards, weights, scores


def normalized(values: Tensor) -> Tensor:
    """(values - mean) / (std + 1e-4), by our whitening."""
    found, everywhere = all_moments(values), torch.ones_like(values, dtype=torch.bool)
    return whiten(values, everywhere, mean=found.mean, variance=(math.sqrt(found.variance) + STD_EPS) ** 2, eps=0.0)


def trl_grpo_advantages(arguments: Arguments) -> Outputs:
    """TRL has a single function for scores and corrections: the inputs tell the cases apart."""
    if arguments.has("sampling_logps"):
        return trl_sampler_correction(arguments)
    arguments.ignore("scale_rewards")  # by the group
    rewards, weights, scores = weighted_scores(arguments)
    group_size = int(arguments.number("num_generations"))
    if arguments.param("multi_objective_aggregation", "sum_then_normalize") == "normalize_then_sum":
        columns = [group_normalized(column, group_size=group_size, eps=STD_EPS) for column in rewards.T]
        summed = (torch.stack(columns, dim=1) * weights).sum(1)
        advantages, zero_std = normalized(summed), summed.std().expand(len(scores))
    else:
        zero_std = scores.view(-1, group_size).std(dim=1).repeat_interleave(group_size)
        advantages = group_normalized(scores, group_size=group_size, eps=STD_EPS)
    found = all_moments(scores)
    return {
        "advantages": advantages,
        "reward": found.mean,
        "reward_std": math.sqrt(found.variance),
        "frac_reward_zero_std": torch.isclose(zero_std, torch.zeros_like(zero_std)).float().mean(),
    }


def trl_rloo_advantages(arguments: Arguments) -> Outputs:
    """Compute RLOO's advantages: scores held in a range, minus beta times the KL of the whole response."""
    _, _, scores = weighted_scores(arguments)
    if clip := arguments.param("reward_clip_range", None):
        scores = scores.clamp(*clip)
    metrics: dict[str, Tensor] = {}
    if arguments.has("old_logps"):
        layout = Layout(arguments.mask("mask"))
        kl = kl_k1(*(layout.flat(arguments.tensor(name)) for name in ("old_logps", "ref_logps")))
        kl = torch.where(layout.mask, kl, 0.0)
        scores = scores - arguments.number("beta", 0.05) * sequence_sums(kl, layout.lengths)
        metrics["kl"] = kl[layout.mask].mean()
    arguments.ignore("beta")
    advantages = leave_one_out(scores, group_size=int(arguments.number("num_generations")))
    if arguments.param("normalize_advantages", False):
        advantages = normalized(advantages)
        arguments.rounding = COUNT_ROUNDING * advantages.abs().max().item()
    return {"advantages": advantages, **metrics}


def trl_rloo_loss(arguments: Arguments) -> Outputs:
    """Return PPO's loss with the whole response as an action."""
    logprobs, layout = arguments.variable("logps"), Layout(arguments.mask("mask"))
    by_sequence = sequence_sums(torch.where(layout.mask, layout.flat(logprobs), 0.0), layout.lengths)
    rows = torch.ones(len(by_sequence), dtype=torch.bool)
    ratio = importance_ratio(by_sequence, arguments.tensor("old_sequence_logps"), rows)
    columns, clip = (ratio, arguments.tensor("advantages"), rows), arguments.clip("epsilon_low", "epsilon_high")
    loss = clipped_loss(*columns, **clip).mean()
    metrics = clip_metrics(*clipped_ratios(*columns, **clip), Layout(rows[:, None]))
    return {"loss": loss, "grad_logps": gradient(loss, logprobs), **metrics}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "GRPOTrainer._generate_and_score_completions"): trl_grpo_advantages,
    ("trl", "RLOOTrainer._generate_and_score_completions"): trl_rloo_advantages,
    ("trl", "RLOOTrainer._compute_loss"): trl_rloo_loss,
}
