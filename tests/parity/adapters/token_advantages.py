"""GAE, rewards to go and whitening."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.objectives.advantages import gae, reward_to_go, whiten
from rlhf.objectives.masking import moments
from tests.parity.adapters.aggregation import EPS
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout, carried_back

COUNT_ROUNDING = torch.finfo(torch.float32).eps
"""Relative error of n / (n - 1) where a library divides whole numbers, as TRL does: PyTorch returns a float32."""


def verl_moments(values: Tensor, mask: Tensor) -> tuple[float, float]:
    """verl's masked mean and unbiased variance: 1e-8 is added to the count in both."""
    found = moments(values, mask)
    shrink = found.count / (found.count + EPS)
    return found.mean * shrink, found.variance * shrink


def verl_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """verl whitens the masked positions too, by the moments of the unmasked positions."""
    mean, variance = verl_moments(values, mask)
    return whiten(values, torch.ones_like(mask), mean=mean, variance=variance)


def skipping_gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return our GAE on padded arrays; a masked position shows the carried value."""
    layout = Layout(mask)
    flat = gae(layout.flat(rewards), layout.flat(values), layout.mask, layout.lengths, gamma=gamma, lam=lam)
    advantages = carried_back(layout.padded(flat[0]), mask)
    return advantages, torch.where(mask, layout.padded(flat[1]), advantages + values)


def zeroing_gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """OpenRLHF: a masked position is a step of reward 0 and value 0."""
    layout = Layout.full(mask.shape)
    columns = (layout.flat(torch.where(mask, column, 0.0)) for column in (rewards, values))
    advantages, returns = gae(*columns, layout.mask, layout.lengths, gamma=gamma, lam=lam)
    return layout.padded(advantages), layout.padded(returns)


def zeroing_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """As zeroing_gae, without values."""
    layout = Layout.full(mask.shape)
    flat = layout.flat(torch.where(mask, rewards, 0.0))
    return layout.padded(reward_to_go(flat, layout.mask, layout.lengths, gamma=gamma))


def verl_gae(arguments: Arguments) -> Outputs:
    """Advantages come whitened."""
    mask = arguments.mask("response_mask")
    rewards, values = arguments.tensor("token_level_rewards"), arguments.tensor("values")
    advantages, returns = skipping_gae(
        rewards, values, mask, gamma=arguments.number("gamma"), lam=arguments.number("lam")
    )
    return {"advantages_whitened": verl_whiten(advantages, mask), "returns": returns}


def masked_whiten(of: Callable[[Tensor, Tensor], tuple[float, float]], *, rounding: float = 0.0) -> Adapter:
    """Return the adapter of a library's masked_whiten; `of` gives the mean and the unbiased variance.

    `shift_mean` false adds the mean back: `noshift` is that result. Masked positions are whitened too. `rounding` is
    the relative error of the library's result.
    """

    def adapter(arguments: Arguments) -> Outputs:
        values, mask = arguments.tensor("values"), arguments.mask("mask")
        mean, variance = of(values, mask)
        centered = whiten(values, torch.ones_like(mask), mean=mean, variance=variance)
        arguments.rounding = rounding * centered.abs().max().item()
        shifted = centered + mean
        result = centered if arguments.flag("shift_mean", True) else shifted
        moments = {"masked_mean": mean, "masked_var": variance}
        return {"whitened": result, "out": result, "noshift": shifted, "shift": centered, **moments}

    return adapter


def trl_moments(values: Tensor, mask: Tensor) -> tuple[float, float]:
    """Return TRL's masked mean and unbiased variance."""
    result = moments(values, mask)
    return result.mean, result.variance


def openrlhf_gae(arguments: Arguments) -> Outputs:
    """Not whitened."""
    rewards, values = arguments.tensor("rewards"), arguments.tensor("values")
    mask = arguments.mask_or_all("action_mask", rewards.shape)
    gamma, lam = arguments.number("gamma"), arguments.number("lambd")
    advantages, returns = zeroing_gae(rewards, values, mask, gamma=gamma, lam=lam)
    return {"advantages": advantages, "returns": returns}


def openrlhf_cumulative_returns(arguments: Arguments) -> Outputs:
    """Discounted rewards to go."""
    rewards = arguments.tensor("rewards")
    mask = arguments.mask_or_all("action_mask", rewards.shape)
    return {"returns": zeroing_returns(rewards, mask, gamma=arguments.number("gamma"))}


def openrlhf_masked_normalize(arguments: Arguments) -> Outputs:
    """Normalise along a dimension, with the biased variance held above eps."""
    values, mask = arguments.tensor("tensor"), arguments.mask("mask")
    dim, eps = arguments.number("dim", 1), arguments.number("eps", 1e-8)
    if values.ndim != 2 or dim not in (-2, -1, 0, 1):
        raise Unsupported(f"dim {dim} of a tensor with {values.ndim} dimensions")
    by_column = dim in (-2, 0)
    if by_column:
        values, mask = values.T, mask.T
    rows = []
    for row, kept in zip(values, mask, strict=True):
        found = moments(row, kept)
        variance = max(found.squared_deviation / found.count, eps) if found.count else eps
        rows.append(whiten(row, kept, mean=found.mean, variance=variance, eps=0.0))
    out = torch.stack(rows)
    return {"out": out.T if by_column else out}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "compute_gae_advantage_return"): verl_gae,
    ("verl", "masked_whiten"): masked_whiten(verl_moments),
    ("trl", "masked_whiten"): masked_whiten(trl_moments, rounding=COUNT_ROUNDING),
    ("trl_snap", "masked_whiten"): masked_whiten(trl_moments, rounding=COUNT_ROUNDING),
    ("openrlhf", "RemoteExperienceMaker.get_advantages_and_returns"): openrlhf_gae,
    ("openrlhf", "RemoteExperienceMaker.get_cumulative_returns"): openrlhf_cumulative_returns,
    ("openrlhf", "masked_normalize"): openrlhf_masked_normalize,
}
