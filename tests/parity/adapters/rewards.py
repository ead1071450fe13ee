"""Reward shaping by length and truncation, and the supervised loss."""

from __future__ import annotations

import torch

from rlhf.objectives.rewards import overlong_penalty, token_rewards
from rlhf.objectives.supervised import negative_logprob
from tests.parity.adapters.aggregation import openrlhf_aggregated
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout


def openrlhf_reward(arguments: Arguments) -> Outputs:
    """Compute the score on the last sampled token minus the KL penalty of each token.

    OpenRLHF charges the penalty to masked tokens too. A negative coefficient counts as 0.
    """
    kl, scores, mask = arguments.tensor("kl"), arguments.tensor("r"), arguments.mask("action_mask")
    coef, layout = max(arguments.number("kl_coef"), 0.0), Layout(mask)
    if clip := arguments.param("reward_clip_range", None):
        scores = scores.clamp(*clip)
    scored = layout.padded(token_rewards(scores, layout.flat(kl), layout.mask, layout.lengths, kl_coef=coef))
    return {"reward": torch.where(mask, scored, -coef * kl)}


def openrlhf_overlong(arguments: Arguments) -> Outputs:
    """Return the rewards plus the penalty times a factor."""
    lengths, factor = arguments.integers("response_lengths"), arguments.number("overlong_penalty_factor")
    most, buffer = int(arguments.number("max_new_tokens")), arguments.number("overlong_buffer_len")
    return {"rewards": arguments.tensor("rewards") + factor * overlong_penalty(lengths, max_tokens=most, buffer=buffer)}


def openrlhf_stop_properly(arguments: Arguments) -> Outputs:
    """Return the rewards. A coefficient below zero replaces the score of a truncated response."""
    scores, coef = arguments.tensor("rewards"), arguments.number("stop_properly_penalty_coef")
    return {"rewards": torch.where(arguments.mask("truncated"), coef, scores)}


def trl_soft_overlong(arguments: Arguments) -> Outputs:
    most, buffer = int(arguments.number("max_completion_len")), arguments.number("soft_punish_cache")
    return {"rewards": overlong_penalty(arguments.integers("completion_lengths"), max_tokens=most, buffer=buffer)}


def openrlhf_sft_loss(arguments: Arguments) -> Outputs:
    """Return the cross-entropy over the tokens."""
    layout = Layout(arguments.mask("loss_mask"))
    losses = negative_logprob(layout.flat(arguments.tensor("per_token_logps")), layout.mask)
    return {"loss": openrlhf_aggregated(arguments, losses, layout)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("openrlhf", "compute_reward"): openrlhf_reward,
    ("openrlhf", "apply_overlong_penalty"): openrlhf_overlong,
    ("openrlhf", "apply_stop_properly_penalty"): openrlhf_stop_properly,
    ("openrlhf", "SFTLoss.forward"): openrlhf_sft_loss,
    ("trl", "get_soft_overlong_punishment"): trl_soft_overlong,
}
