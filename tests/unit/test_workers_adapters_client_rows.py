"""Bad rows of a client give one error with row and column, and good rows are aligned to the scored token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.adapters import LossRows
from rlhf.errors import UserError
from rlhf.workers.adapters.client_rows import ScoredRows, refuse_bad_rows

VOCABULARY = 10


def rows(**changes: Any) -> LossRows:
    good: dict[str, Any] = {
        "token_ids": torch.tensor([1, 2, 3, 4, 5]),
        "lengths": torch.tensor([3, 2]),
        "targets": torch.tensor([[2], [3], [9], [5], [7]]),
        "columns": {"logprobs": torch.zeros(5, 1), "advantages": torch.arange(5.0)[:, None]},
    }
    return LossRows(**(good | changes))


def column(value: float) -> dict[str, Tensor]:
    changed = torch.zeros(5, 1)
    changed[3] = value
    return {"logprobs": torch.zeros(5, 1), "advantages": changed}


@pytest.mark.parametrize(
    ("loss", "bad", "expected"),
    [
        ("ppo", rows(columns={"advantages": torch.zeros(5, 1)}), "logprobs: ppo needs this column"),
        ("ppo", rows(columns={**rows().columns, "beta": torch.zeros(5, 1)}), "beta: ppo does not use this column"),
        ("ppo", rows(columns=column(float("nan"))), "Row 1: advantages has nan"),
        ("ppo", rows(columns=column(float("inf"))), "Row 1: advantages has inf"),
        ("ppo", rows(token_ids=torch.tensor([1, 2, 3, 10, 5])), "Row 1: tokens has 10, and the model's .* 0 to 9"),
        ("ppo", rows(targets=torch.tensor([[2], [10], [9], [5], [7]])), "Row 0: targets has 10"),
        ("ppo", rows(targets=torch.tensor([[2], [-1], [9], [5], [7]])), "Row 0: targets has -1"),
        (
            "gspo",
            rows(
                targets=torch.zeros(5, 2, dtype=torch.int64),
                columns=dict.fromkeys(("logprobs", "advantages", "sequence_ratio_mask"), torch.zeros(5, 2)),
            ),
            "gspo takes one target for each token, not 2",
        ),
        (
            "ppo",
            rows(
                columns={
                    **rows().columns,
                    "clip_low_threshold": torch.ones(5, 1),
                    "clip_high_threshold": torch.tensor([[2.0], [2.0], [2.0], [2.0], [0.5]]),
                }
            ),
            "Row 1: clip_low_threshold is above clip_high_threshold",
        ),
    ],
)
def test_bad_rows_are_refused_with_row_and_column(loss: str, bad: LossRows, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        refuse_bad_rows(bad, loss, VOCABULARY)


def test_good_rows_pass() -> None:
    refuse_bad_rows(rows(), "ppo", VOCABULARY)
    refuse_bad_rows(rows(columns={}), "cross_entropy", VOCABULARY)


def test_columns_move_to_the_scored_token_behind_each_row() -> None:
    scored = ScoredRows.of(rows())
    assert scored.token_ids.tolist() == [1, 2, 3, 9, 4, 5, 7]
    assert scored.lengths.tolist() == [4, 3]
    assert scored.mask.tolist() == [False, True, True, True, False, True, True]
    assert scored.columns["advantages"][:, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 0.0, 3.0, 4.0]
    assert scored.targets is None  # each is the next token


def test_other_targets_than_the_next_tokens_are_kept() -> None:
    other = replace(rows(), targets=torch.tensor([[2], [4], [9], [5], [7]]))
    assert ScoredRows.of(other).targets is not None
    two = replace(rows(), targets=torch.tensor([[2, 1], [3, 0], [9, 9], [5, 5], [7, 8]]))
    targets = ScoredRows.of(two).targets
    assert targets is not None
    assert targets.tolist() == [[0, 0], [2, 1], [3, 0], [9, 9], [0, 0], [5, 5], [7, 8]]
