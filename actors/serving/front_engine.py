"""The engine of this process in the form for vLLM's serving code, for requests over HTTP.

A session's requests are sampled with the run's settings. Each response is captured with all tokens before the client
gets the response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from actors.rollout.engine_thread import Submission
from actors.serving.captured_sessions import CURRENT_CALL, CapturedSession, Draw, ServedCall
from actors.serving.refusals import RefusedCall
from actors.vllm_patches.grammar_time import STEP_S
from rlhf.errors import RunError

NO_TEXT = (
    "the JSON schema or grammar of the request allows no token at some place, so no text can fulfil it, or takes over "
    f"{STEP_S} s for a token. Look for a definition that refers to itself without an end, for conditions that exclude "
    "each other, or for repetitions within repetitions"
)


class StepLoop(Protocol):
    """The request-answering part of an EngineLoop."""

    on_step: Callable[[Sequence[Any]], None] | None
    failure: RunError | None

    def submit(self, submissions: Sequence[Submission]) -> list[Future[Any]]: ...

    def abort(self, prefixes: Sequence[str]) -> Future[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """The parts of vLLM's engine for rendering requests."""

    vllm_config: Any
    renderer: Any
    input_processor: Any
    added: Mapping[str, int]  # special and added tokens by their text
    ends: frozenset[int]  # tokens with which the model ends a response


@dataclass(slots=True)
class _Response:
    """The tokens of one response so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    end: Any = None  # vLLM's last output of it

    def follow(self, part: Any) -> None:
        self.ids += part.token_ids
        self.logprobs += [part.logprobs.logprobs[start] for start in part.logprobs.start_indices]
        self.text += part.text
        self.end = part


class FrontEngine:
    """An EngineClient for vLLM's serving classes. The object belongs to the event loop of its creation."""

    is_running, is_stopped = True, False

    def __init__(self, loop: StepLoop, parts: EngineParts, *, ends: Collection[int], lora: Callable[[], Any]) -> None:
        self.loop = loop
        self.vllm_config = parts.vllm_config
        self.model_config = parts.vllm_config.model_config
        self.renderer = parts.renderer
        self.input_processor = parts.input_processor
        self.added = parts.added
        self.model_ends = parts.ends
        self.ends = ends  # tokens that end a turn of a conversation, besides the model's end token
        self.lora = lora  # returns vLLM's name for the current adapter
        self._events = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Queue[Any]] = {}
        loop.on_step = self._on_step

    @property
    def errored(self) -> bool:
        """Return whether the engine died. vLLM asks before each response."""
        return self.loop.failure is not None

    @property
    def dead_error(self) -> Exception:
        from vllm.exceptions import VLLMServerError

        error: Exception = VLLMServerError(str(self.loop.failure))
        return error

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Admit every request: the engine queues requests beyond its room."""

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[Any]:
        """Yield vLLM's outputs for one prompt. The request is dropped after the reader has gone."""
        call = CURRENT_CALL.get()
        given = prompt["prompt_token_ids"]
        if call.session is not None:
            self._sample_as_the_run(call.session, call, len(given), params)
        self._set_ends(call, params)
        responses: dict[int, _Response] = {}
        async for output in self._draw(f"{call.name}{next(call.serial)}", prompt, params):
            if params.structured_outputs is not None and any(part.finish_reason == "error" for part in output.outputs):
                raise RefusedCall(NO_TEXT, param="response_format")
            cut = [part for part in output.outputs if part.finish_reason == "length"]
            call.cut |= {part.index: np.array(part.token_ids, dtype=np.int64) for part in cut}
            if call.session is not None:
                for part in output.outputs:
                    responses.setdefault(part.index, _Response()).follow(part)
                if output.finished:
                    _capture(call.session, call, given, params, responses)
            yield output

    def _sample_as_the_run(
        self, session: CapturedSession, call: ServedCall, num_prompt_tokens: int, params: Any
    ) -> None:
        """Replace the client's settings that change probabilities, but not length, stop strings and structure."""
        sampling = session.sampling
        params.temperature, params.top_p = sampling.temperature, sampling.top_p
        params.top_k, params.min_p = sampling.top_k or 0, sampling.min_p
        params.repetition_penalty = sampling.repetition_penalty
        params.frequency_penalty = params.presence_penalty = 0.0
        params.logit_bias, params.bad_words, params.allowed_token_ids = None, [], None
        params.min_tokens, params.ignore_eos, params.thinking_token_budget = 0, False, None
        params.seed = session.next_seed()
        params.logprobs, params.flat_logprobs = max(0, params.logprobs or 0), True
        params.max_tokens = min(params.max_tokens, session.most_tokens(call, num_prompt_tokens))

    def _set_ends(self, call: ServedCall, params: Any) -> None:
        """Let stop strings' tokens end a response, and the template's end of a turn unless the client ignores ends."""
        ends = {self.added[text] for text in params.stop if text in self.added}
        if call.is_chat and not params.ignore_eos:
            ends.update(self.ends)
        params.stop_token_ids = [*dict.fromkeys([*(params.stop_token_ids or ()), *ends])]
        params.all_stop_token_ids.update(ends)

    async def _draw(self, name: str, prompt: Any, params: Any) -> AsyncIterator[Any]:
        queue = self._waiting[name] = asyncio.Queue()
        submission = Submission(
            request_id=name,
            prompt_token_ids=tuple(prompt["prompt_token_ids"]),
            params=params,
            lora=self.lora(),
        )
        (future,) = self.loop.submit([submission])
        future.add_done_callback(lambda done: self._events.call_soon_threadsafe(queue.put_nowait, done))
        finished = False
        try:
            while not finished:
                output = await queue.get()
                if isinstance(output, Future):  # failed or dropped: a finished output came before
                    output = output.result()
                finished = output.finished
                yield output
        finally:
            del self._waiting[name]
            if not finished:
                self.loop.abort([name])

    def _on_step(self, outputs: Sequence[Any]) -> None:
        """Pass a step's outputs to the event loop. The engine's thread calls this."""
        if self._waiting:
            self._events.call_soon_threadsafe(self._give, outputs)

    def _give(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            if (queue := self._waiting.get(output.request_id)) is not None:
                queue.put_nowait(output)


def _capture(
    session: CapturedSession, call: ServedCall, given: Sequence[int], params: Any, responses: Mapping[int, _Response]
) -> None:
    prompt_ids = np.array(given, dtype=np.int64)
    for _, response in sorted(responses.items()):
        if not response.ids:
            continue  # dropped before its first token
        end = response.end
        versions = np.zeros(len(response.ids), dtype=np.int32)
        for span in end.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        draw = Draw(
            prompt_ids=prompt_ids,
            response_ids=np.array(response.ids, dtype=np.int64),
            logprobs=np.array(response.logprobs, dtype=np.float32),
            versions=versions,
            restriction=None if params.structured_outputs is None else call.restriction or "structured_outputs",
            finish_reason=end.finish_reason,
            stop=end.stop_reason if isinstance(end.stop_reason, str) else "",
            text=response.text,
        )
        session.capture(call, draw)
