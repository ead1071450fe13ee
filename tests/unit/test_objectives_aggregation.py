"""The weight of each token in the step's loss. tests/parity compares the modes of a single sequence a sample."""

from __future__ import annotations

import pytest
import torch

from rlhf.objectives.aggregation import token_weights

MASK, LENGTHS = torch.tensor([True, True, False, True, False, False]), torch.tensor([3, 1, 2])
COUNTS = {"num_tokens": 3, "num_sequences": 2, "max_new_tokens": 10}


def test_a_session_counts_once_in_a_mean_over_sequences() -> None:
    """The first two sequences belong to one session with 3 sampled tokens. The step has 2 sessions."""
    counts = torch.tensor([3, 3, 0])
    weights = token_weights(MASK, LENGTHS, mode="sequence_mean_token_mean", **COUNTS, sample_tokens=counts)
    torch.testing.assert_close(weights.tolist(), [1 / 6, 1 / 6, 0.0, 1 / 6, 0.0, 0.0])


@pytest.mark.parametrize("count", COUNTS)
def test_an_empty_step_is_refused(count: str) -> None:
    with pytest.raises(ValueError, match=f"{count}=0"):
        token_weights(MASK, LENGTHS, mode="token_mean", **COUNTS | {count: 0})
