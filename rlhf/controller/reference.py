"""Provide reference logprobs of fixed data: read from disk, or computed once before the first step.

    data sets -> reference logprobs -> disk

The reference is the policy before training. Its ranks compute the logprobs before a checkpoint is restored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.controller.record import RunRecord
from rlhf.roles import OfflineRole, Ref
from rlhf.types import MinibatchPlan, TokenValues

logger = logging.getLogger(__name__)


async def provide_reference(
    role: OfflineRole,
    sets: Sequence[Sequence[Any]],
    record: RunRecord,
    *,
    folder: Path,
    plan: Callable[[Sequence[Any]], MinibatchPlan],
    tokens_at_once: int,
) -> None:
    """Give the role the reference's columns for every data set. `plan` distributes rows over the ranks."""
    for index, rows in enumerate(sets):
        path = folder / f"{await role.reference_key(index)}.safetensors"
        if path.exists():
            if await role.read_reference(index, path):
                logger.info("reference log-probabilities of data set %d are those in %s", index, path)
                continue
            logger.warning("%s is damaged or belongs to other weights; it is computed again", path)
        columns: list[Ref[TokenValues]] = []
        done = 0
        for chunk in _chunks(rows, tokens_at_once):
            columns += await role.reference_logprobs(index, plan(chunk))
            done += len(chunk)
            record.progress.stage("reference", done, len(rows))
        await role.keep_reference(index, path, columns)
        logger.info("reference log-probabilities of %d rows are written to %s", len(rows), path)


def _chunks(rows: Sequence[Any], tokens_at_once: int) -> Iterator[Sequence[Any]]:
    """Yield adjacent rows with about `tokens_at_once` tokens. Each chunk is one call, with its own deadline."""
    start = size = 0
    for index, row in enumerate(rows):
        size += len(row.token_ids)
        if size >= tokens_at_once:
            yield rows[start : index + 1]
            start, size = index + 1, 0
    if start < len(rows):
        yield rows[start:]
