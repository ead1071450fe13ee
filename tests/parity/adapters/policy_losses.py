"""Policy and value losses of verl and OpenRLHF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rlhf.objectives import corrections, entropy, policy_loss, sequence_ratios, value_loss, weighted_loss
from rlhf.objectives.kl import kl_k1
from rlhf.objectives.masking import masked_mean, sequence_means
from tests.parity.adapters.aggregation import openrlhf_aggregated, shrunk, verl_aggregated, verl_mean, weighted
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout, gradient

MAX_LOG_RATIO = 20.0  # both hold the log-ratio of a token in +-20


class Batch:
    """The flat arguments common to all policy losses of a library."""

    def __init__(self, arguments: Arguments, *, logprobs: str, old: str, mask: str) -> None:
        self.variable = arguments.variable(logprobs)
        self.layout = Layout(arguments.mask_or_all(mask, self.variable.shape))
        self.mask, self.lengths = self.layout.mask, self.layout.lengths
        self.logprobs = self.layout.flat(self.variable)
        self.old = self.layout.flat(arguments.tensor(old))
        self.advantages = self.layout.flat(arguments.tensor("advantages"))
        self.log_ratio = self.logprobs - self.old

    @property
    def ratio(self) -> Tensor:
        """The importance ratio of log-ratios held in +-20."""
        held = self.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return policy_loss.importance_ratio(held, torch.zeros_like(held), self.mask)


class VerlBatch(Batch):
    """With verl's clip range, importance weights and result."""

    def __init__(self, arguments: Arguments, *, legacy: bool = False) -> None:
        super().__init__(arguments, logprobs="log_prob", old="old_log_prob", mask="response_mask")
        arguments.ignore("loss")
        # The registered losses read clip_ratio from a configuration, the legacy function has an argument cliprange.
        name = "cliprange" if legacy else "clip_ratio"
        clip = arguments.number(name, 0.2)
        low, high = (arguments.optional(f"{name}_{side}", clip) for side in ("low", "high"))
        self.clip = {"clip_low": clip if low is None else low, "clip_high": clip if high is None else high}
        weights = arguments.maybe("rollout_is_weights")
        self.weights = torch.ones_like(self.advantages) if weights is None else self.layout.flat(weights)
        self.arguments = arguments

    def outputs(
        self, losses: Tensor, *, mode: str | None = None, **metrics: Tensor | float
    ) -> dict[str, Tensor | float]:
        """Loss, gradient, the KL to the old policy and the given metrics."""
        loss = verl_aggregated(self.arguments, losses * self.weights, self.layout, mode)
        held = self.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return {
            "loss": loss,
            "grad_log_prob": gradient(loss, self.variable),
            "actor/ppo_kl": verl_mean(-held, self.mask),
            **{f"actor/{name}": value for name, value in metrics.items()},
        }

    def fraction(self, tokens: Tensor) -> Tensor:
        """Return verl's mean of a flag over the unmasked tokens."""
        return verl_mean(tokens.double(), self.mask)

    def clip_fraction(self, ratio: Tensor) -> Tensor:
        """Return the fraction of tokens whose gradient the clip stops."""
        low, high = policy_loss.clipped_ratios(ratio, self.advantages, self.mask, **self.clip)
        return self.fraction(low | high)


def verl_vanilla(arguments: Arguments, *, legacy: bool = False) -> Outputs:
    """PPO with dual clip."""
    batch = VerlBatch(arguments, legacy=legacy)
    cap = arguments.number("clip_ratio_c", 3.0)
    columns = (batch.ratio, batch.advantages, batch.mask)
    clipped = policy_loss.clipped_loss(*columns, **batch.clip)
    losses = policy_loss.dual_clipped_loss(*columns, **batch.clip, max_ratio=cap)
    capped = (clipped > -batch.advantages * cap) & (batch.advantages < 0)
    return batch.outputs(losses, pg_clipfrac=batch.clip_fraction(batch.ratio), pg_clipfrac_lower=batch.fraction(capped))


