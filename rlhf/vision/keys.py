"""Name images by their content, and write images into token ids.

In the token ids of prompts, sequences and batches, each embedded position of an image holds `-key`. All remaining
positions hold ordinary token ids. Equal token ids therefore mean equal words and equal images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

_DIGITS = 15  # hexadecimal digits of a sha256: 60 bits, so that -key is an int64


def image_key(data: bytes) -> int:
    """Return the key of an image: the first 60 bits of the sha256 of its encoded bytes, at least 1."""
    return int(hashlib.sha256(data).hexdigest()[:_DIGITS], 16) or 1


def image_name(key: int) -> str:
    """Return the name of an image's file: the key as 15 hexadecimal digits."""
    return f"{key:0{_DIGITS}x}"


def image_keys(token_ids: Iterable[int]) -> tuple[int, ...]:
    """Return the keys of the distinct images in token ids, in the order of their first positions."""
    return tuple(dict.fromkeys(-token for token in token_ids if token < 0))


def without_images(token_ids: Sequence[int]) -> list[int]:
    """Return the token ids without the positions of images, for decoding to text."""
    return [token for token in token_ids if token >= 0]
