"""Rewards from services: build the requests for a group, check the answers, and run the event loop.

A worker calls all services from an event loop in a separate thread. Every error becomes a Failure of the responses
without a score.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast, get_args

from rlhf.errors import RunError
from rlhf.rewards.processes.pool import Failure, GroupOutcome
from rlhf.rewards.services.client import Service, ServiceError, ServiceSpec
from rlhf.rewards.services.images import sent_columns
from rlhf.rewards.services.judge import JudgeSpec
from rlhf.rewards.services.judgements import Judgements
from rlhf.rewards.services.judging import judged
from rlhf.rewards.services.pairwise import games
from rlhf.types import Prompt, RewardErrorKind

T = TypeVar("T")

CLOSE_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteReward:
    """A reward given by a service. Without `judge`, the protocol is that of `rlhf serve-reward`."""

    service: ServiceSpec
    judge: JudgeSpec | None

    def longest_s(self, num_responses: int, groups: int) -> float:
        """Return the longest time for a group of responses while `groups` groups ask the service at once.

        The deadline of a request begins once the request is among the service's `max_in_flight`.
        """
        requests, judge = groups, self.judge
        if judge is not None:
            opponents, asked = judge.opponents, num_responses
            if judge.compare is not None and not isinstance(opponents, str):
                asked = len(games(num_responses, opponents))
            requests *= judge.samples * asked
        return math.ceil(requests / self.service.max_in_flight) * self.service.deadline_s + CLOSE_WITHIN_S


class RemoteRewards:
    """The services of a worker, by reward name. Thread-safe.

    At most as many threads may `ask` at once as the largest `max_in_flight` of the services.
    """

    def __init__(self, rewards: Mapping[str, RemoteReward], known: Judgements | None = None) -> None:
        self._rewards = dict(rewards)
        self._known = known or Judgements(None)
        self._groups = max(reward.service.max_in_flight for reward in rewards.values())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward services", daemon=True)
        self._thread.start()
        self._services = self._do(self._open(), CLOSE_WITHIN_S)

    def greet(self) -> None:
        """Raise RunError for the first service out of reach or with a refused token."""
        limit_s = max(reward.service.timeout_s for reward in self._rewards.values()) + CLOSE_WITHIN_S
        for name, trouble in self._do(self._greet(), limit_s).items():
            if trouble is not None:
                raise RunError(f"rewards.{name}: {self._rewards[name].service.url}: {trouble}")

    def ask(
        self,
        names: Sequence[str],
        prompt: Prompt,
        responses: Sequence[str],
        *,
        truncated: Sequence[bool],
        results: Sequence[Any] = (),
    ) -> dict[str, GroupOutcome]:
        """Return the outcomes of the named rewards for a group, requested concurrently."""
        limit_s = max(self._rewards[name].longest_s(len(responses), self._groups) for name in names)

        async def ask_all() -> list[GroupOutcome]:
            return await asyncio.gather(*(self._ask_one(name, prompt, responses, truncated, results) for name in names))

        return dict(zip(names, self._do(ask_all(), limit_s + CLOSE_WITHIN_S), strict=True))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._do(self._close(), CLOSE_WITHIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_WITHIN_S)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T], limit_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit_s)
        except CancelledError as error:
            raise RunError("rewards: the services were closed while a group was being scored") from error
        except TimeoutError as error:
            future.cancel()
            raise RunError(f"rewards: the services were not done within {limit_s:g} s") from error

    async def _open(self) -> dict[str, Service]:
        return {name: Service(reward.service) for name, reward in self._rewards.items()}

    async def _greet(self) -> dict[str, str | None]:
        paths = ["" if reward.judge is None else "/models" for reward in self._rewards.values()]
        services = self._services.values()
        problems = await asyncio.gather(*(service.greet(path) for service, path in zip(services, paths, strict=True)))
        return dict(zip(self._services, problems, strict=True))

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for service in self._services.values():
            await service.close()

    async def _ask_one(
        self, name: str, prompt: Prompt, responses: Sequence[str], truncated: Sequence[bool], results: Sequence[Any]
    ) -> GroupOutcome:
        service, judge = self._services[name], self._rewards[name].judge
        if judge is not None:
            return await judged(service, judge, prompt, responses, results, self._known)
        body = {
            "prompt": prompt.text,
            "responses": list(responses),
            "truncated": list(truncated),
            "columns": sent_columns(prompt.columns),
            **({"results": list(results)} if results else {}),
        }
        try:
            return read_scores(await service.post(body), len(responses))
        except ServiceError as error:
            return _all_failed(error.kind, str(error), len(responses))


def read_scores(answer: Mapping[str, Any], num_responses: int) -> GroupOutcome:
    """Check the answer `{"scores": [...], "errors": [...]}` of a service; both keys are optional.

    A null score is no opinion, unless an error names the response. In an answer with errors only, the remaining
    responses also count as failures.
    """
    failures: dict[int, Failure] = {}
    if errors := answer.get("errors"):
        for error in errors if isinstance(errors, list) else [errors]:
            match error:
                case {"sample": int(sample), "message": str(message), **rest} if 0 <= sample < num_responses:
                    is_known = rest.get("kind") in get_args(RewardErrorKind)
                    kind = cast("RewardErrorKind", rest["kind"]) if is_known else "raised"
                    failures[sample] = Failure(sample=sample, kind=kind, message=message[:500])
                case _:
                    text = f"its answer has an error of unknown form: {_shown(error)}"
                    return _all_failed("refused", text, num_responses)
    scores = answer.get("scores")
    if errors and scores is None:
        text = "it scored no response of the group, because another response failed"
        others = _all_failed("refused", text, num_responses)
        return replace(others, failures=tuple(failures.get(failure.sample, failure) for failure in others.failures))
    if not isinstance(scores, list):
        return _all_failed("refused", 'its answer has no list "scores"', num_responses)
    if len(scores) != num_responses:
        text = f"it gave {len(scores)} scores for {num_responses} responses"
        return _all_failed("not_a_number", text, num_responses)
    for sample, score in enumerate(scores):
        if score is not None and not _is_finite(score):
            text = f"it gave {_shown(score)}"
            failures.setdefault(sample, Failure(sample=sample, kind="not_a_number", message=text))
    return GroupOutcome(
        scores=tuple(
            None if score is None or sample in failures else float(score) for sample, score in enumerate(scores)
        ),
        failures=tuple(failures[sample] for sample in sorted(failures)),
    )


def _shown(value: object) -> str:
    """Return a value shortened for a message, or the type of a value that cannot be shown."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        return f"a {type(value).__name__} that cannot be shown"


def _is_finite(score: object) -> bool:
    if isinstance(score, bool) or not isinstance(score, int | float):
        return False
    try:
        return math.isfinite(score)
    except OverflowError:
        return False


def _all_failed(kind: RewardErrorKind, message: str, num_responses: int) -> GroupOutcome:
    failures = tuple(Failure(sample=sample, kind=kind, message=message) for sample in range(num_responses))
    return GroupOutcome(scores=(None,) * num_responses, failures=failures)
