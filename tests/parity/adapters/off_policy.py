"""Corrections for samples of another policy in AReaL, OpenRLHF 0.11.2, SkyRL, ROLL, vime, NeMo-RL and KONASH."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf.objectives import advantages, corrections, policy_loss, weighted_loss
from rlhf.objectives.logprobs import chunked_logprobs, renormalised
from rlhf.objectives.masking import sequence_counts
from tests.parity.adapters.aggregation import openrlhf_aggregated
from tests.parity.adapters.policy_losses import Batch
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, gradient


def areal_m2po(arguments: Arguments) -> Outputs:
    """Return AReaL's mask of the tokens within the second moment."""
    mask = arguments.mask("loss_mask")
    old, rollout = arguments.tensor("prox_logp")[mask], arguments.tensor("old_logp")[mask]
    kept = corrections.within_second_moment(old, rollout, limit=arguments.number("m2_threshold"))
    return {"mask": torch.zeros_like(mask).masked_scatter(mask, kept)}


def openrlhf_trust_region(arguments: Arguments) -> Outputs:
    """Return PPO's loss over tokens or responses within the binary KL, with the ratio to the sampler as a weight."""
    batch = Batch(arguments, logprobs="log_probs", old="old_log_probs", mask="action_mask")
    rollout, cap = batch.layout.flat(arguments.tensor("rollout_log_probs")), arguments.optional("dual_clip")
    is_token = arguments.param("is_correction_level") == "token"
    keep = corrections.accepted(
        batch.old,
        rollout,
        batch.mask,
        batch.lengths,
        statistic="binary_kl",
        level="token" if is_token else "sequence_mean",
        low=-math.inf,
        high=arguments.number("is_correction_threshold"),
    )
    columns = (batch.ratio, batch.advantages, batch.mask)
    if cap is None:
        losses = policy_loss.clipped_loss(*columns, clip_low=0.2, clip_high=0.2)
    else:
        losses = policy_loss.dual_clipped_loss(*columns, clip_low=0.2, clip_high=0.2, max_ratio=cap)
    weights = corrections.token_ratio(batch.old, rollout, batch.mask).where(keep, 0.0)
    loss = openrlhf_aggregated(arguments, losses * weights, batch.layout)
    kept = keep[batch.mask] if is_token else sequence_counts(keep, batch.lengths) > 0
    return {"loss": loss, "grad_log_probs": gradient(loss, batch.variable), "is_filter_ratio": 1 - kept.double().mean()}


def openrlhf_advantages(arguments: Arguments) -> Outputs:
    """Return FlashREINFORCE's advantages of the tokens, which are also the returns."""
    assert arguments.param("estimator") == "flash_reinforce"
    arguments.ignore("n_samples_per_prompt")  # the baseline is the mean of all responses
    centered = advantages.batch_centered(arguments.tensor("rewards"))
    tokens = torch.where(arguments.mask("action_mask"), centered[:, None], 0.0)
    return {"advantages": tokens, "returns": tokens}


def skyrl_dppo(arguments: Arguments) -> Outputs:
    """Return the gradient of DPPO's loss, summed over the tokens. The old policy is the sampler."""
    batch = Batch(arguments, logprobs="log_probs", old="rollout_logprobs", mask="loss_mask")
    columns = (batch.logprobs, batch.old, batch.advantages, batch.mask)
    low, high = arguments.number("delta_low"), arguments.number("delta_high")
    if arguments.param("dppo_type") == "binary_kl":
        trusted = weighted_loss.trusted_by_kl(*columns, max_kl_decrease=low, max_kl_increase=high)
    else:
        trusted = weighted_loss.trusted_by_tv(*columns, max_decrease=low, max_increase=high)
    columns = (batch.ratio, batch.logprobs, batch.advantages, trusted)
    loss = weighted_loss.cispo(*columns, min_ratio=0.0, max_ratio=math.inf).sum()
    return {"grad_log_probs": gradient(loss, batch.variable), "clip_ratio": (~trusted)[batch.mask].double().mean()}


def roll_topr(arguments: Arguments) -> Outputs:
    """Return TOPR's loss of each token, with the token's ratio. The sign is the advantage's, in ROLL the score's."""
    batch = Batch(arguments, logprobs="log_probs", old="old_log_probs", mask="response_mask")
    weights: Tensor = weighted_loss.tapered(batch.ratio, batch.advantages, batch.mask)
    losses = policy_loss.reinforce(batch.logprobs, weights * batch.advantages, batch.mask)
    return {"topr_loss": batch.layout.padded(losses), "grad_log_probs": gradient(losses.sum(), batch.variable)}