def verl_legacy(arguments: Arguments) -> Outputs:
    """Return the same loss as a plain function, with metrics under their bare names."""
    outputs = verl_vanilla(arguments, legacy=True)
    bare = {name.removeprefix("actor/"): value for name, value in outputs.items()}
    return {**outputs, **bare, "pg_loss": outputs["loss"]}


def verl_gspo(arguments: Arguments) -> Outputs:
    """Always averaged by sequence; the ratio at most e^10."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    ratio = sequence_ratios.sequence_token_ratio(batch.logprobs, batch.old, batch.mask, batch.lengths)
    ratio = ratio.clamp(max=math.exp(10.0))
    losses = policy_loss.clipped_loss(ratio, batch.advantages, batch.mask, **batch.clip)
    outputs = batch.outputs(
        losses, mode="seq-mean-token-mean", pg_clipfrac=batch.clip_fraction(ratio), pg_clipfrac_lower=0.0
    )
    return {**outputs, "actor/ppo_kl": verl_mean(-batch.log_ratio, batch.mask)}


def verl_sapo(arguments: Arguments) -> Outputs:
    """Always averaged by sequence."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    losses = weighted_loss.sapo(
        batch.ratio,
        batch.advantages,
        batch.mask,
        temperature_positive=arguments.number("tau_pos", 1.0),
        temperature_negative=arguments.number("tau_neg", 1.05),
    )
    return batch.outputs(losses, mode="seq-mean-token-mean", pg_clipfrac=0.0, pg_clipfrac_lower=0.0)


def verl_cispo(arguments: Arguments) -> Outputs:
    """The weight is held on both sides."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    low, high = 1 - batch.clip["clip_low"], 1 + batch.clip["clip_high"]
    losses = weighted_loss.cispo(
        batch.ratio, batch.logprobs, batch.advantages, batch.mask, min_ratio=low, max_ratio=high
    )
    held = (batch.ratio < low) | (batch.ratio > high)
    return batch.outputs(losses, pg_clipfrac=batch.fraction(held), pg_clipfrac_lower=0.0)


def verl_dppo(trust: Callable[[VerlBatch], Tensor]) -> Adapter:
    """CISPO without a lower bound, over trusted tokens."""

    def adapter(arguments: Arguments) -> Outputs:
        batch = VerlBatch(arguments)
        cap = arguments.number("clip_ratio_c", 3.0)
        trusted = trust(batch)
        losses = weighted_loss.cispo(
            batch.ratio, batch.logprobs, batch.advantages, trusted, min_ratio=0.0, max_ratio=cap
        )
        return batch.outputs(
            losses,
            pg_clipfrac=batch.fraction(~trusted),
            pg_clipfrac_lower=batch.fraction((batch.ratio > cap) & trusted),
        )

    return adapter


def _trusted_by_tv(batch: VerlBatch) -> Tensor:
    return weighted_loss.trusted_by_tv(
        batch.logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        max_decrease=batch.clip["clip_low"],
        max_increase=batch.clip["clip_high"],
    )


def _trusted_by_kl(batch: VerlBatch) -> Tensor:
    return weighted_loss.trusted_by_kl(
        batch.logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        max_kl_decrease=batch.clip["clip_low"],
        max_kl_increase=batch.clip["clip_high"],
    )


def verl_clip_cov(arguments: Arguments) -> Outputs:
    """Return PPO's loss without the tokens whose covariance lies between two bounds; verl draws some tokens at
    random.
    """
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    nested = Nested(arguments, "policy_loss", {"clip_cov_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0})
    ratio = policy_loss.importance_ratio(batch.logprobs, batch.old, batch.mask)
    columns = (ratio, batch.advantages, batch.mask)
    low, high = policy_loss.clipped_ratios(*columns, **batch.clip)
    covariance = entropy.advantage_covariance(batch.logprobs, batch.advantages, batch.mask)
    bounds = {"low": nested["clip_cov_lb"], "high": nested["clip_cov_ub"]}
    order = torch.arange(len(covariance), dtype=covariance.dtype)
    unclipped = covariance.masked_fill(low | high, -math.inf)  # verl does not draw what the clip has stopped already
    choice = (unclipped, batch.mask, order)
    candidates = entropy.drawn_covariance_tokens(*choice, **bounds, fraction=1.0)
    drawn = entropy.drawn_covariance_tokens(*choice, **bounds, fraction=nested["clip_cov_ratio"])
    if not torch.equal(drawn, candidates):
        raise Unsupported("verl would choose among the candidate tokens at random")
    losses = policy_loss.clipped_loss(*columns, **batch.clip)
    outputs = batch.outputs(torch.where(candidates, 0.0, losses), pg_clipfrac=batch.fraction(candidates))
    return {**outputs, "actor/ppo_kl": verl_mean(-batch.log_ratio, batch.mask)}


def verl_kl_cov(arguments: Arguments) -> Outputs:
    """The unclipped objective, with a KL penalty on the tokens of largest covariance."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    nested = Nested(arguments, "policy_loss", {"kl_cov_ratio": 0.0002, "ppo_kl_coef": 0.1}, nulls={"ppo_kl_coef": 1.0})
    ratio = policy_loss.importance_ratio(batch.logprobs, batch.old, batch.mask)
    losses = policy_loss.clipped_loss(ratio, batch.advantages, batch.mask, clip_low=math.inf, clip_high=math.inf)
    covariance = entropy.advantage_covariance(batch.logprobs, batch.advantages, batch.mask)
    chosen = entropy.top_covariance_tokens(covariance, batch.mask, fraction=nested["kl_cov_ratio"])
    penalty = nested["ppo_kl_coef"] * kl_k1(batch.logprobs, batch.old).abs()
    outputs = batch.outputs(losses + torch.where(chosen, penalty, 0.0))
    return {**outputs, "actor/ppo_kl": verl_mean(batch.log_ratio.abs(), batch.mask)}


