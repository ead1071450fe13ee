"""There is a text for each token, and the joined texts are the sampled text, for any tokens."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.records.texts import character_ends, response_texts, step_ends, token_texts
from rlhf.types import Rollouts

TEXT = "Zürich  日本\n\n👩\u200d👧 naïve <|eos|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def test_a_character_stands_with_the_token_that_completes_it(tokenizer: Any) -> None:
    """Whole text of many windows, random bytes, and text that ends within a character."""
    ids = [*"aü日".encode(), 257]
    assert token_texts(ids, tokenizer) == ["a", "", "ü", "", "", "日", "<|eos|>"]
    draw = random.Random(0)
    cases = [list(TEXT.encode() * 9), list("日".encode()[:2]), []]
    cases += [[draw.randrange(320) for _ in range(draw.randrange(1, 120))] for _ in range(200)]
    for ids in cases:
        texts = token_texts(ids, tokenizer)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("response", "separator", "steps"),
    [
        ("one\ntwo<|eos|>", "\n", ["one\n", "two<|eos|>"]),
        ("one\ntwo", "\n", ["one\n", "two"]),  # cut
        ("one\n\n two\n<|eos|>", "\n", ["one\n", "\n two\n"]),  # neither a blank line nor the end is a step
        ("one\ntwo\n\nthree", "\n\n", ["one\ntwo\n\n", "three"]),
        ("<|eos|>", "\n", ["<|eos|>"]),
        (" \n", "\n", [" \n"]),
    ],
)
def test_steps_end_where_a_separator_does(tokenizer: Any, response: str, separator: str, steps: list[str]) -> None:
    prompt = list(b"a\nb\n")
    sampled = [id for part in re.split(r"(<.*>)", response) for id in ([257] if part == "<|eos|>" else part.encode())]
    rows = [[*prompt, *sampled], [*prompt, 65]]
    mask = [place >= len(prompt) for row in rows for place in range(len(row))]
    lengths = torch.tensor([len(row) for row in rows])
    ends = step_ends(torch.tensor([*rows[0], *rows[1]]), lengths, torch.tensor(mask), tokenizer, separator=separator)
    assert ends.nonzero().flatten().tolist()[-1] == len(mask) - 1
    found = [place - len(prompt) + 1 for place in ends[: len(rows[0])].nonzero().flatten().tolist()]
    begun = [0, *found]
    texts = [tokenizer.decode(sampled[a:b], skip_special_tokens=False) for a, b in zip(begun, found, strict=False)]
    assert texts == steps


def conversations(*rows: list[tuple[bool, list[int]]]) -> Rollouts:
    """Return sequences of spans: whether sampled, and the tokens."""
    ids = [id for row in rows for _, span in row for id in span]
    return Rollouts(
        sequence_ids=torch.arange(len(rows)),
        lengths=torch.tensor([sum(len(span) for _, span in row) for row in rows]),
        token_ids=torch.tensor(ids),
        response_mask=torch.tensor([sampled for row in rows for sampled, span in row for _ in span]),
        rollout_logprobs=torch.zeros(len(ids)),
        versions=torch.zeros(len(ids), dtype=torch.int64),
    )


def test_characters_end_with_their_tokens(tokenizer: Any) -> None:
    """`aü` and the end of the turn, then `b` behind three tokens of the environment: `aü`, line break, `b`. ü is the
    tokens 3 and 4; the line break is the first turn's, and the whole ends with the special token at 10."""
    rollouts = conversations(
        [(False, [63, 63]), (True, [*"aü".encode(), 257]), (False, [1, 2, 3]), (True, [98, 257])],
        [(False, [63]), (True, [257])],
        [(False, [63]), (True, list(b"cut"))],
    )
    assert response_texts(rollouts, tokenizer, turn_end=None) == ["aü\nb", "", "cut"]
    assert character_ends(rollouts, tokenizer, turn_end=None) == [(2, 2, 4, 5, 10), (1,), (1, 1, 2, 3)]


def test_a_turns_end_that_is_no_special_token_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rollouts = conversations([(False, [63]), (True, [*b"a", end]), (False, [1]), (True, [*b"b", end])])
    assert tokenizer.decode([end], skip_special_tokens=True) == "<|im_end|>"
    assert response_texts(rollouts, tokenizer, turn_end=end) == ["a\nb"]
    assert character_ends(rollouts, tokenizer, turn_end=end) == [(1, 1, 2, 5)]


def test_every_character_of_any_response_has_an_end(tokenizer: Any) -> None:
    draw = random.Random(1)
    for _ in range(50):
        spans = [(index % 2 == 1, [draw.randrange(320) for _ in range(draw.randrange(1, 60))]) for index in range(4)]
        rollouts = conversations(spans)
        (text,), (ends,) = (made(rollouts, tokenizer, turn_end=65) for made in (response_texts, character_ends))
        assert len(ends) == len(text) + 1
        assert list(ends) == sorted(ends)
        assert bool(rollouts.response_mask[list(ends)].all())
