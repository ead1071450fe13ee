"""Rewards for length and repetition, by numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.rewards.functions.length_shaping import cosine, length_penalty, overlong, repetition_penalty, target_length
from rlhf.rewards.functions.table import CosineLength
from rlhf.rewards.loading import load_reward


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


@pytest.mark.parametrize(
    ("reward", "args", "scores"),
    [
        (length_penalty, {"limit": 20}, {0: 0.0, 5: -0.25, 20: -1.0, 40: -1.0}),
        (target_length, {"target": 10}, {10: 0.0, 8: -0.2, 15: -0.5, 0: -1.0, 90: -1.0}),
        (overlong, {"limit": 100, "buffer": 20}, {0: 0.0, 80: 0.0, 85: -0.25, 99: -0.95, 100: -1.0, 300: -1.0}),
    ],
)
def test_lengths(reward: Callable[..., float], args: dict[str, float], scores: dict[int, float]) -> None:
    assert {count: reward("p", words(count), **args) for count in scores} == pytest.approx(scores)
    with pytest.raises(ValueError, match="must be positive"):
        reward("p", "a", **{name: 0 for name in args})
    with pytest.raises(ValueError, match="unit is 'tokens'"):
        reward("p", "a", **args, unit="tokens")
    assert length_penalty("p", " ab cd ", limit=10, unit="characters") == -0.5  # white space at the ends apart


@pytest.mark.parametrize(
    ("response", "ngram", "penalty"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b a b", 2, -0.6),  # ab ba ab ba ab: 2 of 5 are new
        ("A b a B", 2, -1 / 3),  # ab ba ab
        ("a a a a", 1, -0.75),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_penalty(response: str, ngram: int, penalty: float) -> None:
    assert repetition_penalty("p", response, ngram=ngram) == pytest.approx(penalty)
    assert repetition_penalty("p", response, ngram=ngram, max_penalty=0.5) == pytest.approx(penalty / 2)


def test_cosine_length() -> None:
    assert cosine(0, 10, 2.0, 1.0) == 2.0
    assert cosine(10, 10, 2.0, 1.0) == pytest.approx(1.0)
    assert cosine(10 / 3, 10, 2.0, 1.0) == pytest.approx(1.75)  # cos 60 degrees is a half: 1 + 0.5 * 1.5
    reward = CosineLength(limit=10, verifier="last_number")
    assert reward("p", "3", answer=3) == pytest.approx(cosine(1, 10, 2.0, 1.0))
    assert reward("p", "4", answer=3) == pytest.approx(cosine(1, 10, -10.0, 0.0))
    assert reward("p", "it is surely about 3", answer=3) == pytest.approx(1.5)
    assert reward("p", "it is surely about 4", answer=3) == pytest.approx(-5.0)
    assert reward("p", words(9) + " 3", answer=3) == -10.0


def test_cosine_length_reads_the_columns_of_its_verifier() -> None:
    args = {"limit": 10, "verifier": "regex_match", "verifier_args": {"pattern": "[0-9]+"}}
    loaded = load_reward("cosine_length", args=args, folders=[], key="k")
    assert (loaded.signature.required, loaded.signature.takes_all) == (("answer",), False)
    assert CosineLength(**args)("p", "it is 3", answer="3") > 1.0  # type: ignore[arg-type]
    for name in ("cosine_length", "none"):
        with pytest.raises(ValueError, match="another built-in"):
            CosineLength(limit=10, verifier=name)
