"""Policy and value losses of verl and OpenRLHF. Both also hold log-ratios in +-20, further than those of any case."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.objectives import corrections, entropy, policy_loss, sequence_ratios, value_loss, weighted_loss
from rlhf.objectives.kl import kl_k1
from rlhf.objectives.masking import sequence_means
from tests.parity.adapters.aggregation import openrlhf_aggregated, shrunk, verl_aggregated, verl_mean, weighted
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, gradient


class Batch:
    """The flat arguments common to all policy losses of a library."""

    def __init__(self, arguments: Arguments, *, logprobs: str, old: str, mask: str) -> None:
        self.arguments, self.variable = arguments, arguments.variable(logprobs)
        self.layout = Layout(arguments.mask(mask))
        self.mask, self.lengths = self.layout.mask, self.layout.lengths
        flat = self.layout.flat
        self.logprobs, self.old = flat(self.variable), flat(arguments.tensor(old))
        self.advantages = flat(arguments.tensor("advantages"))
        self.log_ratio = self.logprobs - self.old
        self.ratio = policy_loss.importance_ratio(self.logprobs, self.old, self.mask)

    def clip_fractions(self, ratio: Tensor, clip: Mapping[str, float]) -> Tensor:
        low, high = policy_loss.clipped_ratios(ratio, self.advantages, self.mask, **clip)
        return low | high


class VerlBatch(Batch):
    """With verl's clip range. Registered losses read clip_ratio from a configuration, the legacy function cliprange."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments, logprobs="log_prob", old="old_log_prob", mask="response_mask")
        arguments.ignore("loss", "clip_ratio_c")
        name = "cliprange" if "cliprange" in arguments.case.params else "clip_ratio"
        clip = arguments.number(name, 0.2)
        self.low, self.high = (arguments.number(f"{name}_{side}", clip) for side in ("low", "high"))
        self.clip = {"clip_low": self.low, "clip_high": self.high}
        self.columns = (self.ratio, self.advantages, self.mask)
        self.cap = arguments.number("clip_ratio_c", 3.0)


Losses = tuple[Tensor, dict[str, Tensor]]  # of each token, and flags whose fractions verl logs


def verl(loss_of: Callable[[VerlBatch], Losses], *, mode: str | None = None) -> Adapter:
    """Return the adapter of a loss: with the gradient, and metrics as registered losses and as functions name them.

    `mode`: the only aggregation of the loss.
    """

    def adapter(arguments: Arguments) -> Outputs:
        batch = VerlBatch(arguments)
        losses, flags = loss_of(batch)
        weights = arguments.maybe("rollout_is_weights")
        losses = losses if weights is None else losses * batch.layout.flat(weights)
        loss = verl_aggregated(arguments, losses, batch.layout, mode)
        metrics = {"pg_clipfrac_lower": torch.tensor(0.0), "ppo_kl": verl_mean(-batch.log_ratio, batch.mask)}
        metrics |= {name: verl_mean(flag.double(), batch.mask) for name, flag in flags.items()}
        named = {f"actor/{name}": value for name, value in metrics.items()}
        return {"loss": loss, "pg_loss": loss, "grad_log_prob": gradient(loss, batch.variable), **metrics, **named}

    return adapter


def vanilla(batch: VerlBatch) -> Losses:
    """Return PPO's loss with the dual clip."""
    losses = policy_loss.dual_clipped_loss(*batch.columns, **batch.clip, max_ratio=batch.cap)
    clipped = policy_loss.clipped_loss(*batch.columns, **batch.clip)
    capped = (clipped > -batch.advantages * batch.cap) & (batch.advantages < 0)
    return losses, {"pg_clipfrac": batch.clip_fractions(batch.ratio, batch.clip), "pg_clipfrac_lower": capped}


def gspo(batch: VerlBatch) -> Losses:
    ratio = sequence_ratios.sequence_token_ratio(batch.logprobs, batch.old, batch.mask, batch.lengths)
    losses = policy_loss.clipped_loss(ratio, batch.advantages, batch.mask, **batch.clip)
    return losses, {"pg_clipfrac": batch.clip_fractions(ratio, batch.clip)}


def sapo(batch: VerlBatch) -> Losses:
    positive, negative = batch.arguments.number("tau_pos", 1.0), batch.arguments.number("tau_neg", 1.05)
    losses = weighted_loss.sapo(*batch.columns, temperature_positive=positive, temperature_negative=negative)
    return losses, {"pg_clipfrac": torch.zeros_like(batch.mask)}


def cispo(batch: VerlBatch) -> Losses:
    """Return the loss with a weight held on both sides."""
    ratio, low, high = batch.ratio, 1 - batch.low, 1 + batch.high
    columns = (ratio, batch.logprobs, batch.advantages, batch.mask)
    losses = weighted_loss.cispo(*columns, min_ratio=low, max_ratio=high)
    return losses, {"pg_clipfrac": (ratio < low) | (ratio > high)}


