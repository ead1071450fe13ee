"""Digests of requests: they tell after a resume whether spooled tokens and stored scores belong to a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from rlhf.types import GroupRequest, RolloutInfo, Sampling


def request_identity(request: GroupRequest, sampling: Sampling) -> dict[str, str]:
    """Return the inputs of a request its tokens depend on, except the weights."""
    return {
        "sampling": json.dumps(asdict(request.drawn_by(sampling))),
        "prompt_token_ids": json.dumps(request.prompt.token_ids),
        "turn_end": json.dumps(request.prompt.turn_end),
        "seeds": json.dumps(request.seeds),
        "first_sequence_id": json.dumps(request.first_sequence_id),
    }


def scored_identity(request: GroupRequest, sampling: Sampling, infos: Sequence[RolloutInfo]) -> str:
    """Return a digest of the inputs of a group's scores, except weights and rewards.

    It includes the row and the sampled responses.
    """
    prompt = request.prompt
    inputs = (request_identity(request, sampling), prompt.text, dict(prompt.columns), tuple(infos))
    return hashlib.blake2b(repr(inputs).encode(errors="surrogatepass"), digest_size=16).hexdigest()
