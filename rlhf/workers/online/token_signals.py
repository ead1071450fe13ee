"""Training signals of single tokens, read from a rank's columns after its updates. Only the samples file uses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.types import Ragged, TokenSignals

Column = Float[Tensor, " N"] | None


def unknown(num_tokens: int) -> Float[Tensor, " N"]:
    """Return a column of nan, meaning not measured."""
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
    """Return the signals of the wanted sequences of a batch. A column of None becomes a column of nan."""
    num_tokens = int(batch.lengths.sum())
    columns = (old_logprobs, ref_logprobs, teacher_logprobs, advantages)
    old, ref, teacher, advantage = (unknown(num_tokens) if column is None else column.float() for column in columns)
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
