"""Compute the weight of each token in the loss of an optimizer step.

The loss of a micro-batch is `(per_token * weights).sum()`; the sum over all micro-batches and ranks is the loss of the
step. Counts are from the **whole optimizer step**, never from the local batch, so that micro-batch size, packing and
the number of ranks cannot change the gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.masking import sequence_counts, to_tokens

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum_norm"]


def token_weights(
    response_mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mode: Aggregation,
    num_tokens: int | float,
    num_sequences: int | float,
    max_new_tokens: int | float,
    sample_tokens: Int[Tensor, " B"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " N"]:
    """Return the weight of each token in the loss of the step; zero outside response_mask.

    With n_i the sampled tokens of sample i, and the counts of the whole step:
        token_mean                 1 / num_tokens                       DAPO (arXiv:2503.14476, eq. 8)
        sequence_mean_token_mean   1 / (n_i * num_sequences)            GRPO (arXiv:2402.03300, eq. 3)
        sequence_mean_token_sum    1 / num_sequences                    the plain policy gradient
        token_sum_norm             1 / (num_sequences * max_new_tokens) Dr. GRPO (arXiv:2503.20783)

    A sample is a sequence, or the sequences of an agent's session: `sample_tokens` has n_i for each sequence. None:
    each sequence is a sample. num_sequences counts the trained samples; a sample without a sampled token adds nothing,
    and the caller decides whether such a sample counts. ValueError for a count of 0 or less.
    """
    if min(num_tokens, num_sequences, max_new_tokens) <= 0:
        raise ValueError(
            f"token_weights needs positive counts, got num_tokens={num_tokens}, num_sequences={num_sequences}, "
            f"max_new_tokens={max_new_tokens}: a step without sampled tokens has no loss"
        )
    if mode == "sequence_mean_token_mean":
        counts = sequence_counts(response_mask, lengths) if sample_tokens is None else sample_tokens
        counts = counts.clamp(min=1)
        per_sequence = 1.0 / (counts.to(dtype) * num_sequences)
        return torch.where(response_mask, to_tokens(per_sequence, lengths, num_tokens=len(response_mask)), 0.0)
    if mode == "token_mean":
        weight = 1.0 / num_tokens
    elif mode == "sequence_mean_token_sum":
        weight = 1.0 / num_sequences
    else:
        weight = 1.0 / (num_sequences * max_new_tokens)
    return response_mask.to(dtype) * weight


def denominator(mode: Aggregation, *, num_tokens: int, num_sequences: int) -> int:
    """Return the count of the whole step to divide a loss by, if the `token_weights` were computed with counts of 1."""
    return num_tokens if mode == "token_mean" else num_sequences
