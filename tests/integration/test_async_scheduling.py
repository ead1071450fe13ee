"""An engine that schedules the next step during a step, as on GPUs, samples correctly, also across updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from actors.weights.shm import ShmSender
from rlhf.types import Sampling
from tests.integration.engine_helpers import (
    AsyncEngine,
    BreakableEngine,
    call,
    engine,
    model_like,
    request,
    spanning,
    spec,
    sync,
    worst_difference,
)

pytestmark = pytest.mark.slow
LONG = Sampling(max_new_tokens=250)


def test_samples_are_those_of_an_engine_that_waits_for_each_step(tiny_model: Path, ray_local: None) -> None:
    model = model_like(tiny_model, seed=1)
    sender = ShmSender(rank=0)
    manifest = sender.publish(model.named_parameters(), 1)
    found = []
    for worker in (BreakableEngine, AsyncEngine):
        with engine(spec(tiny_model), worker=worker) as handle:
            sync(handle, manifest)
            drawing = handle.answer.remote(request(1, samples=8), LONG, 1)
            if worker is AsyncEngine:
                assert any(call(handle.steps_seen.remote(20)))
            found.append(call(drawing)[0])
    sender.close()
    waiting, overlapping = found
    assert torch.equal(waiting.token_ids, overlapping.token_ids)
    assert worst_difference(model, overlapping) < 1e-3


@pytest.mark.parametrize("kept", ["keep", "recompute"])
def test_no_token_of_old_weights_bears_the_version_of_new_ones(tiny_model: Path, ray_local: None, kept: str) -> None:
    old, new = model_like(tiny_model, seed=1), model_like(tiny_model, seed=2)
    sender = ShmSender(rank=0)
    with engine(spec(tiny_model, kv_after_update=kept), worker=AsyncEngine) as handle:
        sync(handle, sender.publish(old.named_parameters(), 1))
        running = handle.answer.remote(request(1, samples=8), LONG, 1)
        ready, _ = ray.wait([running], timeout=0.2)
        assert not ready
        assert any(call(handle.steps_seen.remote(20)))
        sync(handle, sender.publish(new.named_parameters(), 2))
        drawn = call(running)[0]
    sender.close()
    assert spanning(drawn, old, new, kept=kept == "keep") > 0
