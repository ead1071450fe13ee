"""Define the limits of an agent's session, which the server of its calls enforces."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CONCURRENT_CALLS = 16
MAX_REQUEST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """The limits of one session, and the seed of its sampling."""

    max_calls: int  # in the whole session
    max_tokens: int  # prompt and response of one call
    seed: int  # the seed of the first call; each later call has a seed derived from it
    concurrent_calls: int = MAX_CONCURRENT_CALLS
    max_request_bytes: int = MAX_REQUEST_BYTES
