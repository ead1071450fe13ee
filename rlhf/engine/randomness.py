"""Random states of one process, saved and loaded for an exact resume. Nothing is seeded here."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from rlhf.errors import UserError
from rlhf.tracking.run_folder.atomic import write_aside


def random_state() -> dict[str, Any]:
    """Return the random states of torch (with the GPU's), numpy and Python, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "python": (version, words, gauss),
    }


def restore_random_state(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


def save_random_state(path: Path) -> None:
    states = random_state()
    write_aside(path, lambda aside: torch.save(states, aside))


def load_random_state(path: Path) -> None:
    """Restore the saved random states. Raise UserError if the file holds anything else."""
    from rlhf.engine.checkpoint_files import load_data  # imports DeepSpeed

    states = load_data(path)
    try:
        restore_random_state(states)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold random states: {type(error).__name__}: {error}") from error
