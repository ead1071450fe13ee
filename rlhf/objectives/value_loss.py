"""Compute the critic's loss: squared error to the returns, with PPO's trust region around the old values.

The losses have one term per token, zero where `mask` is False; aggregation.py weights and the caller sums the terms.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def value_loss(
    values: Float[Tensor, "*N"], returns: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return half the squared error to the returns."""
    return 0.5 * torch.where(mask, values - returns, 0.0).square()


def clipped_value_loss(
    values: Float[Tensor, "*N"],
    old_values: Float[Tensor, "*N"],
    returns: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip: float,
) -> Float[Tensor, "*N"]:
    """Return half the larger squared error of two: of the value, and of the value clipped around the old value.

    This is the form of the original PPO code (openai/baselines, ppo2), not in the paper: a value moved further than
    `clip` towards the return gets no gradient.
    """
    errors = torch.where(mask, values - returns, 0.0)
    held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    held_errors = torch.where(mask, held - returns, 0.0)
    return 0.5 * torch.maximum(errors.square(), held_errors.square())


def clipped_values(
    values: Float[Tensor, "*N"],
    old_values: Float[Tensor, "*N"],
    returns: Float[Tensor, "*N"],
    mask: Bool[Tensor, "*N"],
    *,
    clip: float,
) -> Bool[Tensor, "*N"]:
    """Return True where the clipped value has the larger error, for the value clip fraction."""
    held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return mask & ((held - returns).square() > (values - returns).square())
