"""Memory at run time: peaks for the metrics, and what to change when it runs out.

Wraps what workers do with a model. It frees nothing and retries nothing: an allocation that failed ends the run with a
message that names what was being allocated and the keys that would shrink it.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlhf.errors import RunError

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Of this process so far, GiB."""

    rss_gib: float
    gpu_gib: float | None  # None: no GPU


def peak_memory() -> PeakMemory:
    """Largest resident set and, on a GPU, the most memory that the allocator held."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB  # Linux counts in KiB
    return PeakMemory(
        rss_gib=rss, gpu_gib=torch.cuda.max_memory_reserved() / _GIB if torch.cuda.is_available() else None
    )


@contextmanager
def explains_out_of_memory(*, role: str, stage: str, rank: int, tokens: int | None = None) -> Iterator[None]:
    """Turn a failed allocation inside into a RunError. `tokens`: of the micro-batch at work, where there is one."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(_explanation(error, role=role, stage=stage, rank=rank, tokens=tokens)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise RunError(_explanation(error, role=role, stage=stage, rank=rank, tokens=tokens)) from error


def _explanation(error: BaseException, *, role: str, stage: str, rank: int, tokens: int | None) -> str:
    batch = "" if tokens is None else f" with a micro-batch of {tokens} tokens"
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"Out of memory: {role} rank {rank} during {stage}{batch} ({reason}). What shrinks it, mildest first: a lower "
        f"train.max_tokens_per_microbatch, {role}.gradient_checkpointing=true, a higher "
        f"cluster.roles.{role}.zero_stage (2 or 3) with more workers, cluster.roles.{role}.sequence_parallel, "
        f"cluster.roles.{role}.offload=[optimizer] or [optimizer, parameters]."
    )