def dppo(kind: str) -> Adapter:
    """CISPO without a lower bound, over trusted tokens."""

    def loss_of(batch: VerlBatch) -> Losses:
        columns: Any = (batch.logprobs, batch.old, batch.advantages, batch.mask)
        if kind == "tv":
            trusted = weighted_loss.trusted_by_tv(*columns, max_decrease=batch.low, max_increase=batch.high)
        else:
            trusted = weighted_loss.trusted_by_kl(*columns, max_kl_decrease=batch.low, max_kl_increase=batch.high)
        columns = (batch.ratio, batch.logprobs, batch.advantages, trusted)
        losses = weighted_loss.cispo(*columns, min_ratio=0.0, max_ratio=batch.cap)
        return losses, {"pg_clipfrac": ~trusted, "pg_clipfrac_lower": (batch.ratio > batch.cap) & trusted}

    return verl(loss_of)


def clip_cov(batch: VerlBatch) -> Losses:
    """Return PPO's loss without the tokens whose covariance lies between two bounds, unless the clip has stopped them.

    verl draws some of the tokens at random; the stored case takes all.
    """
    settings, mask = batch.arguments.param("policy_loss"), batch.mask
    covariance = entropy.advantage_covariance(batch.logprobs[mask], batch.advantages[mask])
    covariance = covariance.masked_fill(batch.clip_fractions(batch.ratio, batch.clip)[mask], -math.inf)
    bounds = {"low": settings["clip_cov_lb"], "high": settings["clip_cov_ub"], "fraction": settings["clip_cov_ratio"]}
    drawn = entropy.drawn_covariance_tokens(covariance, torch.zeros_like(covariance), **bounds)
    dropped = torch.zeros_like(mask).masked_scatter(mask, drawn)
    losses = policy_loss.clipped_loss(*batch.columns, **batch.clip)
    return torch.where(dropped, 0.0, losses), {"pg_clipfrac": dropped}


def kl_cov(batch: VerlBatch) -> Losses:
    """The unclipped objective, with a KL penalty on the tokens of largest covariance."""
    settings, mask = batch.arguments.param("policy_loss"), batch.mask
    losses = policy_loss.clipped_loss(*batch.columns, clip_low=math.inf, clip_high=math.inf)
    covariance = entropy.advantage_covariance(batch.logprobs[mask], batch.advantages[mask])
    top = entropy.top_covariance_tokens(covariance, fraction=settings["kl_cov_ratio"])
    chosen = torch.zeros_like(mask).masked_scatter(mask, top)
    penalty = settings["ppo_kl_coef"] * kl_k1(batch.logprobs, batch.old).abs()
    return losses + torch.where(chosen, penalty, 0.0), {"ppo_kl": batch.log_ratio.abs()}


def dro(batch: VerlBatch) -> Losses:
    beta = batch.arguments.param("policy_loss")["dro_beta"]
    return weighted_loss.dro(batch.logprobs, batch.old, batch.advantages, batch.mask, beta=beta), {}


def reinforce(batch: VerlBatch) -> Losses:
    """Return the loss without old log-probabilities, which only a metric uses."""
    return policy_loss.reinforce(batch.logprobs, batch.advantages, batch.mask), {}


def geo_mean(arguments: Arguments) -> Outputs:
    """Return GMPO's loss: a plain mean over the rows under any aggregation. verl divides by n + 1e-8 of each."""
    batch = VerlBatch(arguments)
    arguments.ignore("loss_agg_mode")
    shrink, columns = shrunk(batch.layout, batch.logprobs), (batch.advantages, batch.mask, batch.lengths)
    ratio = sequence_ratios.geometric_mean_ratio(batch.logprobs, batch.old, *columns, **batch.clip)
    losses = torch.where(batch.mask, -(ratio**shrink) * batch.advantages * shrink, 0.0)
    loss = weighted(losses, batch.layout, "sequence_mean_token_mean", 1.0, len(batch.lengths))
    clipped = batch.log_ratio != batch.log_ratio.clamp(-batch.low, batch.high)
    return {
        "loss": loss,
        "grad_log_prob": gradient(loss, batch.variable),
        "actor/ppo_kl": verl_mean(-batch.log_ratio, batch.mask),
        "actor/pg_clipfrac": verl_mean((clipped & (batch.advantages > 0)).double(), batch.mask),
        "actor/pg_clipfrac_lower": verl_mean((clipped & (batch.advantages < 0)).double(), batch.mask),
    }


