"""The engine answers vLLM's serving code. A loop stands in for the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.engine_thread import Submission
from actors.serving.captured_sessions import CURRENT_CALL, CapturedSession, ServedCall
from actors.serving.front_engine import EngineParts, FrontEngine
from rlhf.agents.limits import SessionLimits
from rlhf.errors import RunError
from rlhf.types import Sampling

PROMPT = {"type": "token", "prompt_token_ids": [1, 2], "cache_salt": "the client's"}
SAMPLING = Sampling(max_new_tokens=9, temperature=0.7, top_p=0.8)


class Loop:
    """Remembers requests. A test gives their outputs."""

    def __init__(self) -> None:
        self.on_step: Callable[[Sequence[Any]], None] | None = None
        self.failure: RunError | None = None
        self.asked: list[tuple[Submission, Future[Any]]] = []
        self.aborted: list[str] = []

    def submit(self, submissions: Sequence[Submission]) -> list[Future[Any]]:
        self.asked += [(submission, Future()) for submission in submissions]
        return [future for _, future in self.asked[-len(submissions) :]]

    def abort(self, prefixes: Sequence[str]) -> Future[int]:
        self.aborted += prefixes
        return Future()

    def give(self, *parts: Any, finished: bool = False) -> None:
        """Make a step with an output of the last request, and an output of another request."""
        submission, future = self.asked[-1]
        output = SimpleNamespace(request_id=submission.request_id, outputs=parts, finished=finished)
        assert self.on_step is not None
        self.on_step([SimpleNamespace(request_id="group1-1", finished=True), output])
        if finished:
            future.set_result(output)


def part(ids: list[int], *, index: int = 0, reason: str | None = None, stop: Any = None, spans: Any = None) -> Any:
    logprobs = SimpleNamespace(logprobs=[-float(i) for i in ids], start_indices=range(len(ids)))
    versions = [SimpleNamespace(version=str(v), start=s, end=e) for v, s, e in spans or ()]
    return SimpleNamespace(
        index=index,
        token_ids=ids,
        text="".join(map(chr, ids)),
        logprobs=logprobs,
        finish_reason=reason,
        stop_reason=stop,
        weight_versions=versions or None,
    )


def wishes(**changes: Any) -> Any:
    """Sampling parameters as a client asks."""
    values: dict[str, Any] = {
        "temperature": 0.1,
        "seed": 99,
        "stop": ["<|end|>", "Q"],
        "stop_token_ids": [5],
        "max_tokens": 1000,
        "logprobs": None,
        "structured_outputs": None,
        "all_stop_token_ids": {0},
        "logit_bias": {1: 2.0},
        "ignore_eos": False,
    }
    return SimpleNamespace(**(values | changes))


def engine_over(loop: Loop) -> FrontEngine:
    config = SimpleNamespace(model_config=None)
    parts = EngineParts(vllm_config=config, renderer=None, input_processor=None, added={"<|end|>": 7}, ends=frozenset())
    return FrontEngine(loop, parts, ends=(8,), lora=lambda: "lora")


def open_session() -> CapturedSession:
    return CapturedSession(SAMPLING, SessionLimits(max_calls=5, max_tokens=99, seed=3), "session1-")


async def reading(loop: Loop, params: Any, call: ServedCall | None = None, prompt: Any = PROMPT) -> asyncio.Task[Any]:
    """Begin to read the answer to a call, by default a call with the server's own key."""

    async def read() -> list[Any]:
        CURRENT_CALL.set(call or ServedCall(None, "served1-"))
        return [output async for output in engine_over(loop).generate(prompt, params, "id")]

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    return task


async def test_outputs_of_every_step_are_yielded_and_captured() -> None:
    loop, session, params = Loop(), open_session(), wishes()
    with session.call() as call:
        call.is_chat = True
        task = await reading(loop, params, call)
        loop.give(part([65, 66]))
        loop.give(part([67], reason="stop", stop="C", spans=[(3, 0, 1), (4, 1, 3)]), finished=True)
        assert len(await task) == 2
    (captured,) = session.calls
    assert captured.prompt_ids.tolist() == [1, 2]
    assert captured.response_ids.tolist() == [65, 66, 67]
    assert captured.logprobs.tolist() == [-65.0, -66.0, -67.0]
    assert (captured.versions.tolist(), captured.finish_reason) == ([3, 4, 4], "stop")
    (submission, _) = loop.asked[0]
    assert submission.request_id == "session1-1-0"
    assert (submission.prompt_token_ids, submission.lora, submission.media) == ((1, 2), "lora", None)
    assert (params.temperature, params.top_p, params.seed, params.logit_bias) == (0.7, 0.8, 3, None)
    assert (params.max_tokens, params.logprobs, params.stop) == (9, 0, ["<|end|>", "Q"])
    assert set(params.stop_token_ids) == {5, 7, 8}
    assert params.all_stop_token_ids == {0, 7, 8}
    assert not loop.aborted


async def test_the_servers_own_calls_are_sampled_as_the_client_asks() -> None:
    loop, params = Loop(), wishes()
    image = {"type": "multimodal", "prompt_token_ids": [1], "mm_kwargs": "pixels"}
    task = await reading(loop, params, prompt=image)
    loop.give(part([65]), finished=True)
    await task
    assert (params.temperature, params.seed, params.max_tokens, params.logit_bias) == (0.1, 99, 1000, {1: 2.0})
    assert set(params.stop_token_ids) == {5, 7}
    assert loop.asked[0][0].media == {"type": "multimodal", "mm_kwargs": "pixels"}


async def test_a_client_that_ignores_ends_goes_on_after_the_end_of_a_turn() -> None:
    loop, params = Loop(), wishes(ignore_eos=True)
    task = await reading(loop, params, ServedCall(None, "served1-", is_chat=True))
    loop.give(part([65]), finished=True)
    await task
    assert set(params.stop_token_ids) == {5, 7}
    assert params.all_stop_token_ids == {0, 7}


async def test_responses_to_one_prompt_are_calls_of_their_own() -> None:
    loop, session = Loop(), open_session()
    with session.call(2) as call:
        task = await reading(loop, wishes(structured_outputs="a grammar"), call)
        loop.give(part([66], index=1, reason="stop"), part([65], reason="length"), finished=True)
        await task
    assert [one.response_ids.tolist() for one in session.calls] == [[65], [66]]
    assert [one.free.tolist() for one in session.calls] == [[False], [False]]


async def test_a_reader_that_goes_away_drops_its_request_and_a_failure_is_raised() -> None:
    loop = Loop()
    task = await reading(loop, wishes())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.aborted == [loop.asked[0][0].request_id]
    task = await reading(loop, wishes())
    loop.asked[-1][1].set_exception(RunError("it died"))
    with pytest.raises(RunError, match="it died"):
        await task
    assert loop.on_step is not None
    loop.on_step([])  # nothing waits
