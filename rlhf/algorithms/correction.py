"""Configure and compute the correction of tokens sampled by other kernels or older weights than the trained policy's.

The correction is a factor for each token's policy loss. A rejected or masked token has factor 0 and still counts in the
denominator of the step's loss: a denominator of local tokens would depend on micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import AfterValidator, Field, model_validator

from rlhf.algorithms.microbatch import Correction, PolicyMicrobatch, Surrogate
from rlhf.deferred import Bool, Tensor, torch
from rlhf.objectives import corrections, policy_loss
from rlhf.sections import NotWith, Section

Bounds = tuple[float | None, float | None]
_CENTERS = "only the plain policy gradient has a score to center"
_NO_OLD = "the trainer's log-probabilities of the whole step are not computed before its update"
Preset = Literal[
    "token_tis",
    "sequence_tis",
    "sequence_mis",
    "icepop",
    "m2po",
    "binary_trust_region",
    "score_centering",
    "geo_rs",
    "geo_rs_token_tis",
    "k3_rs",
    "k3_rs_token_tis",
    "bypass_clip",
    "bypass_clip_geo_rs",
    "bypass_clip_k3_rs",
    "bypass_pg_is",
    "bypass_pg_geo_rs",
    "bypass_pg_geo_rs_token_tis",
]


def _check_bounds(neutral: float, bounds: Bounds) -> Bounds:
    low, high = bounds
    if low is None and high is None:
        raise ValueError("both bounds are null, so nothing is rejected; give one bound, or write null for the pair")
    if (low is not None and low >= neutral) or (high is not None and high <= neutral):
        raise ValueError(
            f"got {list(bounds)}, expected [low, high] with low < {neutral:g} < high: {neutral:g} is where sampler and "
            "trainer agree, and that would be rejected"
        )
    return bounds


RatioBounds = Annotated[Bounds, AfterValidator(lambda bounds: _check_bounds(1.0, bounds))]
LogBounds = Annotated[Bounds, AfterValidator(lambda bounds: _check_bounds(0.0, bounds))]
UpperBound = Annotated[float, Field(gt=0.0)]


class RejectConfig(Section):
    """Bounds outside of which a token, or each token of a response, is left out of the policy loss. A token must
    satisfy all given bounds. r is exp(logp_old - logp_rollout), or exp(logp - logp_rollout) unless the mode is
    decoupled. k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r, binary_kl = KL(sampler || policy) of {token, all
    other tokens}. A null bound disables the test."""

    token_ratio: RatioBounds | None = None
    """[low, high] of r; rejects the token."""
    geometric_mean_ratio: RatioBounds | None = None
    """[low, high] of the geometric mean of a response's r."""
    sequence_ratio: RatioBounds | None = None
    """[low, high] of the product of a response's r."""
    sequence_max_ratio: RatioBounds | None = None
    """[low, high] for each r of a response."""
    token_k1: LogBounds | None = None
    """[low, high] of k1 in nats; rejects the token."""
    sequence_mean_k1: LogBounds | None = None
    """[low, high] of the mean k1 of a response."""
    sequence_sum_k1: LogBounds | None = None
    """[low, high] of a response's summed k1."""
    sequence_max_k1: LogBounds | None = None
    """[low, high] for each k1 of a response."""
    token_k2: UpperBound | None = None
    """Largest k2 in nats; rejects the token."""
    sequence_mean_k2: UpperBound | None = None
    """Largest mean k2 of a response."""
    sequence_sum_k2: UpperBound | None = None
    """Largest sum of a response's k2."""
    sequence_max_k2: UpperBound | None = None
    """Largest k2 of any token of a response."""
    token_k3: UpperBound | None = None
    """Largest k3 in nats; rejects the token."""
    sequence_mean_k3: UpperBound | None = None
    """Largest mean k3 of a response."""
    sequence_sum_k3: UpperBound | None = None
    """Largest sum of a response's k3."""
    sequence_max_k3: UpperBound | None = None
    """Largest k3 of any token of a response."""
    token_binary_kl: UpperBound | None = None
    """Largest binary_kl in nats; rejects the token."""
    sequence_mean_binary_kl: UpperBound | None = None
    """Largest mean binary_kl of a response."""

    @property
    def bounds(self) -> Mapping[str, Bounds]:
        """Return the bounds in effect, by key."""
        return {key: value if isinstance(value, tuple) else (None, value) for key, value in self if value is not None}


