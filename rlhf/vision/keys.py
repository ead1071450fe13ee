"""Name images by their content, and write images into token ids.

In the token ids of prompts, sequences and batches, each embedded position of an image holds `-key`. All remaining
positions hold ordinary token ids. Equal token ids therefore mean equal words and equal images.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

_DIGITS = 15  # hexadecimal digits of a sha256: 60 bits, so that -key is an int64


def image_key(data: bytes) -> int:
    """Return the key of an image: the first 60 bits of the sha256 of its encoded bytes, at least 1."""
    return int(hashlib.sha256(data).hexdigest()[:_DIGITS], 16) or 1


def image_name(key: int) -> str:
    """Return the name of an image's file: the key as 15 hexadecimal digits."""
    return f"{key:0{_DIGITS}x}"


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is an image of a store."""
    return len(name) == _DIGITS and set(name) <= set("0123456789abcdef")


def image_keys(token_ids: Iterable[int]) -> tuple[int, ...]:
    """Return the keys of the distinct images in token ids, in the order of their first positions."""
    return tuple(dict.fromkeys(-token for token in token_ids if token < 0))


def image_mark(key: int) -> str:
    """Return what stands for an image in a text for people."""
    return f"[image {image_name(key)}]"


def runs(token_ids: Iterable[int]) -> Iterator[tuple[int | None, list[int]]]:
    """Yield the runs of token ids in order: of one image with the image's key, and of text with None."""
    for key, run in itertools.groupby(token_ids, lambda token: min(token, 0)):
        yield -key or None, list(run)


def decoded(token_ids: Iterable[int], tokenizer: Any, *, skip_special_tokens: bool = False) -> str:
    """Return token ids as text, with a mark in place of each run of an image."""
    texts = (
        str(tokenizer.decode(run, skip_special_tokens=skip_special_tokens)) if key is None else image_mark(key)
        for key, run in runs(token_ids)
    )
    return "".join(texts)
