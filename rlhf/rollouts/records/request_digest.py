"""What makes an answered request the same one after a resume: spooled tokens and written scores speak for no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from rlhf.types import GroupRequest, RolloutInfo, Sampling


def request_identity(request: GroupRequest, sampling: Sampling) -> dict[str, str]:
    """All that its tokens depend on besides the weights."""
    return {
        "sampling": json.dumps(asdict(request.drawn_by(sampling))),
        "prompt_token_ids": json.dumps(request.prompt.token_ids),
        "turn_end": json.dumps(request.prompt.turn_end),
        "seeds": json.dumps(request.seeds),
        "first_sequence_id": json.dumps(request.first_sequence_id),
    }


def scored_identity(request: GroupRequest, sampling: Sampling, infos: Sequence[RolloutInfo]) -> str:
    """Digest of all that its scores depend on besides weights and rewards: also the row, and the responses drawn."""
    prompt = request.prompt
    told = (request_identity(request, sampling), prompt.text, dict(prompt.columns), tuple(infos))
    return hashlib.blake2b(repr(told).encode(errors="surrogatepass"), digest_size=16).hexdigest()
