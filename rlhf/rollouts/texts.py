"""Sampled tokens as text: for rewards, samples and people. Never for training, which takes the tokens as they are."""

from __future__ import annotations

from typing import Any

from rlhf.types import Rollouts


def response_texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Each response as text, without the special tokens that end it."""
    sequences = zip(
        rollouts.token_ids.split(rollouts.lengths.tolist()),
        rollouts.response_mask.split(rollouts.lengths.tolist()),
        strict=True,
    )
    decoded: list[str] = tokenizer.batch_decode(
        [ids[mask].tolist() for ids, mask in sequences], skip_special_tokens=True
    )
    return decoded