class CorrectionConfig(Section):
    """Correction of the gap between rollout engine and trainer."""

    preset: Preset | None = None
    """A named combination of the keys below (docs/algorithms.md has the table). Explicit keys override the preset. The
    resolved configuration shows all values in effect."""
    mode: Literal["decoupled", "bypass", "policy_gradient"] = "decoupled"
    """decoupled: the trainer computes old_logprobs, the clip acts on exp(logp - logp_old), weights and rejections on
    exp(logp_old - logp_rollout). bypass: the rollout's log-probabilities replace old_logprobs, and the clip acts on
    exp(logp - logp_rollout). policy_gradient: as bypass, without the clip: the loss is -weight * advantage * logp."""
    weights: Annotated[
        Literal["token_truncated", "token_masked", "sequence_truncated", "sequence_masked"] | None,
        NotWith("mode", "bypass", because="the clipped ratio already compares policy and sampler"),
    ] = None
    """Weight of a token's policy loss: the token's ratio, or the product of its response's ratios. truncated: clipped
    to the bounds (truncated importance sampling). masked: 0 outside of the bounds (IcePop). null: 1."""
    max_ratio: Annotated[float, NotWith("weights", None)] = Field(default=2.0, gt=1.0)
    """Upper bound of the weight."""
    min_ratio: Annotated[float, NotWith("weights", None)] = Field(default=0.0, ge=0.0, lt=1.0)
    """Lower bound of the weight."""
    reject: RejectConfig = RejectConfig()
    """Rules that remove tokens and responses from the policy loss."""
    off_policy_mask: float | None = Field(default=None, gt=0.0)
    """Rejects tokens of negative advantage in responses with a mean of logp_rollout - logp above this value, in nats
    (arXiv:2512.02556, eq. 9); null: no such rejection."""

    second_moment: Annotated[float | None, NotWith("mode", "bypass", "policy_gradient", because=_NO_OLD)] = Field(
        default=None, gt=0.0
    )
    """Rejects the tokens of an optimizer step with the largest (logp_old - logp_rollout)^2, until the mean of the
    remaining tokens is below this value (M2PO, arXiv:2510.01161); null: no such rejection. If a batch makes one
    optimizer step, this key costs an additional forward pass."""

    center_top_k: Annotated[int | None, NotWith("mode", "decoupled", "bypass", because=_CENTERS)] = Field(
        default=None, ge=1
    )
    """Subtracts the sampler's mean of the weighted gradient at each token, over this number of the sampler's likeliest
    tokens and one tail (score centering, arXiv:2609.20807); null: no centering. The log-probabilities take 8 bytes for
    each token and each of the k."""

    @model_validator(mode="after")
    def _filled(self) -> Self:
        """Take missing keys from the preset."""
        if self.preset is not None:
            for key, value in PRESETS[self.preset].items():
                if key not in self.model_fields_set:
                    object.__setattr__(self, key, value)  # the section is not in use yet
                    self.model_fields_set.add(key)
        return self

    @model_validator(mode="after")
    def _centers_plain_weights(self) -> Self:
        if self.center_top_k is not None and (self.rejects or (self.weights or "").startswith("sequence")):
            raise ValueError(
                f"`center_top_k` {self.center_top_k} weighs the sampler's likeliest tokens as the sampled token, which "
                "no rejection and no weight of a whole response can do: use `weights` token_truncated, token_masked or "
                "null, without `reject`, `off_policy_mask` and `second_moment`"
            )
        return self

    @property
    def rejects(self) -> bool:
        """Whether a rejection rule, the off-policy mask or the second moment can remove tokens from the loss."""
        return bool(self.reject.bounds) or self.off_policy_mask is not None or self.second_moment is not None


_TOKEN_TIS: Mapping[str, Any] = {"weights": "token_truncated", "max_ratio": 2.0}
_GEO_RS: Mapping[str, Any] = {"reject": RejectConfig(geometric_mean_ratio=(0.999, 1.001))}
_K3_RS: Mapping[str, Any] = {"reject": RejectConfig(sequence_mean_k3=0.01)}
_BYPASS: Mapping[str, Any] = {"mode": "bypass"}
_PG: Mapping[str, Any] = {"mode": "policy_gradient"}

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "token_tis": _TOKEN_TIS,
    "sequence_tis": {"weights": "sequence_truncated", "max_ratio": 2.0},
    "sequence_mis": {"weights": "sequence_masked", "max_ratio": 2.0, "min_ratio": 0.5},
    "icepop": {"weights": "token_masked", "max_ratio": 5.0, "min_ratio": 0.5},
    "m2po": {"second_moment": 0.04},
    "binary_trust_region": {
        **_TOKEN_TIS,
        "max_ratio": 20.0,  # the bound of dppo; OpenRLHF has none
        "reject": RejectConfig(sequence_mean_binary_kl=0.003),
    },
    "score_centering": {**_PG, **_TOKEN_TIS, "center_top_k": 64},
    "geo_rs": _GEO_RS,
    "geo_rs_token_tis": {**_GEO_RS, **_TOKEN_TIS},
    "k3_rs": _K3_RS,
    "k3_rs_token_tis": {**_K3_RS, **_TOKEN_TIS},
    "bypass_clip": _BYPASS,
    "bypass_clip_geo_rs": {**_BYPASS, **_GEO_RS},
    "bypass_clip_k3_rs": {**_BYPASS, **_K3_RS},
    "bypass_pg_is": {**_PG, "weights": "sequence_truncated", "max_ratio": 2.0},
    "bypass_pg_geo_rs": {**_PG, **_GEO_RS},
    "bypass_pg_geo_rs_token_tis": {**_PG, **_GEO_RS, **_TOKEN_TIS},
}

