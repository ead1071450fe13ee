"""The rewards of a run, combined: one weighted score a response, or why there is none.

Last stage before the experience: function rewards run in the pool, a reward model's numbers come in from its worker.
A reward that fails is reported and never counted as 0; the controller decides what becomes of the group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rlhf.rewards.loading import LoadedReward
from rlhf.rewards.pool import Failure, Outcome, RewardPool, longest_s
from rlhf.types import GroupScores, Prompt, RewardError

_NONE: Mapping[str, Sequence[float]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """One reward of a run."""

    name: str
    weight: float
    function: LoadedReward | None  # None: a reward model or the environment, whose numbers come to `score`
    from_environment: bool = False
    truncated_score: float | None = None  # of a response that was cut, whatever the reward says; None: what it says


def fingerprint(specs: Sequence[RewardSpec], *, model: str) -> str:
    """Of the rewards as they are now: their configuration and the text of their files, not of what those import."""
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    for spec in specs:
        source = spec.function.source if spec.function is not None else None
        digest.update(repr((spec.name, spec.weight, source, spec.truncated_score, spec.from_environment)).encode())
        if source is not None and source.path is not None:
            digest.update(Path(source.path).read_bytes())
    return digest.hexdigest()


def deadline_s(specs: Sequence[RewardSpec], num_responses: int, *, timeout_s: float) -> float:
    """The longest that the functions can take for one group once a process is free."""
    return sum(spec.function is not None for spec in specs) * longest_s(num_responses, timeout_s)


class RewardSet:
    """All rewards of a run, if it has any: without them there are no scores. `score` may be called from as many threads
    at once as there are `processes`."""

    def __init__(
        self, specs: Sequence[RewardSpec], *, timeout_s: float, processes: int = 1, memory_gib: float = 8.0
    ) -> None:
        self.specs = tuple(specs)
        sources = [spec.function.source for spec in self.specs if spec.function is not None]
        self._pool = (
            RewardPool(sources, timeout_s=timeout_s, processes=processes, memory_gib=memory_gib) if sources else None
        )

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reward processes."""
        if self._pool is not None:
            self._pool.close()

    def score(
        self,
        prompt: Prompt,
        responses: Sequence[str],
        *,
        truncated: Sequence[bool],
        model_scores: Mapping[str, Sequence[float]] = _NONE,
    ) -> GroupScores:
        """Weighted sum of the rewards for each response to one prompt.

        truncated: which responses were cut. model_scores: by reward name, one number a response, for the specs without
        a function.
        """
        by_name: dict[str, tuple[float, ...]] = {}
        errors: list[RewardError] = []
        function_index = 0
        for spec in self.specs:
            if spec.function is None:
                who = "the environment" if spec.from_environment else "the reward model"
                outcome = _check(model_scores[spec.name], len(responses), f"{who} gave")
            else:
                assert self._pool is not None
                columns = spec.function.select(prompt.columns)
                outcome = self._pool.score(function_index, prompt.text, responses, columns)
                function_index += 1
            by_name[spec.name] = outcome.scores
            if spec.truncated_score is not None and not outcome.failures:
                told = zip(outcome.scores, truncated, strict=True)
                by_name[spec.name] = tuple(spec.truncated_score if cut else score for score, cut in told)
            errors += _as_errors(spec.name, outcome, prompt)
        if errors or not self.specs:
            return GroupScores(scores=(), by_name={}, errors=tuple(errors))
        weighted = [[spec.weight * score for score in by_name[spec.name]] for spec in self.specs]
        total = _check([sum(row) for row in zip(*weighted, strict=True)], len(responses), "the weighted sum is")
        if total.failures:
            errors = _as_errors("weighted sum", total, prompt)
        return GroupScores(scores=total.scores, by_name={} if errors else by_name, errors=tuple(errors))


def describe(errors: Sequence[RewardError]) -> str:
    """One line a reward and kind of failure, with the first message of each."""
    first: dict[tuple[str, str], RewardError] = {}
    count: dict[tuple[str, str], int] = {}
    for error in errors:
        key = (error.reward, error.kind)
        first.setdefault(key, error)
        count[key] = count.get(key, 0) + 1
    return "\n".join(
        f"reward `{error.reward}` {_WORDS[error.kind]} on response {error.sample} to prompt {error.prompt_id}: "
        + error.message
        + (f" (and {count[key] - 1} more like it)" if count[key] > 1 else "")
        for key, error in first.items()
    )


_WORDS = {
    "raised": "raised an exception",
    "timeout": "did not answer in time",
    "not_a_number": "gave no finite number",
    "died": "lost its process",
}


def _as_errors(reward: str, outcome: Outcome, prompt: Prompt) -> list[RewardError]:
    return [
        RewardError(reward=reward, kind=f.kind, message=f.message, prompt_id=prompt.prompt_id, sample=f.sample)
        for f in outcome.failures
    ]


def _check(scores: Sequence[float], count: int, what: str) -> Outcome:
    if len(scores) != count:
        raise ValueError(f"{len(scores)} reward model scores for {count} responses")
    failures = tuple(
        Failure(sample=sample, kind="not_a_number", message=f"{what} {score}")
        for sample, score in enumerate(scores)
        if not math.isfinite(score)
    )
    return Outcome(scores=() if failures else tuple(map(float, scores)), failures=failures)