def vime_score_centering(arguments: Arguments) -> Outputs:
    """Return the centering term of each row at advantage 1. vime computes in float32."""
    train, sampler = arguments.variable("train_head_logp"), arguments.tensor("sampler_head_logp")
    mode, ones = arguments.param("mode"), torch.ones(len(train), dtype=torch.bool)
    low, high = arguments.optional("low"), arguments.optional("high")

    def weigh(ratio: Tensor) -> Tensor:
        if mode == "none":
            return torch.ones_like(ratio)
        weighted = {"tis": corrections.truncated, "mis": corrections.masked}[mode]
        mask = torch.ones_like(ratio, dtype=torch.bool)
        return weighted(ratio, mask, min_ratio=low or 0.0, max_ratio=math.inf if high is None else high)

    terms = corrections.score_centering(train, sampler, torch.ones_like(ones, dtype=train.dtype), ones, weigh=weigh)
    return {"correction": terms, "grad_train_head_logp": gradient(terms.sum(), train)}


def skyrl_support(arguments: Arguments) -> Outputs:
    """Return the log-probabilities over the kept tokens. Ids of -1 pad a row, and a row of padding alone gets 0."""
    hidden, ids = arguments.variable("logits_or_hidden"), arguments.integers("support_ids")
    is_head = arguments.has("lm_head_weight")  # without a head, the inputs are logits
    weight = arguments.tensor("lm_head_weight") if is_head else torch.eye(hidden.shape[1], dtype=hidden.dtype)
    targets = torch.cat([arguments.integers("sampled_ids")[:, None], ids.clamp(min=0)], dim=1)
    temperature = arguments.number("temperature") if is_head else 1.0
    columns, _ = chunked_logprobs(hidden, weight, targets, temperature=temperature)
    logprobs = renormalised(columns, ids >= 0, (ids >= 0).any(1))
    return {"logprobs": logprobs, "grad_logits_or_hidden": gradient(logprobs.sum(), hidden)}


def konash_oapl(arguments: Arguments) -> Outputs:
    """Return OAPL's mean loss of sequences, and the value of each group, a sum over the group in KONASH, not a mean."""
    scores, size = arguments.tensor("rewards"), int(arguments.number("group_size"))
    temperature, ones = arguments.number("beta_value"), torch.ones(len(scores), dtype=torch.int64)
    above = temperature * math.log(size)
    settings: Any = {"group_size": size, "temperature": temperature}
    targets = advantages.soft_value_centered(scores, **settings) - above
    kept = arguments.mask("mask", ones.bool())
    columns = (arguments.tensor("log_probs"), arguments.tensor("ref_log_probs"), targets, kept, ones)
    losses = weighted_loss.advantage_regression(*columns, beta=arguments.number("beta_kl"))
    return {"loss": losses.sum() / kept.sum(), "values": advantages.soft_values(scores, **settings) + above}


def nemo_oapl_advantages(arguments: Arguments) -> Outputs:
    settings: Any = {"group_size": int(arguments.number("group_size")), "temperature": arguments.number("vstar_beta")}
    return {"advantages": advantages.soft_value_centered(arguments.tensor("rewards"), **settings)}


def nemo_oapl_loss(arguments: Arguments) -> Outputs:
    """Return OAPL's mean loss over the valid samples. All columns but the policy's begin with the prompt's token."""
    mask = arguments.mask("token_mask")[:, 1:] & arguments.mask("sample_mask")[:, None]
    layout = Layout(mask)
    rest = (arguments.tensor(name)[:, 1:] for name in ("generation_logprobs", "advantages"))
    columns = [layout.flat(column) for column in (arguments.tensor("curr_logprobs"), *rest)]
    losses = weighted_loss.advantage_regression(
        *columns, layout.mask, layout.lengths, beta=arguments.number("policy_beta")
    )
    return {"loss": losses.sum() / arguments.mask("sample_mask").sum()}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("areal", "_apply_m2po_masking"): areal_m2po,
    ("openrlhf_0112", "PolicyLoss.forward"): openrlhf_trust_region,
    ("openrlhf_0112", "RemoteExperienceMaker.compute_advantages_and_returns"): openrlhf_advantages,
    ("skyrl", "dppo_policy_loss"): skyrl_dppo,
    ("skyrl", "sample_support_logprobs"): skyrl_support,
    ("roll", "ActorWorker._compute_topr_loss"): roll_topr,
    ("vime", "score_centering_correction"): vime_score_centering,
    ("konash", "OAPLTrainer.compute_loss"): konash_oapl,
    ("nemo_rl", "OAPLAdvantageEstimator.compute_advantage"): nemo_oapl_advantages,
    ("nemo_rl", "OAPLLossFn.__call__"): nemo_oapl_loss,
}
