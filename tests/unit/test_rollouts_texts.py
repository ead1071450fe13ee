"""A text for each token: what stands joined is what was sampled, whatever the tokens cut through."""

from __future__ import annotations

import random

import pytest

from rlhf.models.tiny import byte_tokenizer
from rlhf.rollouts.texts import token_texts

TEXT = "Zürich  日本\n\n👩\u200d👧 naïve <|eos|>"


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return byte_tokenizer()


def test_a_character_stands_with_the_token_that_completes_it(tokenizer: object) -> None:
    """Of the bytes of ü and 日, all but the last have no text; a special token is one text."""
    ids = [*"aü日".encode(), 257]
    assert token_texts(ids, tokenizer) == ["a", "", "ü", "", "", "日", "<|eos|>"]


def test_bytes_that_are_no_text_are_joined_as_they_are_decoded(tokenizer: object) -> None:
    """Whole text of many windows, random bytes, and text that ends within a character."""
    draw = random.Random(0)
    cases = [list(TEXT.encode() * 9), list("日".encode()[:2]), []]
    cases += [[draw.randrange(320) for _ in range(draw.randrange(1, 120))] for _ in range(200)]
    for ids in cases:
        texts = token_texts(ids, tokenizer)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]
