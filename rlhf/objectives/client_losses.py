"""Compute the losses named by a client's own loop, as in the Tinker API (tinker-docs.thinkingmachines.ai).

A loss is the sum of terms, one for each scored token; clients normalise through weights and advantages. A column of a
client has a value for each of K targets at each of N places. Every loss may have `weights` as factors of the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.errors import UserError
from rlhf.objectives import policy_loss, weighted_loss
from rlhf.objectives.masking import sequence_means, to_tokens

WEIGHTS, RATIO_MASK = "weights", "sequence_ratio_mask"
BOUNDS = ("clip_low_threshold", "clip_high_threshold")  # bounds of the ratio, as settings or as columns
_ELSEWHERE = {"stable_reinforce": "it needs what the sampler recorded of each sequence, which nothing here records"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Log-probabilities of the targets in B sequences with N places, and the columns of the loss."""

    logprobs: Float[Tensor, "N K"]
    mask: Bool[Tensor, "N K"]  # terms with a loss
    lengths: Int[Tensor, " B"]
    columns: Mapping[str, Float[Tensor, "N K"]]
    settings: Mapping[str, float]

    @property
    def old_logprobs(self) -> Float[Tensor, "N K"]:
        return self.columns["logprobs"]

    @property
    def advantages(self) -> Float[Tensor, "N K"]:
        return self.columns["advantages"]

    def bounds(self) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Return the smallest and the largest ratio of each term."""
        low, high = (self.columns.get(name, torch.full_like(self.logprobs, self.settings[name])) for name in BOUNDS)
        return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The terms of a loss, 0 where the mask of `Scored` is False."""

    terms: Float[Tensor, "N K"]
    clipped: Bool[Tensor, "N K"] | None = None  # whose ratio was out of bounds with an effect. None: nothing is clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoss:
    """A loss with its columns and settings."""

    terms: Callable[[Scored], Terms]
    columns: tuple[str, ...] = ("logprobs", "advantages")  # that every call must have
    settings: Mapping[str, float] = field(default_factory=dict)  # defaults
    is_linear: bool = True  # whether a term with an advantage of 0 is 0

    @property
    def optional(self) -> tuple[str, ...]:
        """Return the columns allowed besides the required columns."""
        return (WEIGHTS, *(BOUNDS if BOUNDS[0] in self.settings else ()))


def client_loss(
    name: str,
    logprobs: Float[Tensor, "N K"],
    columns: Mapping[str, Float[Tensor, "N K"]],
    *,
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    settings: Mapping[str, float],
) -> Terms:
    """Return the terms of a loss. `mask`: the scored places. `settings` and columns as from `checked_settings`."""
    loss, weights = LOSSES[name], columns.get(WEIGHTS)
    counted = mask[:, None].expand_as(logprobs)
    if weights is not None:
        counted = counted & (weights != 0)
    if loss.is_linear and "advantages" in loss.columns:
        counted = counted & (columns["advantages"] != 0)  # no overflow of a ratio that has no effect
    found = loss.terms(Scored(logprobs=logprobs, mask=counted, lengths=lengths, columns=columns, settings=settings))
    if weights is None or name == "cross_entropy":
        return found
    return Terms(terms=torch.where(counted, weights * found.terms, 0.0), clipped=found.clipped)


def checked_settings(name: str, given: Mapping[str, float | str]) -> dict[str, float]:
    """Return all settings of a loss. Raise UserError for an unknown loss, an unknown setting, or a bad value."""
    if name not in LOSSES:
        reason = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise UserError(f"loss_fn: there is no {name!r} here{reason}. The losses are {', '.join(LOSSES)}.")
    settings = dict(LOSSES[name].settings)
    for key, value in given.items():
        if key not in settings:
            known = f"has the settings {', '.join(settings)}" if settings else "has no settings"
            raise UserError(f"loss_fn_config: {name} has no setting {key!r}; it {known}.")
        if isinstance(value, str) or not math.isfinite(value) or value < 0.0:
            raise UserError(f"loss_fn_config: {key} is {value!r}, expected a finite number >= 0.")
        settings[key] = float(value)
    if BOUNDS[0] in settings and settings[BOUNDS[0]] > settings[BOUNDS[1]]:
        low, high = (settings[bound] for bound in BOUNDS)
        raise UserError(f"loss_fn_config: {BOUNDS[0]} is {low:g}, above {BOUNDS[1]} = {high:g}.")
    return settings


def _cross_entropy(of: Scored) -> Terms:
    weights = of.columns.get(WEIGHTS, torch.ones_like(of.logprobs))
    return Terms(terms=policy_loss.reinforce(of.logprobs, weights, of.mask))


def _ratio(of: Scored) -> Float[Tensor, "N K"]:
    return policy_loss.importance_ratio(of.logprobs, of.old_logprobs, of.mask)


def _importance_sampling(of: Scored) -> Terms:
    return Terms(terms=torch.where(of.mask, -_ratio(of) * of.advantages, 0.0))


def _clipped(of: Scored, ratio: Float[Tensor, "N K"]) -> Terms:
    low, high = of.bounds()
    around_one = {"clip_low": 1.0 - low, "clip_high": high - 1.0}
    below, above = policy_loss.clipped_ratios(ratio, of.advantages, of.mask, **around_one)
    terms = policy_loss.clipped_loss(ratio, of.advantages, of.mask, **around_one)
    return Terms(terms=terms, clipped=below | above)


def _ppo(of: Scored) -> Terms:
    return _clipped(of, _ratio(of))


def _cispo(of: Scored) -> Terms:
    (low, high), ratio = of.bounds(), _ratio(of).detach()
    terms = weighted_loss.cispo(ratio, of.logprobs, of.advantages, of.mask, min_ratio=low, max_ratio=high)
    return Terms(terms=terms, clipped=of.mask & ((ratio < low) | (ratio > high)))


def _dro(of: Scored) -> Terms:
    columns = (of.logprobs, of.old_logprobs, of.advantages, of.mask)
    return Terms(terms=weighted_loss.dro(*columns, beta=of.settings["beta"]))


def _gspo(of: Scored) -> Terms:
    """Return GSPO-token (arXiv:2507.18071, eq. 14): each token has the value of its sequence's ratio.

    The ratio's mean is over the tokens in sequence_ratio_mask. The other tokens have the same ratio.
    """
    logprobs = of.logprobs[:, 0]
    log_ratio = logprobs.detach() - of.old_logprobs[:, 0]
    means = sequence_means(log_ratio, of.columns[RATIO_MASK][:, 0] != 0, of.lengths)
    shared = to_tokens(means, of.lengths, num_tokens=len(logprobs))
    return _clipped(of, (shared + logprobs - logprobs.detach()).exp()[:, None])


LOSSES: Mapping[str, ClientLoss] = {
    "cross_entropy": ClientLoss(terms=_cross_entropy, columns=()),
    "importance_sampling": ClientLoss(terms=_importance_sampling),
    "ppo": ClientLoss(terms=_ppo, settings=dict(zip(BOUNDS, (0.8, 1.2), strict=True))),
    "cispo": ClientLoss(terms=_cispo, settings=dict(zip(BOUNDS, (0.0, 4.0), strict=True))),
    "dro": ClientLoss(terms=_dro, settings={"beta": 0.05}, is_linear=False),
    "gspo": ClientLoss(
        terms=_gspo,
        columns=("logprobs", "advantages", RATIO_MASK),
        settings=dict(zip(BOUNDS, (1.0 - 3e-4, 1.0 + 4e-4), strict=True)),  # the paper's bounds
    ),
}
