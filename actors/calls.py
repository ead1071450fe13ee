"""Waiting for workers: every wait has a deadline, and every failure names stage, role, rank and cause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ray import ObjectRef
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from rlhf.errors import RunError, UserError


async def wait_all(refs: Sequence[ObjectRef[Any]], *, role: str, stage: str, deadline_s: float) -> list[Any]:
    """The results, in order. The first failure is raised at once, whatever the others still do."""
    began = time.monotonic()
    futures = [asyncio.ensure_future(asyncio.wrap_future(ref.future())) for ref in refs]
    try:
        done, pending = await asyncio.wait(futures, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        for rank, future in enumerate(futures):
            if future in done and future.exception() is not None:
                raise explain(future.exception(), role=role, rank=rank, stage=stage)
        if pending:
            late = [rank for rank, future in enumerate(futures) if future in pending]
            raise RunError(
                f"{stage}: {role} rank {', '.join(map(str, late))} gave no answer in "
                f"{time.monotonic() - began:.0f} s (cluster.call_timeout_s). It hangs, or the limit is too "
                "short for the work. The run can be resumed with --resume auto."
            )
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def wait_one(ref: ObjectRef[Any], *, role: str, rank: int, stage: str, deadline_s: float) -> Any:
    """One worker's result."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout=deadline_s)
    except TimeoutError as error:
        raise RunError(
            f"{stage}: {role} {rank} gave no answer in {deadline_s:.0f} s (cluster.call_timeout_s). "
            "The run can be resumed with --resume auto."
        ) from error
    except (RayTaskError, RayActorError) as error:
        raise explain(error, role=role, rank=rank, stage=stage) from error


def explain(error: BaseException | None, *, role: str, rank: int, stage: str) -> Exception:
    """The same failure in the words of the run."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, UserError):
            return UserError(str(cause))
        told = str(cause) if isinstance(cause, RunError) else f"{type(cause).__name__}: {cause}"
        failure = RunError(f"{stage}: {role} rank {rank} failed: {told}")
        failure.__cause__ = error
        return failure
    if isinstance(error, ActorDiedError | ActorUnavailableError | RayActorError):
        last = str(error).strip().splitlines()
        reason = next((line.strip() for line in last if "reason" in line.lower() or "exit" in line.lower()), "")
        failure = RunError(
            f"{stage}: {role} rank {rank} died. {reason}".rstrip()
            + " The run can be resumed with --resume auto from its last checkpoint."
        )
        failure.__cause__ = error
        return failure
    failure = RunError(f"{stage}: {role} rank {rank} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
