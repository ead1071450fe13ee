"""Groups of sessions become columns, and failures become records. The front needs no model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.agents.calls import Call
from rlhf.agents.limits import SessionLimits
from rlhf.agents.sessions import FUNCTION, AgentSessions, AgentSpec, session_end, task_of
from rlhf.controller.rollout_scorer import request_for
from rlhf.extensions import CodeSource
from rlhf.types import GroupRequest, Prompt, RolloutInfo, Rollouts, Sampling, SessionEnd
from tests.agent_programs import LIMITS, MANY
from tests.agent_sessions import call, session

SAMPLING = Sampling(max_new_tokens=8)


def spec(**changes: Any) -> AgentSpec:
    source = CodeSource(path=str(MANY), name="solve")
    values: dict[str, Any] = {
        "columns": ("mood",),
        "max_calls": 3,
        "max_tokens": 100,
        "timeout_s": 20.0,
        "processes": 8,
    }
    model: Any = {"tokenizer": "", "trust_remote_code": False}
    return AgentSpec(source=source, program=FUNCTION, process_limits=LIMITS, **model, **(values | changes))


def request(mood: str = "text", samples: int = 2, **columns: Any) -> GroupRequest:
    prompt = Prompt(prompt_id=3, token_ids=(63,), text="?", columns={"mood": mood, "answer": "4", **columns})
    return request_for(prompt, group_id=0, first_sequence_id=10, samples=samples, run_seed=0)


class FakeFront:
    """Gives each session the same calls."""

    def __init__(self, *calls: Call, exceeded: str | None = None) -> None:
        self.calls = calls
        self.exceeded = exceeded
        self.open_keys: set[str] = set()
        self.limits: list[SessionLimits] = []
        self.most_open = 0

    def open(self, key: str, sampling: Sampling, limits: SessionLimits) -> Any:
        assert sampling == SAMPLING
        self.open_keys.add(key)
        self.limits.append(limits)
        self.most_open = max(self.most_open, len(self.open_keys))
        is_over = asyncio.Event()
        if self.exceeded is not None:
            is_over.set()
        return SimpleNamespace(exceeded=self.exceeded, is_over=is_over)

    def close(self, key: str) -> list[Call]:
        self.open_keys.remove(key)
        return list(self.calls)


TWO_CALLS = (call([1, 2], [3, 4]), replace(call([1, 2, 3, 4, 5], [6]), broke="edited history"))


def group(
    asked: GroupRequest, front: FakeFront, used: AgentSpec | None = None
) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
    async def run() -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        sessions = AgentSessions(used or spec(), front, "http://127.0.0.1:9")
        await sessions.start()
        try:
            return await sessions.group(asked, SAMPLING)
        finally:
            await sessions.stop()

    found = asyncio.run(asyncio.wait_for(run(), 60.0))
    assert not front.open_keys
    return found


def test_a_session_becomes_a_sample_with_its_result() -> None:
    asked, front = request("files"), FakeFront(*TWO_CALLS)
    rollouts, infos = group(asked, front)
    assert rollouts.token_ids.tolist() == [1, 2, 3, 4, 5, 6] * 2
    assert rollouts.response_mask.int().tolist() == [0, 0, 1, 1, 0, 1] * 2
    assert [info.sequence_id for info in infos] == [10, 11]
    end = SessionEnd(result='{"src/main.py": "print(1)"}', num_calls=2, broken=("edited history",), restricted={})
    assert [(info.session, info.environment_error) for info in infos] == [(end, None)] * 2
    assert [(limits.seed, limits.max_calls) for limits in front.limits] == [(seed, 3) for seed in asked.seeds]


def test_sampled_tokens_under_a_grammar_are_counted_by_their_reason() -> None:
    free, forced = call([1], [2, 3]), call([1], [2, 3], fixed=(0, 1))
    end = session_end(session(free, forced, replace(forced, restriction="response_format"), forced))
    assert end.restricted == {"tool_choice": 4, "response_format": 2}


@pytest.mark.parametrize(
    ("mood", "front", "kind", "message"),
    [
        ("raise", FakeFront(*TWO_CALLS), "raised", "lost my way"),
        ("text", FakeFront(), "raised", "the agent ended without an answer of the model"),
        ("text", FakeFront(*TWO_CALLS, exceeded="max_calls"), "refused", "over rollouts.agent.max_calls: 3"),
        ("await", FakeFront(*TWO_CALLS, exceeded="max_calls"), "refused", "over rollouts.agent.max_calls: 3"),
    ],
)
def test_a_failure_is_a_record_and_no_result(mood: str, front: FakeFront, kind: str, message: str) -> None:
    _, infos = group(request(mood), front)
    for sample, info in enumerate(infos):
        error: Any = info.environment_error
        assert (error.reward, error.kind, error.prompt_id, error.sample) == ("agent", kind, 3, sample)
        assert message in error.message
        assert info.session is not None
        assert info.session.result is None


def test_no_more_sessions_are_open_than_allowed() -> None:
    front = FakeFront(*TWO_CALLS)
    group(request("text", samples=6), front, spec(processes=2))
    assert front.most_open == 2


def test_a_cancelled_group_closes_its_sessions() -> None:
    front = FakeFront(*TWO_CALLS)

    async def run() -> None:
        sessions = AgentSessions(spec(), front, "http://127.0.0.1:9")
        await sessions.start()
        working = asyncio.create_task(sessions.group(request("await"), SAMPLING))
        while len(front.open_keys) < 2:
            await asyncio.sleep(0.02)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await sessions.stop()

    asyncio.run(asyncio.wait_for(run(), 60.0))
    assert not front.open_keys


def test_an_agent_is_told_the_prompt_and_the_named_columns_only() -> None:
    assert task_of(request().prompt, ("mood",)) == {"prompt": "?", "mood": "text"}
    chat = Prompt(prompt_id=0, token_ids=(1,), text="<|user|>?", columns={"messages": [{"role": "user"}]}, is_chat=True)
    assert task_of(chat, ()) == {"messages": [{"role": "user"}]}


def test_another_agent_has_another_fingerprint() -> None:
    prints = {used.fingerprint() for used in (spec(), spec(max_calls=4), spec(columns=()), spec(timeout_s=1.0))}
    assert len(prints) == 3  # a time limit changes no tokens
