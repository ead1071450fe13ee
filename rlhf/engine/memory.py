"""Memory at run time: peaks for the metrics, and advice when memory runs out.

A failed allocation ends the run with a message naming the stage and the keys that reduce memory. Nothing is retried.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.errors import RunError
from rlhf.role_table import ROLES, Role
from rlhf.types import MemoryReport

_GIB = 2**30
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED")


def peak_memory() -> MemoryReport:
    """Return the largest resident set and, on a GPU, the most memory held by the allocator."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB  # Linux counts in KiB
    gpu = torch.cuda.max_memory_reserved() / _GIB if torch.cuda.is_available() else None
    return MemoryReport(rss_gib=rss, gpu_gib=gpu)


@contextmanager
def explains_out_of_memory(*, role: Role, stage: str, rank: int, tokens: int | None = None) -> Iterator[None]:
    """Turn a failed allocation inside into a RunError. `tokens`: size of the current micro-batch, if any."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch = "" if tokens is None else f" with a micro-batch of {tokens} tokens"
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"{role} rank {rank} during {stage}{batch}"
        raise RunError(f"Out of memory: {where} ({reason}). {advice_on_memory(role)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation: by its type, or for torch on a CPU by its message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def advice_on_memory(role: Role) -> str:
    """Return a sentence with the keys for less memory of a role."""
    at, kind = f"cluster.roles.{role}", ROLES[role].kind
    if kind == "engines":
        keys = (
            f"a lower {at}.max_num_seqs, a lower {at}.kv_cache_gib (on a CPU) or {at}.gpu_memory_utilization, a higher "
            f"{at}.tensor_parallel (on GPUs)"
        )
    elif kind != "trained":
        keys = f"a lower train.max_tokens_per_microbatch, {role}.dtype=bfloat16, {at}.colocate_with=null (on GPUs)"
        if kind == "scoring":
            keys = f"a lower reward_policy.processes or reward_policy.memory_gib, {keys}"
    else:
        keys = (
            f"a lower train.max_tokens_per_microbatch, {role}.gradient_checkpointing=true, a higher {at}.zero_stage (2 "
            f"or 3) with more workers, {at}.sequence_parallel, {at}.offload=[optimizer] or [optimizer, parameters]"
        )
    return f"To reduce it, mildest first: {keys}."
