"""Sessions of agents at an engine: limits, calls token by token, and the turns for later prompts to continue.

A session has a key. A client sends a conversation back as text. If a message is a turn sampled in the session, the next
prompt begins with the sampled tokens themselves. Text of a sampled turn is never tokenised again.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.serving.refusals import RefusedCall
from rlhf.agents.calls import BrokenPrefix, Call, Restriction
from rlhf.agents.limits import SessionLimits
from rlhf.rollouts.environments.conversations import turn_seed
from rlhf.types import Sampling

MAX_OPEN_REQUESTS = 64  # of one session, of any kind
_JSON = json.JSONEncoder(default=str)  # made once: `json.dumps` would make an encoder for each text
Message = Mapping[str, Any]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A captured response to a prompt."""

    prompt_ids: Tokens
    response_ids: Tokens
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    restriction: Restriction | None  # the reason for a grammar that restricted the tokens; None: no grammar
    finish_reason: str
    stop: str  # the stop string at the end of the tokens, which the text lacks; empty: none
    text: str


@dataclass(frozen=True, slots=True)
class KnownTurn:
    """A sampled turn that a message of a later conversation repeats."""

    start: int  # the messages of the turn are messages[start:end]
    end: int
    call: int  # index of the call that sampled the turn
    added: str  # what the client wrote behind the turn, within its message


@dataclass(slots=True)
class ServedCall:
    """One request over HTTP. vLLM renders, draws and parses a request in several tasks, which share this object."""

    session: CapturedSession | None  # None: the call has the client's settings, and is not captured
    name: str  # prefix of its requests in the engine
    most_tokens: int | None = None  # the client's limit of a response
    is_chat: bool = False
    key: bytes | None = None  # of the messages before the response; None: the prompt is no conversation
    broke: BrokenPrefix | None = None
    restriction: Restriction | None = None  # the reason for a grammar
    serial: Iterator[int] = field(default_factory=itertools.count)
    drawn: dict[bytes, int] = field(default_factory=dict)  # indices of captured calls by their sampled tokens
    cut: dict[int, Tokens] = field(default_factory=dict)  # responses in one part that a limit of tokens cut off

    def was_cut(self, ids: Sequence[int]) -> bool:
        return any(np.array_equal(cut, ids) for cut in self.cut.values())

    def hear(self, ids: Tokens, content: str | None, calls: Sequence[tuple[str, str]]) -> None:
        """Record the client's view of sampled tokens: the text, and the calls as (name, arguments)."""
        if self.session is not None and (call := self.drawn.get(ids.tobytes())) is not None:
            self.session.hear(self, call, content, calls)


CURRENT_CALL: ContextVar[ServedCall] = ContextVar("current_call")


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request of a session, from the head to the end of the answer."""

    session: CapturedSession
    until: asyncio.Timeout  # the end of the session
    num_bytes: int = 0  # of its body so far

    def hold(self, num_bytes: int) -> None:
        """Note how much of the body has arrived. RefusedCall: the session's open requests are too large together."""
        self.num_bytes = num_bytes
        self.session.refuse_large_requests()


