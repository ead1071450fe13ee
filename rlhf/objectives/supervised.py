"""Compute supervised fine-tuning losses, one term per token, zero where `mask` is False, without averages."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def negative_logprob(logprobs: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return the cross-entropy with the token itself."""
    return torch.where(mask, -logprobs, 0.0)
