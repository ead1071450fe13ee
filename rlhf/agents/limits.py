"""Define the limits of an agent's session: of its calls, which the front enforces, and of its processes."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CONCURRENT_CALLS = 16
MAX_REQUEST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """The limits of one session's calls, and the seed of its sampling."""

    max_calls: int  # in the whole session
    max_tokens: int  # prompt and response of one call
    seed: int  # the seed of the first call; each later call has a seed derived from it
    concurrent_calls: int = MAX_CONCURRENT_CALLS
    max_request_bytes: int = MAX_REQUEST_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """The limits of what all processes of one session use together."""

    memory_gib: float  # also of what each process may map
    max_threads: int
    disk_gib: float  # also of each file