class CapturedSession:
    """A session that accepts calls. `exceeded` names the limit behind a refusal, and `is_over` is set then."""

    def __init__(self, sampling: Sampling, limits: SessionLimits, name: str) -> None:
        self.sampling = sampling
        self.limits = limits
        self.name = name
        self.exceeded: str | None = None
        self.is_over = asyncio.Event()
        self.calls: list[Call] = []  # in the order of their ends
        self.requests: set[OpenRequest] = set()
        self._num_requests = 0
        self._began = time.monotonic()
        self._num_started = 0
        self._serial = itertools.count()  # of the draws
        self._in_flight = 0
        self._turns: dict[bytes, list[int]] = {}  # calls by the key of the conversation that ends with their response
        self._stopped: dict[bytes, dict[int, str]] = {}  # by the key before it, calls with text and stop string
        self._draws: list[Draw] = []  # of each call
        self._told: set[bytes] = set()  # contents of all responses, without the messages before
        self._asked: set[bytes] = set()  # keys of the conversations that were answered
        self._tools: set[bytes] = set()
        self._systems: set[bytes] = set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[OpenRequest]:
        """Enter a request of any kind. RefusedCall: a limit forbids the request, or the session ends first."""
        self._num_requests += 1
        if self._num_requests > self.limits.max_requests:
            self._exceed("max_calls")
            raise RefusedCall(f"the session may send {self.limits.max_requests} requests", status=429)
        if len(self.requests) == MAX_OPEN_REQUESTS:
            raise RefusedCall(f"{MAX_OPEN_REQUESTS} requests of the session are open already", status=429)
        try:
            async with asyncio.timeout(None) as until:
                self.requests.add(request := OpenRequest(self, until))
                try:
                    yield request
                finally:
                    self.requests.remove(request)
        except TimeoutError as error:
            if until.expired():
                raise RefusedCall("the session has ended", code="invalid_api_key", status=401) from error
            raise

    def refuse_large_requests(self) -> None:
        """Raise RefusedCall if the bodies of the open requests are too large together."""
        most = self.limits.max_request_bytes
        if sum(request.num_bytes for request in self.requests) > most:
            raise RefusedCall(f"the open requests of the session have more than {most} bytes", status=429)

    def _exceed(self, limit: str) -> None:
        self.exceeded = limit
        self.is_over.set()

    @contextmanager
    def call(self, num_responses: int = 1) -> Iterator[ServedCall]:
        """Enter a request. Each response counts as a call. RefusedCall: a limit forbids the request."""
        if num_responses > self.limits.concurrent_calls:
            most = self.limits.concurrent_calls
            raise RefusedCall(f"the request asks for {num_responses} responses, more than {most}", param="n")
        if self._num_started + num_responses > self.limits.max_calls:
            self._exceed("max_calls")
            raise RefusedCall(f"the session may make {self.limits.max_calls} calls (max_calls)", status=429)
        if self._in_flight + num_responses > self.limits.concurrent_calls:
            raise RefusedCall(f"{self._in_flight} calls of the session are being answered already", status=429)
        self._num_started += num_responses
        self._in_flight += num_responses
        try:
            yield ServedCall(self, f"{self.name}{self._num_started}-")
        finally:
            self._in_flight -= num_responses

    def next_seed(self) -> int:
        return turn_seed(self.limits.seed, next(self._serial))

    def most_tokens(self, call: ServedCall, num_prompt_tokens: int) -> int:
        """Return the limit of a response. RefusedCall: the prompt alone exceeds the session's limit."""
        room = self.limits.max_tokens - num_prompt_tokens
        if room < 1:
            raise self.too_long(f"the prompt has {num_prompt_tokens} tokens")
        return min(room, self.sampling.max_new_tokens, call.most_tokens or room)

    def too_long(self, prompt: str) -> RefusedCall:
        """Return the refusal of a prompt beyond the session's limit. The refusal ends the session."""
        self._exceed("max_tokens")
        return RefusedCall(f"{prompt}. With its response it may have {self.limits.max_tokens} tokens (max_tokens)")

    def look_up(self, call: ServedCall, messages: Sequence[Message], tools: Any) -> KnownTurn | None:
        """Return the session's last turn in a conversation, and record in `call` whether the turn's prefix broke."""
        tools_key = key = _key(b"", tools)
        known, last, looks_own = None, None, False
        for start, end in _turns(messages):
            before = key
            if messages[start]["role"] != "assistant":
                key = _key(key, messages[start]["role"], _text(messages[start].get("content")))
                continue
            content, calls = _said(messages[start:end])
            key, last = turn_key(key, content, calls), end
            looks_own = looks_own or before in self._asked or turn_key(b"", content, calls) in self._told
            fits = self._fits(before, key, content, calls)
            if fits:
                index = self._best([*fits], _reasoning(messages[start:end]), known)
                known = KnownTurn(start, end, index, fits[index])
        call.key = key
        system = _key(b"", [_text(m.get("content")) for m in messages if m["role"] == "system"])
        if looks_own and (known is None or known.end != last):
            call.broke = (
                "other tools"
                if tools_key not in self._tools
                else "other system prompt"
                if system not in self._systems
                else "edited history"
            )
        self._tools.add(tools_key)
        self._systems.add(system)
        return known

    def _fits(self, before: bytes, key: bytes, content: str, calls: Sequence[tuple[str, Any]]) -> dict[int, str]:
        """Return the calls whose response is repeated in a turn, each with the text that the client added behind."""
        if key in self._turns:
            return dict.fromkeys(self._turns[key], "")
        if calls:
            return {}
        # Some clients write the stop string back, or continue the text after it.
        stopped = self._stopped.get(before, {})
        return {index: content[len(text) :] for index, text in stopped.items() if content.startswith(text)}

    def _best(self, indices: Sequence[int], reasoning: str, known: KnownTurn | None) -> int:
        """Return the call, among calls with equal visible text, with the reasoning that the client repeats.

        Of several such calls, return the shortest response, since it has no further reasoning. If the client repeats no
        reasoning, return a call that continues the previous known turn, or the newest call.
        """
        whole = np.array([] if known is None or len(indices) == 1 else self.tokens(known), dtype=np.int64)

        def fit(index: int) -> tuple[bool, int, bool, int]:
            repeats = bool(reasoning) and reasoning in self._draws[index].text
            goes_on = np.array_equal(self.calls[index].prompt_ids[: len(whole)], whole)
            return repeats, -len(self._draws[index].text) if repeats else 0, goes_on, index

        return max(indices, key=fit)

    def tokens(self, known: KnownTurn) -> list[int]:
        call = self.calls[known.call]
        return [*call.prompt_ids.tolist(), *call.response_ids.tolist()]

    def capture(self, call: ServedCall, draw: Draw) -> None:
        """Keep a response before the client's next request, which may continue the response."""
        call.drawn[draw.response_ids.tobytes()] = len(self.calls)
        self.calls.append(
            Call(
                prompt_ids=draw.prompt_ids,
                response_ids=draw.response_ids,
                logprobs=draw.logprobs,
                versions=draw.versions,
                free=np.full(len(draw.response_ids), draw.restriction is None),
                restriction=draw.restriction,
                finish_reason=draw.finish_reason,
                ended_s=time.monotonic() - self._began,
                broke=call.broke,
            )
        )
        self._draws.append(draw)
        call.hear(draw.response_ids, draw.text, ())  # the client's view, unless a parser records another

    def hear(self, call: ServedCall, index: int, content: str | None, calls: Sequence[tuple[str, str]]) -> None:
        """Record the text and the tool calls that the client gets for a captured response."""
        if call.key is None:
            return
        self._asked.add(call.key)
        self._told.add(turn_key(b"", content, calls))
        indices = self._turns.setdefault(turn_key(call.key, content, calls), [])
        if index not in indices:
            indices.append(index)
        if stop := self._draws[index].stop:
            self._stopped.setdefault(call.key, {})[index] = f"{content or ''}{stop}"


