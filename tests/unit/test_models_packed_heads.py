"""Scalar heads on packed rows against transformers' own sequence classification."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf.models.packed.heads import sequence_scores, token_values
from tests.fixtures.packed_models import SIZES

LENGTHS = torch.tensor([3, 1, 6])
TOKENS = torch.tensor([5, 1, 9, 4, 8, 8, 2, 7, 3, 6])


def scalar_model() -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES | {"num_labels": 1, "pad_token_id": 0}))


def test_scores_are_those_of_transformers() -> None:
    model = scalar_model()
    with torch.no_grad():
        scores = sequence_scores(model, TOKENS, LENGTHS)
        model.set_attn_implementation("eager")
        expected = [model(ids[None]).logits[0, 0] for ids in TOKENS.split(LENGTHS.tolist())]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_a_value_is_that_of_the_state_before_its_token() -> None:
    """values[t] is the score of tokens up to t - 1, so the last value is the score without the last token."""
    model = scalar_model()
    with torch.no_grad():
        values = token_values(model, TOKENS, LENGTHS)
        shorter = torch.cat([TOKENS[:2], TOKENS[4:9]])
        scores = sequence_scores(model, shorter, torch.tensor([2, 5]))
    torch.testing.assert_close(values[[2, 9]], scores, rtol=1e-5, atol=1e-6)
    assert values[[0, 3, 4]].tolist() == [0.0, 0.0, 0.0]  # first tokens
