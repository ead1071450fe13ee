"""Built-in rewards for the form of a response: length and repetitions.

Rewards receive text, so lengths are in words or characters (`unit`) and never in tokens. Penalties on tokens belong to
an algorithm. Each function is called once per response, and parameters without a value in `args` are columns of the
data. Only `CosineLength` may read the answer, through another reward.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Unit = Literal["words", "characters"]


def length(response: str, unit: str) -> int:
    """Return the length of a response. ValueError for an unknown unit."""
    if unit not in get_args(Unit):
        raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(get_args(Unit))}")
    return len(response.split()) if unit == "words" else len(response.strip())


def length_penalty(prompt: str, response: str, limit: float, unit: Unit = "words") -> float:
    """Return a value from 0 for an empty response linearly down to -1 at the limit, and -1 beyond."""
    return -min(length(response, unit) / positive("limit", limit), 1.0)


def target_length(prompt: str, response: str, target: float, unit: Unit = "words") -> float:
    """Return minus the relative distance from the target, at least -1 (arXiv:2503.04697 with alpha = 1 / target)."""
    return -min(abs(length(response, unit) - positive("target", target)) / target, 1.0)


def overlong(prompt: str, response: str, limit: float, buffer: float, unit: Unit = "words") -> float:
    """Return the soft overlong penalty (arXiv:2503.14476, eq. 13): 0 up to limit - buffer, -1 from the limit on."""
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer ({buffer}) must be positive and at most limit ({limit})")
    return -min(max(length(response, unit) - (limit - buffer), 0.0) / buffer, 1.0)


def repetition_penalty(prompt: str, response: str, ngram: int = 3, max_penalty: float = 1.0) -> float:
    """Return minus the share of repeated word n-grams, times max_penalty. Without n-grams, return 0."""
    if ngram < 1:
        raise ValueError(f"ngram must be 1 or more, got {ngram}")
    words = response.lower().split()
    ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return -max_penalty * (1.0 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def cosine(length: float, limit: float, at_zero: float, at_limit: float) -> float:
    """Return a value from at_zero to at_limit along half a cosine (arXiv:2502.03373, CosFn)."""
    return at_limit + 0.5 * (at_zero - at_limit) * (1.0 + math.cos(math.pi * length / limit))


def positive(name: str, value: float) -> float:
    """Return the value. ValueError if the value is not positive."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return value
