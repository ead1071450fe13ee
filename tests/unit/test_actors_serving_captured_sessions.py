"""Sessions recognise turns, explain broken prefixes, enforce limits and capture calls. There is no server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.serving.captured_sessions import CapturedSession, CapturedSessions, Draw, ServedCall
from actors.serving.refusals import RefusedCall
from rlhf.agents.limits import SessionLimits
from rlhf.types import Sampling

SAMPLING = Sampling(max_new_tokens=50)
SYSTEM, ASK = {"role": "system", "content": "S"}, {"role": "user", "content": "hi"}


def open_session(**limits: Any) -> CapturedSession:
    values = {"max_calls": 9, "max_tokens": 100, "seed": 5} | limits
    return CapturedSession(SAMPLING, SessionLimits(**values), "session1-")


def draw(prompt: list[int], response: list[int], *, text: str = "yes", stop: str = "", restriction: Any = None) -> Draw:
    return Draw(
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        logprobs=np.full(len(response), -1.0, dtype=np.float32),
        versions=np.full(len(response), 3, dtype=np.int32),
        restriction=restriction,
        finish_reason="stop",
        stop=stop,
        text=text,
    )


def answer(session: CapturedSession, messages: list[Any], drawn: Draw, tools: Any = None) -> ServedCall:
    with session.call() as call:
        session.look_up(call, messages, tools)
        session.capture(call, drawn)
        return call


def look_up(session: CapturedSession, messages: list[Any], tools: Any = None) -> tuple[int | None, str | None]:
    """Return the call of the known turn, and the reason for a broken prefix."""
    with session.call() as call:
        known = session.look_up(call, messages, tools)
        return (None if known is None else known.call), call.broke


@pytest.mark.parametrize("content", ["yes", "  yes\n", [{"type": "text", "text": "yes"}]])
def test_an_own_turn_is_known_by_its_text(content: Any) -> None:
    session = open_session()
    answer(session, [SYSTEM, ASK], draw([1, 2], [3, 4], text=" yes "))
    said = {"role": "assistant", "content": content, "reasoning_content": "anything"}
    with session.call() as call:
        known = session.look_up(call, [SYSTEM, ASK, said, ASK], None)
    assert known is not None
    assert (known.start, known.end, known.added) == (2, 3, "")
    assert session.tokens(known) == [1, 2, 3, 4]
    assert call.broke is None


def test_calls_are_known_without_their_ids_and_however_their_arguments_are_written() -> None:
    session = open_session()
    call = answer(session, [ASK], draw([1], [2, 3], text="<tool_call>...</tool_call>"), tools=["t"])
    session.hear(call, 0, "", [("add", '{"a": 1, "b": 2}')])
    function = {"name": "add", "arguments": '{"b":2,"a":1}'}
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "another", "function": function}]}
    result = {"role": "tool", "tool_call_id": "another", "content": "3"}
    assert look_up(session, [ASK, said, result], ["t"]) == (0, None)
    as_object = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]}
    assert look_up(session, [ASK, as_object, result], ["t"]) == (0, None)


def test_text_and_calls_in_two_messages_are_one_turn() -> None:
    session = open_session()
    call = answer(session, [ASK], draw([1], [2, 3]))
    session.hear(call, 0, "wait", [("add", "{}")])
    parts = [
        {"role": "assistant", "content": "wait"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
    ]
    assert look_up(session, [ASK, *parts, {"role": "tool", "content": "3"}]) == (0, None)


def test_why_a_prefix_broke() -> None:
    session = open_session(max_calls=20)
    said = {"role": "assistant", "content": "yes"}
    answer(session, [SYSTEM, ASK], draw([1, 2], [3, 4]))
    assert look_up(session, [SYSTEM, ASK]) == (None, None)  # a retry, or a conversation that begins
    shot = [{"role": "user", "content": "few"}, {"role": "assistant", "content": "shot"}]
    assert look_up(session, [SYSTEM, *shot, ASK]) == (None, None)
    assert look_up(session, [SYSTEM, ASK, {"role": "assistant", "content": "no"}, ASK]) == (None, "edited history")
    assert look_up(session, [SYSTEM, {"role": "user", "content": "ha"}, said, ASK]) == (None, "edited history")
    other = {"role": "system", "content": "T"}
    assert look_up(session, [other, ASK, said, ASK]) == (None, "other system prompt")
    assert look_up(session, [SYSTEM, ASK, said, ASK], ["tool"]) == (None, "other tools")
    foreign = {"role": "assistant", "content": "not sampled"}
    # Its own turn is still a prefix, and text that the session did not sample follows.
    assert look_up(session, [SYSTEM, ASK, said, ASK, foreign, ASK]) == (0, "edited history")


def test_a_stop_string_and_what_the_client_wrote_behind_it_are_continued() -> None:
    session = open_session()
    answer(session, [ASK], draw([1], [2, 3], text="Thought", stop="\nObs:"))
    with session.call() as call:
        known = session.look_up(call, [ASK, {"role": "assistant", "content": "Thought\nObs: 42"}, ASK], None)
    assert known is not None
    assert (known.call, known.added) == (0, " 42")


def test_of_two_answers_with_one_text_the_one_with_the_clients_reasoning_is_continued() -> None:
    session = open_session(max_calls=20)
    for index, thought in enumerate(("one", "one more", "two")):
        call = answer(session, [ASK], draw([1], [2, 10 + index, 3], text=f"<think>{thought}</think>yes"))
        session.hear(call, index, "yes", ())

    def said(thought: str | None, name: str = "reasoning") -> dict[str, Any]:
        return {"role": "assistant", "content": "yes"} | ({} if thought is None else {name: f"{thought}\n"})

    for index, thought in enumerate(("one", "one more", "two")):
        assert look_up(session, [ASK, said(thought), ASK]) == (index, None)
        assert look_up(session, [ASK, said(thought, "reasoning_content"), ASK]) == (index, None)
    assert look_up(session, [ASK, said(None), ASK]) == (2, None)  # the newest: the client dropped the reasoning
    # Both answers to the next question have one text and no reasoning. The client's first turn tells them apart.
    for first in ([1, 2, 10, 3], [1, 2, 12, 3]):
        answer(session, [ASK, said(None), ASK], draw([*first, 4], [5], text="no"))
    after = {"role": "assistant", "content": "no"}
    assert look_up(session, [ASK, said("one"), ASK, after, ASK]) == (3, None)
    assert look_up(session, [ASK, said("two"), ASK, after, ASK]) == (4, None)


def test_captured_calls() -> None:
    session = open_session()
    first = answer(session, [ASK], draw([1, 2], [3, 4]))
    answer(session, [], draw([1, 2, 3, 4, 5], [6], restriction="tool_choice"))
    assert (session.calls[1].free.tolist(), session.calls[1].restriction) == ([False], "tool_choice")
    assert session.calls[0].free.tolist() == [True, True]
    assert session.calls[0].versions.tolist() == [3, 3]
    assert 0.0 <= session.calls[0].ended_s <= session.calls[1].ended_s
    assert first.name == "session1-1-"


def test_limits() -> None:
    session = open_session(max_calls=2, concurrent_calls=1)
    with pytest.raises(RefusedCall, match="asks for 2 responses, more than 1"), session.call(2):
        pass
    with session.call() as call:
        with pytest.raises(RefusedCall, match="1 calls of the session are being answered") as refused, session.call():
            pass
        assert (refused.value.status, session.exceeded) == (429, None)
        assert session.most_tokens(call, 60) == 40
        assert session.most_tokens(call, 20) == 50  # the run's max_new_tokens
        call.most_tokens = 7
        assert session.most_tokens(call, 20) == 7
        with pytest.raises(RefusedCall, match="it may have 100") as refused:
            session.most_tokens(call, 100)
        assert (refused.value.status, session.exceeded) == (400, "max_tokens")
    with session.call():
        pass
    with pytest.raises(RefusedCall, match="may make 2 calls") as refused, session.call():
        pass
    assert (refused.value.status, session.exceeded) == (429, "max_calls")


def test_each_draw_has_a_seed_of_its_own_and_the_same_again() -> None:
    first, second = open_session(), open_session()
    seeds = [first.next_seed() for _ in range(3)]
    assert seeds == [second.next_seed() for _ in range(3)]
    assert len(set(seeds)) == 3
    assert seeds[0] == 5


def test_a_closed_session_is_unknown_and_its_calls_are_dropped() -> None:
    dropped: list[str] = []
    sessions = CapturedSessions(dropped.append)
    limits = SessionLimits(max_calls=1, max_tokens=9, seed=0)
    session, other = sessions.open("a", SAMPLING, limits), sessions.open("b", SAMPLING, limits)
    assert session.name != other.name
    with pytest.raises(ValueError, match="used already"):
        sessions.open("a", SAMPLING, limits)
    answer(session, [ASK], draw([1], [2]))
    (call,) = sessions.close("a")
    assert call.response_ids.tolist() == [2]
    assert dropped == [session.name]
    assert sessions.find("a") is None
    assert sessions.find("b") is other
