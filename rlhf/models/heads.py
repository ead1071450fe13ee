"""Scalar heads over packed sequences: one value a token for the critic, one score a sequence for the reward model.

Both are transformers' sequence-classification models with one label, whose `score` layer is applied here where it is
needed. Nothing here computes a loss.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.branches import Branches, predecessors
from rlhf.models.packed import hidden_states
from rlhf.models.sequence_parallel import whole_row


def token_values(
    model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], branches: Branches | None = None
) -> Float[Tensor, " N"]:
    """Value of the state in which each token was chosen, in float32: the head at the token before. 0 at a first one."""
    hidden = hidden_states(model, token_ids, lengths, branches)
    scalars = whole_row(model.score(hidden)[:, 0].float(), len(token_ids))
    before = predecessors(lengths, branches)
    return torch.where(before >= 0, scalars[before.clamp(min=0)], 0.0)


def token_scores(model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " N"]:
    """The head at every token, in float32: what it says of the sequence up to there."""
    hidden = hidden_states(model, token_ids, lengths)
    return whole_row(model.score(hidden)[:, 0].float(), len(token_ids))


def sequence_scores(
    model: Any, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], branches: Branches | None = None
) -> Float[Tensor, " B"]:
    """Score of each sequence, in float32: the head at its last token, as transformers' own forward pass has it."""
    hidden = hidden_states(model, token_ids, lengths, branches)
    scores = whole_row(model.score(hidden)[:, 0].float(), len(token_ids))
    return scores[lengths.cumsum(0) - 1]
