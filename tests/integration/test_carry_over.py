"""Interrupted and continued responses equal uninterrupted responses, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoTokenizer, PreTrainedModel

from actors.weights.shm import ShmSender
from rlhf.rollouts.records.begun import read_begun
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling
from tests.integration.engine_helpers import (
    AsyncEngine,
    BreakableEngine,
    call,
    engine,
    model_like,
    request,
    sequences,
    spec,
    sync,
)

Group = tuple[Rollouts, tuple[RolloutInfo, ...]]
PLAIN = Sampling(max_new_tokens=120)
FILTERED = Sampling(max_new_tokens=120, temperature=0.8, top_p=0.95, top_k=100, min_p=0.001, repetition_penalty=1.1)
CUTS = (30, 60, 90)  # tokens after which the responses are interrupted


class Policy:
    """A policy with the same weights in every version, and the policy's engine with a spool."""

    def __init__(self, handle: Any, model: PreTrainedModel, spool: Path) -> None:
        self.handle, self.model, self.spool = handle, model, spool
        self.sender = ShmSender(rank=0)
        self.version = 0

    def sync(self) -> None:
        self.version += 1
        sync(self.handle, self.sender.publish(self.model.named_parameters(), self.version))

    def start(self, requests: list[GroupRequest], sampling: Sampling) -> list[Any]:
        call(self.handle.hold.remote())
        refs = [self.handle.generate.options(num_returns=1).remote(r, sampling) for r in requests]
        call(self.handle.release.remote(len(requests)))
        return refs

    def answer(self, requests: list[GroupRequest], sampling: Sampling) -> list[Group]:
        return ray.get(self.start(requests, sampling), timeout=120)  # type: ignore[no-any-return]

    def interrupted(self, requests: list[GroupRequest], sampling: Sampling) -> tuple[list[Group], list[list[int]]]:
        """Return the groups after three interruptions, and each response's length at the last interruption."""
        for cut in CUTS:
            self.sync()
            refs = self.start(requests, sampling)
            call(self.handle.interrupt.remote([r.group_id for r in requests], cut))
            assert ray.get(refs, timeout=120) == [(None, None)] * len(requests)
            requests = [replace(r, group_id=r.group_id + 100, continues=r.group_id) for r in requests]
        self.sync()
        begun = [read_begun(self.spool, request, sampling) or () for request in requests]
        return self.answer(requests, sampling), [[len(one.token_ids) for one in group] for group in begun]


@pytest.fixture(
    scope="module",
    params=[BreakableEngine, pytest.param(AsyncEngine, marks=pytest.mark.slow)],
    ids=["waits", "overlaps"],
)
def policy(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None
) -> Iterator[Policy]:
    spool = tmp_path_factory.mktemp("spool")
    with engine(spec(tiny_model, spool=spool, carries_over=True), worker=request.param) as handle:
        found = Policy(handle, model_like(tiny_model, seed=1), spool)
        found.sync()
        yield found
        found.sender.close()


@pytest.mark.parametrize(("first", "sampling"), [(1000, PLAIN), (2000, FILTERED)], ids=["plain", "filtered"])
def test_interrupted_responses_equal_uninterrupted_ones(policy: Policy, first: int, sampling: Sampling) -> None:
    requests = [request(first + group, samples=8) for group in range(2)]
    whole = policy.answer(requests, sampling)
    continued, lengths = policy.interrupted([replace(r, group_id=r.group_id + 10) for r in requests], sampling)
    versions: set[int] = set()
    for (expected, expected_infos), (found, infos), begun in zip(whole, continued, lengths, strict=True):
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert torch.allclose(found.rollout_logprobs, expected.rollout_logprobs, atol=1e-4)
        assert [i.finish_reason for i in infos] == [i.finish_reason for i in expected_infos]
        for sequence, info, length in zip(sequences(found), infos, begun, strict=True):
            by_token = sequence["versions"][sequence["response_mask"]].tolist()
            newest = info.num_response_tokens - length
            assert by_token == sorted(by_token)
            assert by_token[length:] == [policy.version] * newest
            assert policy.version not in by_token[:length]
            assert (info.min_version, info.max_version) == (by_token[0], by_token[-1])
            versions.update(by_token)
    assert versions == set(range(policy.version - 3, policy.version + 1))


def test_a_stop_string_is_found_across_an_interruption(policy: Policy, tiny_model: Path) -> None:
    """The stop string begins before the first interruption and ends afterwards. Finished responses do not change."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = request(3000, samples=8)
    ((rollouts, _),) = policy.answer([plain], PLAIN)
    responses = [s["token_ids"][s["response_mask"]].tolist() for s in sequences(rollouts)]
    long = next(tokens for tokens in responses if len(tokens) > 100)
    early = next(tokens for tokens in responses if len(tokens) > 100 and tokens != long)
    stops = (tokenizer.decode(long[20:50]), tokenizer.decode(early[10:14]))
    sampling = replace(PLAIN, stop=stops)
    ((expected, expected_infos),) = policy.answer([replace(plain, group_id=3010)], sampling)
    lengths = [info.num_response_tokens for info in expected_infos]
    assert 50 in lengths
    assert any(length < CUTS[0] for length in lengths)
    ((found, infos),), _ = policy.interrupted([replace(plain, group_id=3020)], sampling)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert [i.finish_reason for i in infos] == [i.finish_reason for i in expected_infos]
