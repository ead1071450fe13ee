"""TRL's GRPO and RLOO advantages from several reward functions, and RLOO's loss.

A nan reward did not apply. A response without an applied reward has no score, and our functions refuse such a response.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.objectives.advantages import group_centered, group_normalized, leave_one_out, whiten
from rlhf.objectives.kl import kl_k1
from rlhf.objectives.masking import Moments, masked_mean, moments, sequence_sums
from rlhf.objectives.policy_loss import clipped_loss, clipped_ratios, importance_ratio
from tests.parity.adapters.aggregation import weighted
from tests.parity.adapters.corrections import trl_sampler_correction
from tests.parity.adapters.token_advantages import COUNT_ROUNDING
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout, gradient

STD_EPS = 1e-4


def weighted_scores(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [B, K], their weights [K], scores [B])."""
    rewards, weights = arguments.tensor("rewards_per_func"), arguments.tensor("reward_weights")
    scores = (rewards * weights).nansum(1)
    scores[rewards.isnan().all(1)] = math.nan
    return rewards, weights, scores


def over_std(values: Tensor, std: float) -> Tensor:
    """values / (std + 1e-4), by our whitening."""
    return whiten(values, torch.ones_like(values, dtype=torch.bool), mean=0.0, variance=(std + STD_EPS) ** 2, eps=0.0)


def all_moments(values: Tensor) -> Moments:
    """Over all entries."""
    return moments(values, torch.ones_like(values, dtype=torch.bool))


def trl_grpo_advantages(arguments: Arguments) -> Outputs:
    """TRL has a single function for scores and corrections: the inputs tell the cases apart."""
    if arguments.has("sampling_logps"):
        return trl_sampler_correction(arguments)
    rewards, weights, scores = weighted_scores(arguments)
    group_size = arguments.whole("num_generations")
    scaling = arguments.param("scale_rewards", "group")
    scaling = {True: "group", False: "none"}.get(scaling, scaling) if isinstance(scaling, bool) else scaling
    order = arguments.param("multi_objective_aggregation", "sum_then_normalize")
    if scaling not in ("group", "none", "batch") or order not in ("sum_then_normalize", "normalize_then_sum"):
        raise Unsupported(f"scale_rewards {scaling!r}, multi_objective_aggregation {order!r}")
    if order == "normalize_then_sum":
        columns = [group_normalized(column, group_size=group_size, eps=STD_EPS) for column in rewards.T]
        summed = (torch.stack(columns, dim=1) * weights).sum(1)
        found = all_moments(summed)
        advantages = over_std(summed - found.mean, math.sqrt(found.variance))
        zero_std = torch.full_like(scores, math.sqrt(found.variance))
    elif scaling == "batch":
        centered, batch_std = group_centered(scores, group_size=group_size), math.sqrt(all_moments(scores).variance)
        advantages, zero_std = over_std(centered, batch_std), torch.full_like(scores, batch_std)
    else:
        zero_std = scores.view(-1, group_size).std(dim=1).repeat_interleave(group_size)
        if scaling == "group":
            advantages = group_normalized(scores, group_size=group_size, eps=STD_EPS)
        else:
            advantages = group_centered(scores, group_size=group_size)
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
    mask, old, ref = (arguments.either(*names) for names in RLOO_COLUMNS)
    beta = arguments.number("beta", 0.05 if old is not None else 0.0)
    metrics: dict[str, Tensor] = {}
    if beta != 0.0:
        if mask is None or old is None or ref is None:
            raise Unsupported("beta without log-probabilities of the policy and the reference, and their mask")
        layout = Layout(mask.bool())
        kl = torch.where(layout.mask, kl_k1(layout.flat(old), layout.flat(ref)), 0.0)
        scores = scores - beta * sequence_sums(kl, layout.lengths)
        metrics["kl"] = masked_mean(kl, layout.mask)
    advantages = leave_one_out(scores, group_size=arguments.whole("num_generations"))
    if arguments.flag("normalize_advantages", False):
        of_batch = all_moments(advantages)
        advantages = over_std(advantages - of_batch.mean, math.sqrt(of_batch.variance))
        arguments.rounding = COUNT_ROUNDING * advantages.abs().max().item()
    return {"advantages": advantages, "rewards": scores, **metrics}


RLOO_COLUMNS = (
    ("mask", "completion_mask"),
    ("old_logps", "old_per_token_logps"),
    ("ref_logps", "ref_per_token_logps"),
)


def trl_rloo_loss(arguments: Arguments) -> Outputs:
    """Return PPO's loss with the whole response as an action."""
    logprobs, layout = arguments.variable("logps"), Layout(arguments.mask("mask"))
    flat = torch.where(layout.mask, layout.flat(logprobs), 0.0)
    by_sequence, old = sequence_sums(flat, layout.lengths), arguments.tensor("old_sequence_logps")
    advantages = arguments.tensor("advantages")
    rows = torch.ones(len(old), dtype=torch.bool)
    epsilon_low, epsilon_high = arguments.number("epsilon_low", 0.2), arguments.optional("epsilon_high")
    clip = {"clip_low": epsilon_low, "clip_high": epsilon_low if epsilon_high is None else epsilon_high}
    losses = clipped_loss(importance_ratio(by_sequence, old, rows), advantages, rows, **clip)
    loss = weighted(losses, Layout(rows[:, None]), "token_mean", num_tokens=len(rows), num_sequences=len(rows))
    low, high = (f.float() for f in clipped_ratios((by_sequence - old).exp(), advantages, rows, **clip))
    entropies = arguments.maybe("entropies")
    metrics = {} if entropies is None else {"entropy": masked_mean(layout.flat(entropies), layout.mask)}
    return {
        **metrics,
        "loss": loss,
        "grad_logps": gradient(loss, logprobs),
        "clip_ratio/low_mean": low.mean(),
        "clip_ratio/low_min": low.min(),
        "clip_ratio/high_mean": high.mean(),
        "clip_ratio/high_max": high.max(),
        "clip_ratio/region_mean": torch.maximum(low, high).mean(),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "GRPOTrainer._generate_and_score_completions"): trl_grpo_advantages,
    ("trl", "RLOOTrainer._generate_and_score_completions"): trl_rloo_advantages,
    ("trl", "RLOOTrainer._compute_loss"): trl_rloo_loss,
}
