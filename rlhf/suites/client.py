"""Send requests to the completions interface of engines' fronts, many at once, and keep the answers in a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.suites.spec import LOST, MODEL, Endpoint

AT_ONCE = 64  # requests to one engine
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5  # before the second attempt; doubled before each later attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request: a response to the prompt, or the log-probabilities of the prompt's last tokens."""

    prompt_ids: tuple[int, ...]
    scored: int = 0  # tokens at the end of the prompt whose log-probabilities are wanted; 0: sample a response
    sampling: Mapping[str, Any]  # the remaining fields of the request

    def body(self) -> dict[str, Any]:
        fields = {"max_tokens": 1, "prompt_logprobs": 1, "temperature": 0.0} if self.scored else self.sampling
        return {"model": MODEL, "prompt": list(self.prompt_ids), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str = ""
    tokens: int = 0
    truncated: bool = False
    logprob: float = 0.0  # sum over the scored tokens
    is_greedy: bool = False  # whether each scored token is the likeliest
    failure: str | None = None


class Client:
    """Answers requests. Without an endpoint, requests are only measured and the answers are empty."""

    def __init__(self, endpoint: Endpoint | None, progress: Callable[[int, int], None]) -> None:
        self.endpoint = endpoint
        self.progress = progress
        self.longest = 0  # tokens of a prompt and its response
        self._answered = {} if endpoint is None else _read(endpoint.answers)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """Return the answers in order. An answer to a failed request says why."""
        most = max((len(ask.prompt_ids) + ask.body()["max_tokens"] for ask in asks), default=0)
        self.longest = max(self.longest, most)
        if self.endpoint is None:
            return [Answer() for _ in asks]
        return asyncio.run(self._answer_all(asks, self.endpoint))

    async def _answer_all(self, asks: Sequence[Ask], endpoint: Endpoint) -> list[Answer]:
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        done, waiting = 0, asyncio.Semaphore(AT_ONCE * len(endpoint.urls))
        headers = {"Authorization": f"Bearer {endpoint.key}"}
        timeout = ClientTimeout(total=endpoint.deadline_s)

        async def one(number: int, ask: Ask) -> Answer:
            nonlocal done
            async with waiting:
                answer = await self._once(number, ask, endpoint, session)
            done += 1
            self.progress(done, len(asks))
            return answer

        async with ClientSession(headers=headers, timeout=timeout, connector=TCPConnector(limit=0)) as session:
            return list(await asyncio.gather(*(one(number, ask) for number, ask in enumerate(asks))))

    async def _once(self, number: int, ask: Ask, endpoint: Endpoint, session: Any) -> Answer:
        """Return a stored answer, or ask. A later attempt goes to the next engine."""
        from aiohttp import ClientError

        body = ask.body()
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if key in self._answered:
            return self._answered[key]
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            url = f"{endpoint.urls[(number + attempt) % len(endpoint.urls)]}/v1/completions"
            try:
                async with session.post(url, json=body) as reply:
                    content = await reply.json(content_type=None)
                    if reply.status == 200:
                        answer = _answer(ask, content)
                        self._store(key, answer, endpoint.answers)
                        return answer
                    failure = f"HTTP {reply.status}: {content['error']['message']}"
                    if reply.status < 500:
                        break
            except TimeoutError:
                failure = f"no answer within {endpoint.deadline_s:g} s"
                break
            except (ClientError, ValueError, KeyError, TypeError) as error:
                failure = f"{LOST}: {type(error).__name__}: {error}"
        return Answer(failure=failure)

    def _store(self, key: str, answer: Answer, path: Path) -> None:
        self._answered[key] = answer
        with path.open("a") as file:
            file.write(json.dumps({"key": key, **asdict(answer)}) + "\n")


def _answer(ask: Ask, content: Mapping[str, Any]) -> Answer:
    choice = content["choices"][0]
    if not ask.scored:
        tokens = content["usage"]["completion_tokens"]
        return Answer(text=choice["text"], tokens=tokens, truncated=choice["finish_reason"] == "length")
    logprobs, is_greedy = 0.0, True
    last = [*zip(ask.prompt_ids, choice["prompt_logprobs"], strict=True)][-ask.scored :]
    for token, values in last:  # by token id: the prompt's token and the likeliest token
        logprobs += values[str(token)]["logprob"]
        is_greedy &= values[str(token)]["rank"] == 1
    return Answer(logprob=logprobs, is_greedy=is_greedy)


def _read(path: Path) -> dict[str, Answer]:
    """Return the stored answers by request. A last line that a killed process left unfinished is left out."""
    answered: dict[str, Answer] = {}
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(whole))
        for line in whole:
            values = json.loads(line)
            key = values.pop("key")
            answered[key] = Answer(**values)
    return answered