class Nested:
    """A parameter with an object of numbers: `defaults` for missing numbers, `nulls` (else defaults) for null."""

    def __init__(
        self, arguments: Arguments, name: str, defaults: dict[str, float], nulls: Mapping[str, float] | None = None
    ) -> None:
        given = arguments.param(name, {})
        if not isinstance(given, dict) or not given.keys() <= defaults.keys():
            raise Unsupported(f"{name} is {given!r}")
        of_null = {**defaults, **(nulls or {})}
        self._values = {**defaults, **{key: of_null[key] if value is None else value for key, value in given.items()}}

    def __getitem__(self, key: str) -> float:
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Unsupported(f"{key} is {value!r}, not a number")
        return value


def verl_geo_mean(arguments: Arguments) -> Outputs:
    """Return GMPO's loss: a plain mean over the rows under any aggregation."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c", "loss_agg_mode")
    arguments.ignore("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor", "global_batch_info")
    shrink = shrunk(batch.layout, batch.logprobs)  # verl divides each sequence's mean by n + 1e-8
    ratio = sequence_ratios.geometric_mean_ratio(
        batch.logprobs, batch.old, batch.advantages, batch.mask, batch.lengths, **batch.clip
    )
    log_weights = sequence_means((batch.weights + 1e-10).log(), batch.mask, batch.lengths)
    weights = (
        1.0 if arguments.maybe("rollout_is_weights") is None else (batch.layout.spread(log_weights) * shrink).exp()
    )
    losses = torch.where(batch.mask, -(ratio**shrink) * batch.advantages * shrink * weights, 0.0)
    rows = len(batch.lengths)
    loss = weighted(losses, batch.layout, "sequence_mean_token_mean", num_tokens=1.0, num_sequences=rows)
    clipped = batch.log_ratio != batch.log_ratio.clamp(-batch.clip["clip_low"], batch.clip["clip_high"])
    return {
        "loss": loss,
        "grad_log_prob": gradient(loss, batch.variable),
        "actor/ppo_kl": verl_mean(-batch.log_ratio, batch.mask),
        "actor/pg_clipfrac": batch.fraction(clipped & (batch.advantages > 0)),
        "actor/pg_clipfrac_lower": batch.fraction(clipped & (batch.advantages < 0)),
    }


def verl_dro(arguments: Arguments) -> Outputs:
    """A quadratic penalty on the log-ratio."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    beta = Nested(arguments, "policy_loss", {"dro_beta": math.nan})["dro_beta"]
    losses = weighted_loss.dro(batch.logprobs, batch.old, batch.advantages, batch.mask, beta=beta)
    return {**batch.outputs(losses), "actor/ppo_kl": verl_mean(-batch.log_ratio, batch.mask)}


