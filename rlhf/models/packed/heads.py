"""Scalar heads over packed sequences: one value a token for the critic, one score a sequence for the reward model.

Both are transformers' sequence-classification models with one label. The `score` layer is applied here.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.packed.branches import Branches, predecessors
from rlhf.models.packed.forward import hidden_states
from rlhf.models.packed.sequence_parallel import whole_row


def token_values(
    model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], branches: Branches | None = None
) -> Float[Tensor, " N"]:
    """Return the value of the state before each token, in float32: the head's output there, 0 for first tokens."""
    scalars = token_scores(model, token_ids, lengths, branches)
    before = predecessors(lengths, branches)
    return torch.where(before >= 0, scalars[before.clamp(min=0)], 0.0)


def token_scores(
    model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], branches: Branches | None = None
) -> Float[Tensor, " N"]:
    """Return the head's output at every token, in float32. The output judges the sequence up to this token."""
    hidden = hidden_states(model, token_ids, lengths, branches)
    return whole_row(model.score(hidden)[:, 0].float(), len(token_ids))


def sequence_scores(
    model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], branches: Branches | None = None
) -> Float[Tensor, " B"]:
    """Return the score of each sequence, in float32: the head's output at the last token, as in transformers."""
    return token_scores(model, token_ids, lengths, branches)[lengths.cumsum(0) - 1]
