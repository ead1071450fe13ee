"""The trainer's log-probabilities of a probe sequence. Every weight sync is verified with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.engine.base import TrainingEngine
from rlhf.models.packed import policy_logprobs_only


def probe_logprobs(engine: TrainingEngine, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probabilities of token_ids[1:] at temperature 1, under the weights as published. Collective."""
    ids = torch.tensor(list(token_ids), device=engine.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0] = False
    with torch.no_grad():
        logprobs = engine.forward(policy_logprobs_only, ids, torch.tensor([len(ids)], device=engine.device), mask=mask)
    result: list[float] = logprobs[1:].float().tolist()
    return result
