"""What training made of single tokens: taken from a rank's columns after its updates, for the samples file alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.types import Ragged, TokenSignals

Column = Float[Tensor, " N"] | None


def unknown(num_tokens: int) -> Float[Tensor, " N"]:
    """A column of which nothing is known yet."""
    return torch.full((num_tokens,), torch.nan)


def signals_of(
    batch: Ragged,
    wanted: Sequence[int],
    *,
    old_logprobs: Column = None,
    ref_logprobs: Column = None,
    teacher_logprobs: Column = None,
    advantages: Column = None,
) -> TokenSignals:
    """Of the wanted sequences of a batch, from its columns; None: it has no such column."""
    num_tokens = int(batch.lengths.sum())
    columns = (old_logprobs, ref_logprobs, teacher_logprobs, advantages)
    old, ref, teacher, advantage = (unknown(num_tokens) if one is None else one.float() for one in columns)
    whole = TokenSignals(
        sequence_ids=batch.sequence_ids,
        lengths=batch.lengths,
        old_logprobs=old,
        ref_logprobs=ref,
        teacher_logprobs=teacher,
        advantages=advantage,
    )
    ids = batch.sequence_ids.tolist()
    return whole.take([ids.index(i) for i in wanted])
