"""Random states of one process, saved and restored for an exact resume. Nothing is seeded here."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """Return the random states of torch (with the GPU's), numpy and Python, as values of JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def restore_random_state(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(_bytes(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))


def _text(state: Tensor) -> str:
    return bytes(state.numpy()).hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
