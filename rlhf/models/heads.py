"""Scalar heads over packed sequences: one value a token for the critic, one score a sequence for the reward model.

Both are transformers' sequence-classification models with one label, whose `score` layer is applied here where it is
needed. Nothing here computes a loss.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.packed import hidden_states


def token_values(model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " N"]:
    """Value of the state in which each token was chosen, in float32: the head at token t - 1. 0 at a first token."""
    scalars: Tensor = model.score(hidden_states(model, token_ids, lengths))[:, 0].float()
    starts = lengths.cumsum(0) - lengths
    return scalars.roll(1).index_fill(0, starts, 0.0)


def sequence_scores(model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Score of each sequence, in float32: the head at its last token, as transformers' own forward pass has it."""
    last = lengths.cumsum(0) - 1
    scores: Tensor = model.score(hidden_states(model, token_ids, lengths)[last])[:, 0].float()
    return scores
