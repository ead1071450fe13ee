"""A collector over engines and rewards that answer in this process, as one start of a run in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rlhf.controller.collect import Collected, Collector
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.data.stream import Stream
from rlhf.roles import CompletedGroup
from rlhf.types import GroupRequest, GroupScores, Prompt, RewardError, Sampling, SessionEnd
from tests.fakes.configs import online_config
from tests.fakes.groups import completed_group
from tests.fakes.records import BareRecord
from tests.fakes.roles import FakeEngines, failed_reward

Scores = Callable[[int], Sequence[float] | None]  # by prompt id; None: the reward fails


Order = Callable[[Sequence[GroupRequest]], Sequence[GroupRequest]]  # order of the answers to requests


VARIED, SOLVED, FAILED = (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)


class OrderedEngines(FakeEngines):
    """Engines that answer requests in turn, with three tokens a response."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.by = order
        self.continued: list[dict[int, int]] = []  # in each round, the continued requests by prompt id
        self.cut: frozenset[int] = frozenset()  # prompt ids whose responses are all cut
        self.lengths: tuple[int, ...] = ()  # lengths of the responses to each prompt; empty: three tokens
        self.restricted: Mapping[str, int] = {}  # tokens of each session under a grammar; empty: there are no sessions

    def order(self, requests: Sequence[GroupRequest]) -> Sequence[GroupRequest]:
        self.continued.append({r.prompt.prompt_id: r.continues for r in requests if r.continues is not None})
        return self.by(requests)

    async def before(self, request: GroupRequest) -> None:
        for _ in range(5):  # until the previous group is scored
            await asyncio.sleep(0)

    def complete(self, request: GroupRequest, version: int) -> CompletedGroup:
        session = SessionEnd(result=None, num_calls=1, broken=(), restricted=self.restricted)
        group: CompletedGroup = completed_group(
            request,
            tokens=self.lengths,
            finish_reason="length" if request.prompt.prompt_id in self.cut else "stop",
            min_version=version,
            max_version=version,
            session=session if self.restricted else None,
        )
        return group


class Run:
    """A start of a run on a folder; the run's next start is a new object."""

    def __init__(
        self, folder: Path, scores: Scores = lambda _: VARIED, *, order: Order = list, prompts: int = 12, **keys: Any
    ) -> None:
        curriculum, warmth = keys.pop("curriculum", None), keys.pop("warmth", {})
        algorithm = keys.pop("algorithm", "grpo")
        reward, reward_policy = keys.pop("reward", {}), keys.pop("reward_policy", {})
        rewards, skipped = keys.pop("rewards", {}), keys.pop("skipped_rows", ())
        config = online_config(
            algorithm={"name": algorithm} if isinstance(algorithm, str) else algorithm,
            data={"curriculum": curriculum},
            rollouts=keys,
            rewards=rewards or {"r": {"function": "f", **reward}},
            reward_policy=reward_policy,
        )
        self.scores = scores
        self.record = cast(Any, BareRecord(folder, spool=folder))
        self.parts, self.errors = self.record.parts, self.record.errors
        self.failed_on: int | None = None  # prompt id of a group in which a failed call got a score
        self.engines = OrderedEngines(order)
        roles: tuple[Any, Any] = (self.engines, self)
        self.scorer = RolloutScorer(*roles, self.record, rewards_fingerprint="f")
        items = [
            Prompt(prompt_id=i, token_ids=(1, i), text="", columns={}, temperature=warmth.get(i))
            for i in range(prompts)
            if i not in skipped
        ]
        stream = Stream(items, seed=0, shuffle=False, skipped_rows=skipped)
        self.collector = Collector(config, stream, self.scorer, self.record, Sampling(max_new_tokens=4))

    async def score(self, group: CompletedGroup) -> GroupScores:
        prompt_id = group.request.prompt.prompt_id
        found = self.scores(prompt_id)
        if found is None:
            return GroupScores(scores=(), by_name={}, errors=(failed_reward(prompt_id),))
        scored = RewardError(reward="r", kind="timeout", message="no", prompt_id=prompt_id, sample=1)
        return GroupScores(
            scores=tuple(found),
            by_name={"r": tuple(found)},
            errors=(),
            scored_errors=(scored,) if prompt_id == self.failed_on else (),
        )

    def collect(self, step: int = 1) -> Collected:
        self.parts.clear()
        return asyncio.run(self.collector.collect(step, version=step - 1))

    def trained(self, step: int = 1) -> list[int]:
        """Return the prompt ids of a step's batch."""
        return [scored.group.request.prompt.prompt_id for scored in self.collect(step).groups]

    @property
    def row(self) -> dict[str, float]:
        return dict(self.record.row)


def by_prompt(**named: Sequence[int]) -> Scores:
    """Return SOLVED, FAILED or no score for the named prompts, and different scores for other prompts."""
    kinds: dict[str, Sequence[float] | None] = {"solved": SOLVED, "failed": FAILED, "broken": None}
    found = {prompt: kinds[kind] for kind, prompts in named.items() for prompt in prompts}
    return lambda prompt: found.get(prompt, VARIED)


def slowest(*prompts: int) -> Order:
    return lambda requests: sorted(requests, key=lambda request: request.prompt.prompt_id in prompts)
