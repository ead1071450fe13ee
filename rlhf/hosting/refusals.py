"""Define the refusals of a call: actors.serving.tinker answers each with a status of its own."""

from __future__ import annotations


class Gone(Exception):
    """The session is over, or was never begun here. The protocol's answer is 410."""


class NotFound(Exception):
    """There is no such model, sampler or request of this key."""


class TooMany(Exception):
    """The client must wait before the next request."""


class Forgotten(Exception):
    """The result of a request is no longer kept. The client may send the request anew."""
