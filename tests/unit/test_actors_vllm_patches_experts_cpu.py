"""A token's experts stay the choice of the first computation, even after a second computation of the request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from actors.vllm_patches import experts_cpu
from actors.vllm_patches.experts_cpu import RecordedExperts

BLOCK = 4


class Runner:
    """The parts of vLLM's runner for the record. Each step computes tokens of one request by given weights."""

    def __init__(self) -> None:
        shape = SimpleNamespace(get_total_num_hidden_layers=lambda: 1, get_num_experts_per_tok=lambda: 1)
        self.model_config = shape
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[None])
        self.cache_config = SimpleNamespace(block_size=BLOCK, num_gpu_blocks=8)
        self.requests: dict[str, Any] = {}

    def get_model(self) -> None:
        return None

    def _update_states(self, scheduled: Any) -> None:
        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        for name, blocks, num_tokens in scheduled.given:
            self.requests[name] = SimpleNamespace(block_ids=(blocks,), num_tokens=num_tokens)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(experts_cpu, "bind_routed_experts_capturer", lambda *_: None)
    return Runner()


def step(
    runner: Runner,
    record: RecordedExperts,
    monkeypatch: pytest.MonkeyPatch,
    *,
    given: list[tuple[str, list[int], int]],
    computed: range,
    version: int,
    preempted: tuple[str, ...] = (),
) -> None:
    """Compute tokens of the request in `given`. The version of the weights is the number of each expert."""
    runner._update_states(SimpleNamespace(finished_req_ids=(), preempted_req_ids=set(preempted), given=given))
    ((_, blocks, num_tokens),) = given
    slots = torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in computed])
    context = SimpleNamespace(slot_mapping={"layer": slots})
    monkeypatch.setattr(experts_cpu, "get_forward_context", lambda: context)
    record.capture(0, torch.full((len(slots), 1), version))
    runner.requests[given[0][0]].num_tokens = num_tokens + 1  # one is sampled


def test_a_request_computed_again_keeps_its_first_choices(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RecordedExperts(runner)
    step(runner, record, monkeypatch, given=[("a-0", [1, 2], 3)], computed=range(3), version=1)  # the prompt
    step(runner, record, monkeypatch, given=[("a-0", [1, 2], 4)], computed=range(3, 4), version=1)
    again = {"given": [("a-0", [5, 1], 5)], "preempted": ("a-0",)}  # in other places, and after that once more
    step(runner, record, monkeypatch, computed=range(5), version=2, **again)  # type: ignore[arg-type]
    step(runner, record, monkeypatch, given=[("a-0", [5, 1], 6)], computed=range(5, 6), version=2)
    again = {"given": [("a-0", [3, 4], 7)], "preempted": ("a-0",)}
    step(runner, record, monkeypatch, computed=range(7), version=3, **again)  # type: ignore[arg-type]
    assert record.of("a", 7)[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 3]
    assert record.of("a", 3)[:, 0, 0].tolist() == [1, 1, 1]


def test_a_request_that_waits_through_two_updates_keeps_its_first_choices(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later requests fill the places of the waiting request."""
    record = RecordedExperts(runner)
    step(runner, record, monkeypatch, given=[("a-0", [1, 2], 5)], computed=range(5), version=1)
    step(runner, record, monkeypatch, given=[("b-0", [1, 2], 8)], computed=range(8), version=2, preempted=("a-0",))
    step(runner, record, monkeypatch, given=[("b-0", [3, 2, 6], 9)], computed=range(9), version=3, preempted=("b-0",))
    step(runner, record, monkeypatch, given=[("a-0", [1, 4], 6)], computed=range(6), version=3)
    assert record.of("a", 6)[:, 0, 0].tolist() == [1] * 5 + [3]
    assert record.of("b", 9)[:, 0, 0].tolist() == [2] * 8 + [3]
