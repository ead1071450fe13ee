"""The experts recorded by an engine agree with the trainer's, and the replay brings sampler and trainer together."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.weights.shm import ShmSender
from rlhf.models.files.loading import load_causal_lm
from rlhf.models.files.weights import weight_sources
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.routers.replay import RouterReplay
from rlhf.types import RoutedRollouts, Sampling
from tests.fixtures.models import moved
from tests.integration.engine_helpers import call, engine, request, spec, sync
from tests.integration.recipes import rows, train, write_config
from tests.tiny_learners import build_tiny_mixture

pytestmark = pytest.mark.slow


def drawn(folder: Path, dtype: str) -> tuple[Any, list[RoutedRollouts]]:
    """Return a model, and groups sampled by an engine with the same weights. The second group's prompt is cached.

    The weights are large enough for clear decisions of routers and head.
    """
    model = moved(load_causal_lm(str(folder), dtype=getattr(torch, dtype)).requires_grad_(True), by=0.1)
    sender = ShmSender(rank=0)
    with engine(spec(folder, dtype=dtype, records_experts=True)) as handle:
        sync(handle, sender.publish((w for source in weight_sources(model) for w in source.published()), 1))
        asked = request(3, samples=16, prompt_tokens=40)
        groups = [call(handle.generate.remote(asked, Sampling(max_new_tokens=40)))[0] for _ in range(2)]
    sender.close()
    return model, groups


def by_trainer(model: Any, rollouts: RoutedRollouts, replay: RouterReplay | None) -> Tensor:
    """The trainer's log-probabilities of the sampled tokens, sequence by sequence."""
    found = []
    columns = (rollouts.token_ids, rollouts.experts)
    for ids, experts in zip(*(column.split(rollouts.lengths.tolist()) for column in columns), strict=True):
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0] = False
        lengths = torch.tensor([len(ids)])
        with torch.no_grad(), nullcontext() if replay is None else replay.of(experts):
            found.append(policy_logprobs_only(model, ids, lengths, mask=mask))
    return torch.cat(found)[rollouts.response_mask]


def test_replay_halves_the_difference_in_bfloat16(tmp_path: Path, ray_local: None) -> None:
    model, groups = drawn(build_tiny_mixture(tmp_path / "model"), "bfloat16")
    for rollouts in groups:
        ends = torch.zeros(len(rollouts.token_ids), dtype=torch.bool)
        ends[rollouts.lengths.cumsum(0) - 1] = True
        assert (rollouts.experts[ends] == -1).all()
        assert (rollouts.experts[~ends] >= 0).all()
    sampler = torch.cat([rollouts.rollout_logprobs[rollouts.response_mask] for rollouts in groups])
    own, replay = torch.cat([by_trainer(model, rollouts, None) for rollouts in groups]), RouterReplay(model)
    replayed = torch.cat([by_trainer(model, rollouts, replay) for rollouts in groups])
    without, with_it = (float((trainer - sampler).abs().mean()) for trainer in (own, replayed))
    assert with_it < 0.5 * without, (without, with_it)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("correction", [None, {"mode": "decoupled", "weights": "token_truncated"}])
def test_a_run_replays_the_experts_of_its_engines(tmp_path: Path, correction: dict[str, Any] | None) -> None:
    """The replay also covers the pass for old_logprobs before the updates: two updates need that pass."""
    changes = {
        "run": {"name": "run", "dir": str(tmp_path), "seed": 0},
        "policy": {"model": str(build_tiny_mixture(tmp_path / "model")), "router_replay": True},
        "algorithm": {"name": "grpo", "correction": correction},
        "rewards": {"digits": {"function": "format_regex", "args": {"pattern": ".*[0-9].*"}}},
    }
    train(write_config(tmp_path / "run.yaml", changes))
    found = [row for row in rows(tmp_path / "run") if row["step"] > 0]
    assert len(found) == 4
    assert max(row["experience/rollout_logprob_diff/max"] for row in found) < 1e-3
