"""Reward shaping by length and truncation, and the supervised loss."""

from __future__ import annotations

import torch

from rlhf.objectives.rewards import overlong_penalty, token_rewards
from rlhf.objectives.supervised import negative_logprob
from tests.parity.adapters.aggregation import openrlhf_aggregated
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, gradient


def openrlhf_reward(arguments: Arguments) -> Outputs:
    """Compute the score on the last sampled token minus the KL penalty of each token.

    OpenRLHF charges the penalty to masked tokens too, and gives the score of a fully masked row to the last column. A
    negative coefficient counts as 0.
    """
    kl, scores = arguments.tensor("kl"), arguments.tensor("r")
    coef = max(arguments.number("kl_coef"), 0.0)
    if clip := arguments.param("reward_clip_range", None):
        scores = scores.clamp(*clip)
    mask = arguments.mask_or_all("action_mask", kl.shape)
    carries = mask.clone()
    carries[:, -1] |= ~mask.any(1)
    layout = Layout(carries)
    scored = layout.padded(token_rewards(scores, layout.flat(kl), layout.mask, layout.lengths, kl_coef=coef))
    rewards = torch.where(carries, scored, -coef * kl)
    return {"reward": rewards, "rewards": rewards, "out": rewards}


def openrlhf_overlong(arguments: Arguments) -> Outputs:
    """The penalty times a factor, added to the rewards."""
    penalty = overlong_penalty(
        arguments.integers("response_lengths"),
        max_tokens=arguments.whole("max_new_tokens"),
        buffer=arguments.number("overlong_buffer_len"),
    )
    factor = arguments.number("overlong_penalty_factor", 1.0)
    return {"rewards": arguments.tensor("rewards") + factor * penalty}


def openrlhf_stop_properly(arguments: Arguments) -> Outputs:
    """A coefficient below zero is a value, any further coefficient a factor."""
    scores, truncated = arguments.tensor("rewards"), arguments.mask("truncated")
    coef = arguments.number("stop_properly_penalty_coef")
    return {"rewards": torch.where(truncated, torch.full_like(scores, coef) if coef < 0 else scores * coef, scores)}


def trl_soft_overlong(arguments: Arguments) -> Outputs:
    """The penalty alone."""
    penalty = overlong_penalty(
        arguments.integers("completion_lengths"),
        max_tokens=arguments.whole("max_completion_len"),
        buffer=arguments.number("soft_punish_cache"),
    )
    return {"rewards": penalty}


def openrlhf_sft_loss(arguments: Arguments) -> Outputs:
    """Cross-entropy over the tokens or the sequences."""
    layout, logprobs = Layout(arguments.mask("loss_mask")), arguments.variable("per_token_logps")
    loss = openrlhf_aggregated(arguments, negative_logprob(layout.flat(logprobs), layout.mask), layout)
    return {"loss": loss, "grad_per_token_logps": gradient(loss, logprobs)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("openrlhf", "compute_reward"): openrlhf_reward,
    ("openrlhf", "apply_overlong_penalty"): openrlhf_overlong,
    ("openrlhf", "apply_stop_properly_penalty"): openrlhf_stop_properly,
    ("openrlhf", "SFTLoss.forward"): openrlhf_sft_loss,
    ("trl", "get_soft_overlong_punishment"): trl_soft_overlong,
}