def verl_reinforce(arguments: Arguments) -> Outputs:
    """The old policy only enters a metric."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    losses = policy_loss.reinforce(batch.logprobs, batch.advantages, batch.mask)
    mode = arguments.param("loss_agg_mode", "seq-mean-token-sum")
    return {**batch.outputs(losses, mode=mode), "actor/ppo_kl": verl_mean(-batch.log_ratio, batch.mask)}


def verl_gpg(arguments: Arguments) -> Outputs:
    """REINFORCE, without metrics."""
    batch = VerlBatch(arguments)
    arguments.ignore("clip_ratio_c")
    outputs = batch.outputs(policy_loss.reinforce(batch.logprobs, batch.advantages, batch.mask))
    return {key: outputs[key] for key in ("loss", "grad_log_prob")}


def verl_value_loss(arguments: Arguments) -> Outputs:
    """Half the larger squared error."""
    layout = Layout(arguments.mask("response_mask"))
    values = arguments.variable("vpreds")
    old_values, returns = arguments.tensor("values"), arguments.tensor("returns")
    columns = (*(layout.flat(column) for column in (values, old_values, returns)), layout.mask)
    clip = arguments.number("cliprange_value")
    loss = verl_aggregated(arguments, value_loss.clipped_value_loss(*columns, clip=clip), layout)
    clipped = value_loss.clipped_values(*columns, clip=clip)
    fraction = verl_mean(clipped.double(), layout.mask)
    return {"loss": loss, "clipfrac": fraction, "grad_vpreds": gradient(loss, values)}


def openrlhf_value_loss(arguments: Arguments) -> Outputs:
    """Without clip_eps the plain squared error."""
    values = arguments.variable("values")
    layout = Layout(arguments.mask_or_all("action_mask", values.shape))
    flat, returns = layout.flat(values), layout.flat(arguments.tensor("returns"))
    old_values = layout.flat(arguments.tensor("old_values"))
    clip = arguments.optional("clip_eps")
    if clip is None:
        losses = value_loss.value_loss(flat, returns, layout.mask)
    else:
        losses = value_loss.clipped_value_loss(flat, old_values, returns, layout.mask, clip=clip)
    loss = openrlhf_aggregated(arguments, losses, layout)
    return {"loss": loss, "grad_values": gradient(loss, values)}


def openrlhf_policy_loss(arguments: Arguments) -> Outputs:
    """PPO or GSPO, dual clip or not, three corrections for the sampler."""
    batch = Batch(arguments, logprobs="log_probs", old="old_log_probs", mask="action_mask")
    kind = arguments.choice("policy_loss_type", {"ppo": "ppo", "gspo": "gspo"}, "ppo")
    corrected = arguments.flag("enable_vllm_is_correction", False)
    rollout = arguments.maybe("rollout_log_probs")
    clip = {"clip_low": arguments.number("clip_eps_low", 0.2), "clip_high": arguments.number("clip_eps_high", 0.2)}
    cap = arguments.optional("dual_clip")
    if corrected and rollout is None:
        raise Unsupported("a correction without rollout_log_probs")
    flat_rollout = batch.old if rollout is None else batch.layout.flat(rollout)
    if kind == "ppo":
        ratio = batch.ratio
    else:
        start = flat_rollout if corrected else batch.old
        ratio = sequence_ratios.sequence_ratio(batch.logprobs, start, batch.mask, batch.lengths)
    columns = (ratio, batch.advantages, batch.mask)
    if cap is None:
        losses = policy_loss.clipped_loss(*columns, **clip)
    else:
        losses = policy_loss.dual_clipped_loss(*columns, **clip, max_ratio=cap)
    metrics = {}
    weights = openrlhf_correction(arguments, batch, flat_rollout, used=corrected and kind == "ppo")
    if corrected and kind == "ppo":
        losses = losses * weights
        metrics["vllm_kl"] = masked_mean(kl_k1(flat_rollout, batch.old), batch.mask)
    loss = openrlhf_aggregated(arguments, losses, batch.layout, per_token=False if kind == "gspo" else None)
    low, high = policy_loss.clipped_ratios(*columns, **clip)
    flags = (low | high).to(torch.float64 if arguments.has("action_mask") else torch.float32)
    return {
        "loss": loss,
        "grad_log_probs": gradient(loss, batch.variable),
        "clip_ratio": masked_mean(flags, batch.mask),
        "ppo_kl": masked_mean(-batch.log_ratio, batch.mask),
        **metrics,
    }


def openrlhf_correction(arguments: Arguments, batch: Batch, rollout: Tensor, *, used: bool) -> Tensor:
    """Return the weights by which OpenRLHF multiplies the PPO loss."""
    kind = arguments.choice("vllm_is_correction_type", {k: k for k in ("tis", "icepop", "seq-mask-tis")}, "tis")
    bounds = arguments.param("vllm_is_truncated_threshold", None)
    if not used:
        return torch.ones_like(batch.old)
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise Unsupported(f"vllm_is_truncated_threshold {bounds!r}")
    low, high = (float(bound) for bound in bounds)
    columns = (batch.old, rollout, batch.mask)
    ratio = corrections.token_ratio(*columns)
    if kind == "tis":
        return corrections.truncated(ratio, batch.mask, min_ratio=low, max_ratio=high)
    if kind == "icepop":
        return corrections.masked(ratio, batch.mask, min_ratio=low, max_ratio=high)
    mean = sequence_means(batch.old - rollout, batch.mask, batch.lengths).exp()
    kept = corrections.kept(batch.layout.spread(mean), batch.mask, low=low, high=high)
    return torch.where(kept, ratio, 0.0)


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_policy_loss"): verl_legacy,
    ("verl", "compute_policy_loss_vanilla"): verl_vanilla,
    ("verl", "compute_policy_loss_gspo"): verl_gspo,
    ("verl", "compute_policy_loss_sapo"): verl_sapo,
    ("verl", "compute_policy_loss_cispo"): verl_cispo,
    ("verl", "compute_policy_loss_dppo_tv"): verl_dppo(_trusted_by_tv),
    ("verl", "compute_policy_loss_dppo_kl"): verl_dppo(_trusted_by_kl),
    ("verl", "compute_policy_loss_clip_cov"): verl_clip_cov,
    ("verl", "compute_policy_loss_kl_cov"): verl_kl_cov,
    ("verl", "compute_policy_loss_geo_mean"): verl_geo_mean,
    ("verl", "compute_policy_loss_dro"): verl_dro,
    ("verl", "compute_policy_loss_reinforce"): verl_reinforce,
    ("verl", "compute_policy_loss_gpg"): verl_gpg,
    ("verl", "compute_value_loss"): verl_value_loss,
    ("openrlhf", "ValueLoss.forward"): openrlhf_value_loss,
    ("openrlhf", "PolicyLoss.forward"): openrlhf_policy_loss,
}