def verl_value_loss(arguments: Arguments) -> Outputs:
    """Return half the larger squared error."""
    values, layout = arguments.variable("vpreds"), Layout(arguments.mask("response_mask"))
    padded = (values, arguments.tensor("values"), arguments.tensor("returns"))
    columns, clip = (*map(layout.flat, padded), layout.mask), arguments.number("cliprange_value")
    loss = verl_aggregated(arguments, value_loss.clipped_value_loss(*columns, clip=clip), layout)
    fraction = verl_mean(value_loss.clipped_values(*columns, clip=clip).double(), layout.mask)
    return {"loss": loss, "clipfrac": fraction, "grad_vpreds": gradient(loss, values)}


def openrlhf_value_loss(arguments: Arguments) -> Outputs:
    values, layout = arguments.variable("values"), Layout(arguments.mask("action_mask"))
    padded = (values, arguments.tensor("old_values"), arguments.tensor("returns"))
    clip = arguments.number("clip_eps")
    losses = value_loss.clipped_value_loss(*map(layout.flat, padded), layout.mask, clip=clip)
    loss = openrlhf_aggregated(arguments, losses, layout)
    return {"loss": loss, "grad_values": gradient(loss, values)}


def openrlhf_policy_loss(arguments: Arguments) -> Outputs:
    """PPO or GSPO, dual clip or not, three corrections for the sampler."""
    batch = Batch(arguments, logprobs="log_probs", old="old_log_probs", mask="action_mask")
    is_gspo = arguments.param("policy_loss_type", "ppo") == "gspo"
    rollout = batch.layout.flat(arguments.tensor("rollout_log_probs"))
    clip = {side: arguments.number(f"clip_eps_{side.removeprefix('clip_')}", 0.2) for side in ("clip_low", "clip_high")}
    cap, ratio = arguments.optional("dual_clip"), batch.ratio
    if is_gspo:
        ratio = sequence_ratios.sequence_ratio(batch.logprobs, batch.old, batch.mask, batch.lengths)
    columns = (ratio, batch.advantages, batch.mask)
    if cap is None:
        losses = policy_loss.clipped_loss(*columns, **clip)
    else:
        losses = policy_loss.dual_clipped_loss(*columns, **clip, max_ratio=cap)
    if arguments.param("enable_vllm_is_correction", False):
        losses = losses * openrlhf_correction(arguments, batch, rollout)
    loss = openrlhf_aggregated(arguments, losses, batch.layout, by_sequence=is_gspo)
    return {
        "loss": loss,
        "grad_log_probs": gradient(loss, batch.variable),
        "clip_ratio": batch.clip_fractions(ratio, clip)[batch.mask].double().mean(),
        "ppo_kl": -batch.log_ratio[batch.mask].mean(),
        "vllm_kl": kl_k1(rollout, batch.old)[batch.mask].mean(),
    }


def openrlhf_correction(arguments: Arguments, batch: Batch, rollout: Tensor) -> Tensor:
    """Return the weights by which OpenRLHF multiplies the PPO loss."""
    kind = arguments.param("vllm_is_correction_type", "tis")
    low, high = arguments.param("vllm_is_truncated_threshold")
    ratio = corrections.token_ratio(batch.old, rollout, batch.mask)
    if kind != "seq-mask-tis":
        weigh = {"tis": corrections.truncated, "icepop": corrections.masked}[kind]
        return weigh(ratio, batch.mask, min_ratio=low, max_ratio=high)
    mean = sequence_means(batch.old - rollout, batch.mask, batch.lengths).exp()
    return torch.where(corrections.kept(batch.layout.spread(mean), batch.mask, low=low, high=high), ratio, 0.0)


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_policy_loss"): verl(vanilla),
    ("verl", "compute_policy_loss_vanilla"): verl(vanilla),
    ("verl", "compute_policy_loss_gspo"): verl(gspo, mode="seq-mean-token-mean"),
    ("verl", "compute_policy_loss_sapo"): verl(sapo, mode="seq-mean-token-mean"),
    ("verl", "compute_policy_loss_cispo"): verl(cispo),
    ("verl", "compute_policy_loss_dppo_tv"): dppo("tv"),
    ("verl", "compute_policy_loss_dppo_kl"): dppo("kl"),
    ("verl", "compute_policy_loss_clip_cov"): verl(clip_cov),
    ("verl", "compute_policy_loss_kl_cov"): verl(kl_cov),
    ("verl", "compute_policy_loss_geo_mean"): geo_mean,
    ("verl", "compute_policy_loss_dro"): verl(dro),
    ("verl", "compute_policy_loss_reinforce"): verl(reinforce),
    ("verl", "compute_value_loss"): verl_value_loss,
    ("openrlhf", "ValueLoss.forward"): openrlhf_value_loss,
    ("openrlhf", "PolicyLoss.forward"): openrlhf_policy_loss,
}
