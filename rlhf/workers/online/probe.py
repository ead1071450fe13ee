"""What the trainer says of the probe, by which every weight sync is proven."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.engine.base import TrainingEngine
from rlhf.models.packed import policy_logprobs_only


def probe_logprobs(engine: TrainingEngine, token_ids: Sequence[int]) -> list[float]:
    """Log-probabilities of token_ids[1:] at temperature 1, by the weights as the engines get them. Collective."""
    ids = torch.tensor(list(token_ids), device=engine.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0] = False
    with torch.no_grad():
        logprobs = engine.forward(policy_logprobs_only, ids, torch.tensor([len(ids)], device=engine.device), mask=mask)
    result: list[float] = logprobs[1:].float().tolist()
    return result
