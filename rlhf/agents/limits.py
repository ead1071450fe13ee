"""Define the limits of an agent's session: of calls, enforced by the front, and of processes."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CONCURRENT_CALLS = 16
MAX_REQUEST_BYTES = 16 * 2**20
_BYTES_OF_TOKEN = 128  # of a long token in a request, with escapes
_PARTS_OF_REQUEST = 5_000  # besides the parts of the text
_REQUESTS_OF_CALL = 10  # with refused requests, and requests that sample nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """The limits of one session's calls, and the seed for sampling."""

    max_calls: int  # in the whole session
    max_tokens: int  # prompt and response of one call
    seed: int  # the seed of the first call; the seeds of later calls are derived from this seed
    concurrent_calls: int = MAX_CONCURRENT_CALLS
    takes_images: bool = False  # a request may hold images as data URIs

    @property
    def max_request_bytes(self) -> int:
        """Return the limit of a request's body, and of the bodies of all open requests together."""
        text = 2**20 + _BYTES_OF_TOKEN * self.max_tokens
        return MAX_REQUEST_BYTES if self.takes_images else min(MAX_REQUEST_BYTES, text)

    @property
    def max_request_parts(self) -> int:
        """Return the limit of a request's commas and opening brackets: the cost of reading depends on both."""
        return _PARTS_OF_REQUEST + self.max_tokens

    @property
    def max_requests(self) -> int:
        """Return the most requests in a session, and the most items of a list in a request, such as messages."""
        return 1000 + _REQUESTS_OF_CALL * self.max_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """The limits of all processes of a session together."""

    memory_gib: float  # also of what each process may map
    max_threads: int
    disk_gib: float  # also of each file
