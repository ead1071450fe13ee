"""Training signals of single tokens for the samples file, read from a rank's columns after the updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.types import Ragged, TokenSignals

Column = Float[Tensor, " N"] | None


def unknown(num_tokens: int) -> Float[Tensor, " N"]:
    """Return a column of nan, meaning not measured."""
    return torch.full((num_tokens,), torch.nan)


def unknown_signals(batch: Ragged) -> TokenSignals:
    """Return signals of a batch before measurement, in separate columns."""
    columns = {name: unknown(int(batch.lengths.sum())) for name in TokenSignals.columns()}
    return TokenSignals(sequence_ids=batch.sequence_ids, lengths=batch.lengths, **columns)


def signals_of(batch: Ragged, sequences: Sequence[int], **columns: Column) -> TokenSignals:
    """Return the signals of some samples of a batch. A column of None is not measured."""
    known = {name: column.float() for name, column in columns.items() if column is not None}
    return replace(unknown_signals(batch), **known).of_samples(sequences)
