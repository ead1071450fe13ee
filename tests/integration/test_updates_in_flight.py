"""Updates that retain keys and values of running samples are correct, and no new sample reuses old keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.weights.shm import ShmSender
from tests.integration.engine_helpers import (
    SAMPLING,
    call,
    continued,
    engine,
    logprobs_of,
    model_like,
    request,
    sequences,
    spec,
    sync,
    worst_difference,
)

SAMPLES = 16  # as many as the engine runs at once
BYTES_PER_TOKEN = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, their size, float32


@pytest.fixture(scope="module")
def keeping(tiny_model: Path, ray_local: None) -> Iterator[Any]:
    with engine(spec(tiny_model, kv_after_update="keep", max_num_seqs=SAMPLES)) as handle:
        yield handle


def test_an_engine_tells_what_it_holds(keeping: Any) -> None:
    capacity = call(keeping.capacity.remote())
    assert capacity.samples == SAMPLES
    assert capacity.cache_tokens % 32 == 0  # whole blocks
    assert 0.9 < capacity.cache_tokens * BYTES_PER_TOKEN / (0.25 * 2**30) <= 1.0


def test_kept_keys_and_values_serve_running_samples_alone(keeping: Any, tiny_model: Path) -> None:
    """Later samples reuse no old key or value, not even samples that were queued in the engine during the update."""
    old, new = model_like(tiny_model, seed=1), model_like(tiny_model, seed=2)
    sender = ShmSender(rank=0)
    sync(keeping, sender.publish(old.named_parameters(), 1))
    probe = [65 + i % 57 for i in range(48)]
    group = request(1, samples=SAMPLES, prompt_tokens=200)  # its prompt fills several blocks
    longer = replace(SAMPLING, max_new_tokens=250)
    running = keeping.answer.remote(group, longer, 1)
    waiting = keeping.answer.remote(replace(group, group_id=2), longer, 1)
    ready, _ = ray.wait([running, waiting], num_returns=1, timeout=0.2)
    assert not ready
    sync(keeping, sender.publish(new.named_parameters(), 2))
    (told,) = torch.tensor([call(keeping.probe.remote(probe))])
    assert (told - logprobs_of(new, torch.tensor(probe))[1:]).abs().max() < 1e-3
    assert call(keeping.health.remote()).requests_in_flight > SAMPLES  # the probe went before the waiting samples
    later, _ = call(keeping.answer.remote(replace(group, group_id=3, seeds=group.seeds[:4]), SAMPLING, 1))
    assert set(later.versions.tolist()) == {-1, 2}
    assert worst_difference(new, later) < 1e-3

    spans = 0
    for sequence in sequences(call(running)[0]):
        first = int((sequence["versions"] == 2).int().argmax())
        if sequence["versions"][first] == 2:
            ours, theirs = continued(old, new, sequence["token_ids"], first), sequence["rollout_logprobs"][first:]
            assert (ours - theirs).abs().max() < 1e-3
            spans += float((logprobs_of(new, sequence["token_ids"])[first:] - theirs).abs().mean()) > 1e-2
    assert spans > 0
    started_later = [s for s in sequences(call(waiting)[0]) if set(s["versions"].tolist()) == {-1, 2}]
    assert started_later
    for sequence in started_later:
        sampled = sequence["response_mask"]
        ours = logprobs_of(new, sequence["token_ids"])[sampled]
        assert (ours - sequence["rollout_logprobs"][sampled]).abs().max() < 1e-3
    sender.close()
