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
from rlhf.types import Role

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
def explains_out_of_memory(*, role: Role, stage: str, rank: int, tokens: int | None = None) -> Iterator[None]:
    """Turn a failed allocation inside into a RunError. `tokens`: of the micro-batch at work, where there is one."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch = "" if tokens is None else f" with a micro-batch of {tokens} tokens"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"Out of memory: {role} rank {rank} during {stage}{batch} ({reason}). {what_shrinks(role)}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, a GPU's, or torch's on a CPU, which is told by its text alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def what_shrinks(role: Role) -> str:
    """The keys that make a role smaller, as a sentence."""
    at = f"cluster.roles.{role}"
    if role == "rollout":
        keys = (
            f"a lower {at}.max_num_seqs, a lower {at}.kv_cache_gib (on a CPU) or {at}.gpu_memory_utilization, a higher "
            f"{at}.tensor_parallel (on GPUs)"
        )
    elif role in ("reference", "teacher", "reward"):
        keys = f"a lower train.max_tokens_per_microbatch, {role}.dtype=bfloat16, {at}.colocate_with=null (on GPUs)"
    else:
        keys = (
            f"a lower train.max_tokens_per_microbatch, {role}.gradient_checkpointing=true, a higher {at}.zero_stage (2 "
            f"or 3) with more workers, {at}.sequence_parallel, {at}.offload=[optimizer] or [optimizer, parameters]"
        )
    return f"What shrinks it, mildest first: {keys}."
