"""The weight of each token in the step's loss, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.objectives.aggregation import Aggregation, token_weights

MASK = torch.tensor([True, True, False, True, False, False])
LENGTHS = torch.tensor([3, 1, 2])  # 2, 1 and 0 sampled tokens of a step of 8 tokens in 4 sequences, 10 tokens at most


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("token_mean", 1 / 8, 1 / 8),
        ("sequence_mean_token_mean", 1 / (2 * 4), 1 / (1 * 4)),
        ("sequence_mean_token_sum", 1 / 4, 1 / 4),
        ("token_sum_norm", 1 / (4 * 10), 1 / (4 * 10)),
    ],
)
def test_weights(mode: Aggregation, first: float, second: float) -> None:
    weights = token_weights(MASK, LENGTHS, mode=mode, num_tokens=8, num_sequences=4, max_new_tokens=10)
    torch.testing.assert_close(weights.tolist(), [first, first, 0.0, second, 0.0, 0.0])


def test_a_session_counts_once_in_a_mean_over_sequences() -> None:
    # the first two sequences are one session of 3 sampled tokens, in a step of 2 sessions
    counts = torch.tensor([3, 3, 0])
    weights = token_weights(
        MASK,
        LENGTHS,
        mode="sequence_mean_token_mean",
        num_tokens=3,
        num_sequences=2,
        max_new_tokens=10,
        sample_tokens=counts,
    )
    torch.testing.assert_close(weights.tolist(), [1 / 6, 1 / 6, 0.0, 1 / 6, 0.0, 0.0])


@pytest.mark.parametrize("count", ["num_tokens", "num_sequences", "max_new_tokens"])
def test_an_empty_step_is_refused(count: str) -> None:
    counts = {"num_tokens": 8, "num_sequences": 4, "max_new_tokens": 10, count: 0}
    with pytest.raises(ValueError, match=f"{count}=0"):
        token_weights(MASK, LENGTHS, mode="token_mean", **counts)
