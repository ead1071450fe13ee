"""Held-out sets once more with the images exchanged among the rows: a model that sees does worse there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from rlhf.data.examples import Example
from rlhf.data.images import RowImages
from rlhf.errors import UserError
from rlhf.types import Prompt
from rlhf.vision.sight import exchanged_among

R = TypeVar("R")
SUFFIX = ".exchanged"


def with_exchanged(
    sets: Mapping[str, tuple[R, ...]], images: RowImages | None, *, key: str
) -> dict[str, tuple[R, ...]]:
    """Return the sets, and each set with images once more with exchanged images, as NAME.exchanged.

    UserError: no set has images, or the rows are neither prompts nor examples.
    """
    added: dict[str, tuple[Any, ...]] = {}
    for name, rows in sets.items():
        known = [row for row in rows if isinstance(row, Prompt | Example)]
        if len(known) < len(rows):
            raise UserError(
                f"{key}: only the images of prompts and SFT examples can be exchanged, and this set has pairs. Remove "
                "the setting."
            )
        if images is not None and any(min(row.token_ids) < 0 for row in known):
            token_ids = exchanged_among([row.token_ids for row in known], images.reader.store)
            added[f"{name}{SUFFIX}"] = tuple(replace(row, token_ids=i) for row, i in zip(known, token_ids, strict=True))
    if not added:
        raise UserError(f"{key}: has no effect, since no held-out set has images. Remove the setting.")
    return {**sets, **added}
