"""Built-in rewards for the form of a response: its length and its repetitions.

Rewards get text, so lengths are in words or characters (`unit`), never in tokens: what a response may cost in tokens is
an algorithm's business. Each function is called once a response; those of its parameters that `args` does not fix are
columns of the data. Nothing here may read the answer but `CosineLength`, which asks another reward.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Unit = Literal["words", "characters"]


def length(response: str, unit: str) -> int:
    """Of a response. ValueError for a unit that does not exist."""
    if unit not in get_args(Unit):
        raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(get_args(Unit))}")
    return len(response.split()) if unit == "words" else len(response.strip())


def length_penalty(prompt: str, response: str, limit: float, unit: Unit = "words") -> float:
    """From 0 for an empty response straight down to -1 at the limit, and -1 beyond."""
    return -min(length(response, unit) / _positive("limit", limit), 1.0)


def target_length(prompt: str, response: str, target: float, unit: Unit = "words") -> float:
    """Minus the distance from the target as a share of it, at least -1 (arXiv:2503.04697 with alpha = 1 / target)."""
    return -min(abs(length(response, unit) - _positive("target", target)) / target, 1.0)


def overlong(prompt: str, response: str, limit: float, buffer: float, unit: Unit = "words") -> float:
    """Soft punishment of long responses (arXiv:2503.14476, eq. 13): 0 up to limit - buffer, -1 from the limit on."""
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer ({buffer}) must be positive and at most limit ({limit})")
    return -min(max(length(response, unit) - (limit - buffer), 0.0) / buffer, 1.0)


def repetition_penalty(prompt: str, response: str, ngram: int = 3, max_penalty: float = 1.0) -> float:
    """Minus the share of word n-grams that occurred before, times max_penalty. 0 for a response without any n-gram."""
    if ngram < 1:
        raise ValueError(f"ngram must be 1 or more, got {ngram}")
    words = response.lower().split()
    ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return -max_penalty * (1.0 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def cosine(length: float, limit: float, at_zero: float, at_limit: float) -> float:
    """From at_zero to at_limit along half a cosine (arXiv:2502.03373, CosFn, named by its ends)."""
    return at_limit + 0.5 * (at_zero - at_limit) * (1.0 + math.cos(math.pi * length / limit))


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return value