class CapturedSessions:
    """The open sessions of an engine by their keys. `abort` drops the engine's requests with a prefix."""

    def __init__(self, abort: Callable[[str], object], *, takes_images: bool = False) -> None:
        self._abort = abort
        self._takes_images = takes_images
        self._open: dict[str, CapturedSession] = {}
        self._serial = itertools.count(1)

    def open(self, key: str, sampling: Sampling, limits: SessionLimits) -> CapturedSession:
        """Accept calls with this key. Calls are sampled with the run's settings, not with the client's."""
        if key in self._open:
            raise ValueError("the key of a session is used already")
        limits = replace(limits, takes_images=self._takes_images)
        session = self._open[key] = CapturedSession(sampling, limits, f"session{next(self._serial)}-")
        return session

    def close(self, key: str) -> list[Call]:
        """Refuse the key, drop its calls in flight, and return the answered calls in the order of their ends."""
        session = self._open.pop(key)
        for request in session.requests:
            request.until.reschedule(asyncio.get_running_loop().time())
        self._abort(session.name)
        calls, session.calls = session.calls, []
        return calls

    def find(self, key: str) -> CapturedSession:
        """Return the open session with a key, or raise RefusedCall."""
        if key not in self._open:
            raise RefusedCall("no open session has this key", code="invalid_api_key", status=401)
        return self._open[key]


def turn_key(before: bytes, content: str | None, calls: Sequence[tuple[str, Any]]) -> bytes:
    """Return the key of a conversation that ends with an assistant's turn.

    Space around the text, reasoning and the ids of calls do not change the key, because clients change all three.
    """
    return _key(before, "assistant", (content or "").strip(), [(name, _arguments(given)) for name, given in calls])


def _key(before: bytes, *values: Any) -> bytes:
    return hashlib.sha256(before + _JSON.encode(values).encode()).digest()


def _turns(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Yield the first and last place of each message. Assistant messages in a row are one turn."""
    start = 0
    while start < len(messages):
        end = start + 1
        while messages[start]["role"] == "assistant" and end < len(messages) and messages[end]["role"] == "assistant":
            end += 1
        yield start, end
        start = end


def _said(messages: Sequence[Message]) -> tuple[str, list[tuple[str, Any]]]:
    """Return the text of assistant messages, and their calls of functions as (name, arguments)."""
    calls = [call.get("function") for message in messages for call in message.get("tool_calls") or ()]
    texts = [text for message in messages if (text := _text(message.get("content")))]
    return "\n".join(texts), [(call["name"], call.get("arguments")) for call in calls if call is not None]


def _reasoning(messages: Sequence[Message]) -> str:
    """Return the reasoning repeated in assistant messages. Empty: the client dropped the reasoning."""
    texts = (message.get("reasoning") or message.get("reasoning_content") for message in messages)
    return next((text.strip() for text in texts if isinstance(text, str)), "")


def _text(content: Any) -> str:
    if isinstance(content, str | None):
        return content or ""
    parts = [part.get("text", part) if isinstance(part, Mapping) else part for part in content]
    return "\n".join(part if isinstance(part, str) else json.dumps(part, default=str) for part in parts)


def _arguments(given: Any) -> str:
    """Return a call's arguments as JSON text, for any form from the client."""
    try:
        return json.dumps(json.loads(given) if isinstance(given, str) else given, sort_keys=True)
    except (ValueError, RecursionError):
        return str(given)
