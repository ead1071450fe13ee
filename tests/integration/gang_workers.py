"""What tests of workers on gangs of ranks share: a configuration, groups of responses, and comparisons of metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.files.load import checked
from rlhf.config.schema.root import Config
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import Rollouts
from tests.integration.recipes import merge

GROUPS, SAMPLES, PROMPT, MOST_NEW = 6, 3, 5, 9
Metrics = list[dict[str, float]]


def worker_config(
    algorithm: Mapping[str, Any],
    model: str,
    folder: str,
    *,
    tokens: int,
    workers: int = 1,
    is_online: bool = True,
    **sections: Any,
) -> Config:
    """Return the configuration of a policy in float32 whose step is two minibatches. `sections` change their keys."""
    online = {
        "data": {"max_prompt_tokens": PROMPT},
        "rollouts": {"prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_new_tokens": MOST_NEW},
        "rewards": {"r": {"function": "f"}},
    }
    base = {
        "run": {"name": "workers", "dir": folder},
        "policy": {"model": model, "dtype": "float32"},
        "algorithm": algorithm,
        "data": {"train": "x.jsonl", "apply_chat_template": False},
        "train": {
            "steps": 2,
            "lr": 1e-2,
            "sequences_per_update": GROUPS * SAMPLES // 2,
            "max_tokens_per_microbatch": tokens,
            "grad_clip": 100.0,
        },
        "cluster": {"roles": {"policy": {"workers": workers}}},
    }
    tree = merge(merge(base, online if is_online else {}), sections)
    return next(iter(checked(Config.model_validate(tree)).stages.values()))


def rollouts_of(group: int) -> Rollouts:
    """Return a group's responses, of 1 to 9 tokens."""
    random = torch.Generator().manual_seed(group)
    prompt = torch.randint(3, 300, (PROMPT,), generator=random)
    sizes = [int(torch.randint(1, MOST_NEW + 1, (), generator=random)) for _ in range(SAMPLES)]
    responses = [torch.randint(3, 300, (size,), generator=random) for size in sizes]
    mask = torch.cat([torch.arange(PROMPT + size) >= PROMPT for size in sizes])
    return Rollouts(
        sequence_ids=torch.arange(group * SAMPLES, (group + 1) * SAMPLES),
        lengths=torch.tensor([PROMPT + size for size in sizes]),
        token_ids=torch.cat([part for response in responses for part in (prompt, response)]),
        response_mask=mask,
        rollout_logprobs=torch.where(mask, -5.0, 0.0),
        versions=torch.where(mask, 0, -1),
    )


def merged(found: Sequence[Sequence[Any]]) -> Metrics:
    """Return the metrics of each part, over all ranks."""
    return [results(merge_metrics(parts)) for parts in zip(*found, strict=True)]


def assert_equal(one: Metrics, two: Metrics, *, keys: Collection[str] = (), rel: float = 2e-4) -> None:
    """Compare all metrics or those of `keys`, up to rounding.

    The number of tokens differs: a prompt may be computed for fewer responses, and a rank without rows computes one.
    """
    for first, second in zip(one, two, strict=True):
        assert keys or first.keys() == second.keys()
        for key in keys or first.keys() - {"update/tokens/total"}:
            assert first[key] == pytest.approx(second[key], rel=rel, abs=rel / 100), key


class PlainTraining:
    """Plain AdamW on a model of transformers."""

    def __init__(self, model: Any, *, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def step(self, loss: Tensor) -> float:
        """Make an optimizer step on a loss. Return the norm of the gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 100.0)
        self.optimizer.step()
        return norm.item()
