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
    prompt_ids, response_ids = np.array(prompt, dtype=np.int64), np.array(response, dtype=np.int64)
    logprobs, versions = np.full(len(response), -1.0, dtype=np.float32), np.full(len(response), 3, dtype=np.int32)
    columns: Any = {"prompt_ids": prompt_ids, "response_ids": response_ids, "logprobs": logprobs, "versions": versions}
    return Draw(**columns, restriction=restriction, finish_reason="stop", stop=stop, text=text)


def assistant(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


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
    with session.call() as call:
        known = session.look_up(call, [SYSTEM, ASK, assistant(content, reasoning_content="anything"), ASK], None)
    assert known is not None
    assert (known.start, known.end, known.added) == (2, 3, "")
    assert session.tokens(known) == [1, 2, 3, 4]
    assert call.broke is None


@pytest.mark.parametrize(
    ("text", "arguments", "messages"),
    [
        ("", '{"a": 1, "b": 2}', [("", '{"b":2,"a":1}')]),  # in another form
        (None, '{"a": 1, "b": 2}', [(None, {"a": 1, "b": 2})]),  # as an object
        ("wait", "{}", [("wait", None), (None, "{}")]),  # text and call in two messages
    ],
)
def test_calls_are_known_without_their_ids_and_however_they_are_written(
    text: str | None, arguments: str, messages: list[Any]
) -> None:
    session = open_session()
    call = answer(session, [ASK], draw([1], [2, 3], text="<tool_call>...</tool_call>"), tools=["t"])
    session.hear(call, 0, text, [("add", arguments)])
    said = [
        assistant(text)
        if given is None
        else assistant(text, tool_calls=[{"id": "x", "function": {"name": "add", "arguments": given}}])
        for text, given in messages
    ]
    assert look_up(session, [ASK, *said, {"role": "tool", "tool_call_id": "x", "content": "3"}], ["t"]) == (0, None)


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        ([SYSTEM, ASK], None, (None, None)),  # a retry, or a conversation that begins
        ([SYSTEM, {"role": "user", "content": "few"}, assistant("shot"), ASK], None, (None, None)),
        ([SYSTEM, ASK, assistant("no"), ASK], None, (None, "edited history")),
        ([SYSTEM, {"role": "user", "content": "ha"}, assistant("yes"), ASK], None, (None, "edited history")),
        ([{"role": "system", "content": "T"}, ASK, assistant("yes"), ASK], None, (None, "other system prompt")),
        ([SYSTEM, ASK, assistant("yes"), ASK], ["tool"], (None, "other tools")),
        # The turn is still a prefix, and text that the session did not sample follows.
        ([SYSTEM, ASK, assistant("yes"), ASK, assistant("not sampled"), ASK], None, (0, "edited history")),
    ],
)
def test_why_a_prefix_broke(messages: list[Any], tools: Any, expected: Any) -> None:
    session = open_session()
    answer(session, [SYSTEM, ASK], draw([1, 2], [3, 4]))
    assert look_up(session, messages, tools) == expected


def test_a_stop_string_and_what_the_client_wrote_behind_it_are_continued() -> None:
    session = open_session()
    answer(session, [ASK], draw([1], [2, 3], text="Thought", stop="\nObs:"))
    with session.call() as call:
        known = session.look_up(call, [ASK, assistant("Thought\nObs: 42"), ASK], None)
    assert known is not None
    assert (known.call, known.added) == (0, " 42")


def test_of_two_answers_with_one_text_the_one_with_the_clients_reasoning_is_continued() -> None:
    session = open_session(max_calls=20)
    for index, thought in enumerate(("one", "one more", "two")):
        call = answer(session, [ASK], draw([1], [2, 10 + index, 3], text=f"<think>{thought}</think>yes"))
        session.hear(call, index, "yes", ())

    for index, thought in enumerate(("one", "one more", "two")):
        for name in ("reasoning", "reasoning_content"):
            assert look_up(session, [ASK, assistant("yes", **{name: f"{thought}\n"}), ASK]) == (index, None)
    # The newest turn matches: the client dropped the reasoning.
    assert look_up(session, [ASK, assistant("yes"), ASK]) == (2, None)
    # Both answers to the next question have one text and no reasoning. The client's first turn tells them apart.
    for first in ([1, 2, 10, 3], [1, 2, 12, 3]):
        answer(session, [ASK, assistant("yes"), ASK], draw([*first, 4], [5], text="no"))
    for index, thought in ((3, "one"), (4, "two")):
        begun = [ASK, assistant("yes", reasoning=thought), ASK]
        assert look_up(session, [*begun, assistant("no"), ASK]) == (index, None)


def test_captured_calls_and_their_seeds() -> None:
    session, other = open_session(), open_session()
    first = answer(session, [ASK], draw([1, 2], [3, 4]))
    answer(session, [], draw([1, 2, 3, 4, 5], [6], restriction="tool_choice"))
    assert (session.calls[1].free.tolist(), session.calls[1].restriction) == ([False], "tool_choice")
    assert session.calls[0].free.tolist() == [True, True]
    assert session.calls[0].versions.tolist() == [3, 3]
    assert 0.0 <= session.calls[0].ended_s <= session.calls[1].ended_s
    assert first.name == "session1-1-"
    seeds = [session.next_seed() for _ in range(3)]
    assert seeds == [other.next_seed() for _ in range(3)]
    assert (len(set(seeds)), seeds[0]) == (3, 5)


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
    with pytest.raises(RefusedCall, match="no open session has this key"):
        sessions.find("a")
    assert sessions.find("b") is other