_LEVELS: dict[str, corrections.Level] = {"geometric_mean": "sequence_mean", "sequence": "sequence_sum"}


def corrected(config: CorrectionConfig, batch: PolicyMicrobatch, surrogate: Surrogate) -> tuple[Surrogate, Correction]:
    """Return the surrogate times the correction weights, and the correction. policy_gradient replaces the surrogate."""
    result = correction(config, batch)
    if config.mode == "policy_gradient":
        mask = batch.response_mask
        surrogate = replace(
            surrogate,
            per_token=policy_loss.reinforce(batch.logprobs, batch.advantages, mask),
            ratio=policy_loss.importance_ratio(batch.logprobs.detach(), batch.rollout_logprobs, mask),
            clipped=mask.new_zeros(mask.shape),
            capped=None,
        )
    per_token = surrogate.per_token * result.weights
    if batch.top_logprobs is not None and batch.sampler_top_logprobs is not None:
        columns = (batch.top_logprobs, batch.sampler_top_logprobs, batch.advantages, batch.response_mask)
        per_token = per_token + corrections.score_centering(*columns, weigh=partial(_token_weight, config))
    return replace(surrogate, per_token=per_token), result


def _token_weight(config: CorrectionConfig, ratio: Tensor) -> Tensor:
    """Return the configured weight as a function of a token's ratio."""
    if config.weights is None:
        return torch.ones_like(ratio)
    weigh = corrections.masked if config.weights == "token_masked" else corrections.truncated
    mask = torch.ones_like(ratio, dtype=torch.bool)
    return weigh(ratio, mask, max_ratio=config.max_ratio, min_ratio=config.min_ratio)


def correction(config: CorrectionConfig, batch: PolicyMicrobatch) -> Correction:
    """Return the configured correction of each token."""
    mask, lengths = batch.response_mask, batch.lengths
    trained = batch.old_logprobs if config.mode == "decoupled" else batch.logprobs.detach()
    gap = (trained, batch.rollout_logprobs, mask)
    bounds = {"max_ratio": config.max_ratio, "min_ratio": config.min_ratio}
    level, _, how = (config.weights or "").partition("_")
    masks, ratio = how == "masked", mask.to(trained.dtype)
    weights = ratio
    if level:
        ratio = corrections.product_ratio(*gap, lengths) if level == "sequence" else corrections.token_ratio(*gap)
        weights = (corrections.masked if masks else corrections.truncated)(ratio, mask, **bounds)
    outside, nowhere = mask & (weights != ratio), mask.new_zeros(mask.shape)
    keep = _kept(config, batch, gap)
    return Correction(
        weights=weights.where(keep, 0.0),
        truncated=nowhere if masks else outside,
        masked=outside if masks else nowhere,
        rejected=mask & ~keep,
    )


def _kept(config: CorrectionConfig, batch: PolicyMicrobatch, gap: tuple[Tensor, Tensor, Tensor]) -> Bool[Tensor, " N"]:
    """Return True for the tokens within all configured bounds."""
    mask, lengths = batch.response_mask, batch.lengths
    keep = mask
    for name, (low, high) in config.reject.bounds.items():
        statistic = next(known for known in get_args(corrections.Statistic) if name.endswith(f"_{known}"))
        level = name.removesuffix(f"_{statistic}")
        keep = keep & corrections.accepted(
            *gap,
            lengths,
            statistic=statistic,
            level=_LEVELS.get(level, cast(corrections.Level, level)),
            low=-math.inf if low is None else low,
            high=math.inf if high is None else high,
        )
    if config.off_policy_mask is not None:
        columns = (batch.logprobs, batch.rollout_logprobs, batch.advantages, mask, lengths)
        keep = keep & corrections.on_policy_sequences(*columns, max_kl=config.off_policy_mask)
    if batch.beyond_moment is not None:
        keep = keep & ~batch.beyond_moment
    return keep
