"""Sampled tokens as text: for rewards, samples and people. Never for training, which takes the tokens as they are."""

from __future__ import annotations

from typing import Any

from rlhf.rollouts.spans import pieces
from rlhf.tracking.samples import SampleTurn
from rlhf.types import Rollouts


def response_texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Each response as text, without the special tokens that end it; of a conversation the policy's turns, a line break
    between two."""
    spans = [[ids for sampled, ids in sequence if sampled] for sequence in pieces(rollouts)]
    decoded: list[str] = tokenizer.batch_decode([ids for turns in spans for ids in turns], skip_special_tokens=True)
    texts = iter(decoded)
    return ["\n".join([next(texts) for _ in turns]) for turns in spans]


def turns_of(rollouts: Rollouts, tokenizer: Any) -> list[tuple[SampleTurn, ...]]:
    """Each sequence turn by turn, special tokens written out: the prompt, then policy and environment in turn."""
    return [
        tuple(
            SampleTurn(
                role="policy" if sampled else "prompt" if index == 0 else "environment",
                text=tokenizer.decode(ids, skip_special_tokens=False),
                tokens=len(ids),
                sampled=sampled,
            )
            for index, (sampled, ids) in enumerate(sequence)
        )
        for sequence in pieces(rollouts)
    ]
