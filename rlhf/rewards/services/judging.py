"""Ask a judge about a group: single responses, or two responses at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf.rewards.processes.pool import Failure, GroupOutcome
from rlhf.rewards.services.client import Service, ServiceError
from rlhf.rewards.services.judge import AGREEMENT, CRITERION, PATH, JudgeSpec, agreement, question, verdict
from rlhf.rewards.services.judgements import Judgements, content_key
from rlhf.rewards.services.pairwise import Game, games, win_rates, winning_chances
from rlhf.types import RESULT_COLUMN, Prompt, RewardErrorKind

Trouble = tuple[RewardErrorKind, str]  # the reason a question has no answer
Judged = dict[str, list[float]] | Trouble  # the values of all repeats of a question, by criterion


async def judged(
    service: Service,
    spec: JudgeSpec,
    prompt: Prompt,
    responses: Sequence[str],
    results: Sequence[Any],
    known: Judgements,
) -> GroupOutcome:
    """Return the judge's verdicts on a group. Equal questions are asked once, and remembered ones never.

    With a rubric `parts` has the value of each judged criterion, and no response has a score yet.
    """
    given = {"question": prompt.question or prompt.text, **prompt.columns, "prompt": prompt.text}
    asking = _Asking(service, spec, given, known)
    if spec.compare is not None:
        return await _compared(asking, responses)
    of_responses = [{RESULT_COLUMN: result} for result in results] or [{}] * len(responses)
    rows = [{**columns, "response": text} for text, columns in zip(responses, of_responses, strict=True)]
    answers = await asyncio.gather(*(asking.all_repeats(row) for row in rows))
    failures = [
        Failure(sample=sample, kind=answer[0], message=answer[1])
        for sample, answer in enumerate(answers)
        if isinstance(answer, tuple)
    ]
    known_values = [{} if isinstance(answer, tuple) else answer for answer in answers]
    names = dict.fromkeys(name for values in known_values for name in values)
    means = {name: tuple(fmean(values[name]) if values else None for values in known_values) for name in names}
    scores = means.pop("", (None,) * len(responses))
    parts = {CRITERION + name: values for name, values in means.items()}
    if spec.samples > 1:
        parts[AGREEMENT] = tuple(fmean(map(agreement, values.values())) if values else None for values in known_values)
    return GroupOutcome(scores=scores, failures=tuple(failures), parts=parts)


async def _compared(asking: _Asking, responses: Sequence[str]) -> GroupOutcome:
    """Return the value of each response from comparisons. A response without rivals in its group gets no opinion.

    Equal responses are not compared: each gets half of the game. A comparison without a verdict is a failure of its
    responses, and leaves the values of the other responses to the remaining comparisons.
    """
    spec, count, texts = asking.spec, len(responses), list(responses)
    if isinstance(spec.opponents, str):
        texts.append(str(asking.given[spec.opponents]))
        pairs = [(place, count) if place % 2 == 0 else (count, place) for place in range(count)]
    else:
        pairs = games(count, spec.opponents)
    answers = await asyncio.gather(*(asking.both_orders(texts[first], texts[second]) for first, second in pairs))
    failed: dict[int, Trouble] = {}
    results: dict[Game, float] = {}
    agreed: list[list[float]] = [[] for _ in texts]
    for pair, answer in zip(pairs, answers, strict=True):
        if isinstance(answer, tuple):
            failed |= {place: answer for place in pair if place < count}
            continue
        shares = answer.get("", [])
        results[pair] = fmean(shares) if shares else 0.5
        for place in pair if len(shares) > 1 else ():
            agreed[place].append(agreement(shares))
    values = (win_rates if spec.compare == "win_rate" else winning_chances)(results, count=len(texts))[:count]
    means = tuple(fmean(shares) if shares else None for shares in agreed[:count])
    return GroupOutcome(
        scores=tuple(None if place in failed else value for place, value in enumerate(values)),
        failures=tuple(
            Failure(sample=place, kind=kind, message=text) for place, (kind, text) in sorted(failed.items())
        ),
        parts={AGREEMENT: means} if spec.samples > 1 else {},
    )


class _Asking:
    """Asks a judge the questions about a group."""

    def __init__(self, service: Service, spec: JudgeSpec, given: Mapping[str, Any], known: Judgements) -> None:
        self.service, self.spec, self.given, self.known = service, spec, given, known
        self.rule = repr((spec.pattern, spec.scale, spec.choices, spec.compare))  # the rest is in the question
        self.asked: dict[str, asyncio.Future[dict[str, float] | Trouble]] = {}

    async def all_repeats(self, values: Mapping[str, Any]) -> Judged:
        """Return the answers to all repeats of a question, or why one of them failed."""
        repeats = range(self.spec.samples)
        return _whole(await asyncio.gather(*(self._once({**self.given, **values}, repeat) for repeat in repeats)))

    async def both_orders(self, first: str, second: str) -> Judged:
        """Return the shares won by the first response. Every second repeat swaps the two. Empty for equal responses."""
        if first == second:
            return {}
        orders = [(second, first) if repeat % 2 else (first, second) for repeat in range(self.spec.samples)]
        rows = [{**self.given, "response_a": a, "response_b": b} for a, b in orders]
        whole = _whole(await asyncio.gather(*(self._once(row, repeat) for repeat, row in enumerate(rows))))
        if isinstance(whole, tuple):
            return whole
        return {"": [1.0 - share if repeat % 2 else share for repeat, share in enumerate(whole[""])]}

    async def _once(self, values: Mapping[str, Any], repeat: int) -> dict[str, float] | Trouble:
        try:
            body = question(self.spec, values, repeat=repeat)
        except ValueError as error:
            return "refused", f"column `{self.spec.rubric}` {error}"
        key = content_key(self.service.spec.url, body, repeat, self.rule)
        if (answer := self.known.get(key)) is not None:
            return answer
        if key not in self.asked:
            self.asked[key] = asyncio.ensure_future(self._post(key, body))
        return await self.asked[key]

    async def _post(self, key: str, body: Mapping[str, Any]) -> dict[str, float] | Trouble:
        try:
            values = verdict(self.spec, self.given, await self.service.post(body, PATH))
        except ServiceError as error:
            return error.kind, str(error)
        except (ValueError, RecursionError) as error:
            return "not_a_number", str(error)
        self.known.put(key, values)
        return values


def _whole(answers: Sequence[dict[str, float] | Trouble]) -> Judged:
    values: dict[str, list[float]] = {}
    for answer in answers:
        if isinstance(answer, tuple):
            return answer
        for name, value in answer.items():
            values.setdefault(name, []).append(value)
    return values
