"""Compute training scores, if different from the reported scores, and per-step credit, from scalars."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf.algorithms.grpo import FLAT_BELOW
from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.config.schema.rewards import RewardConfig
from rlhf.config.schema.root import Config
from rlhf.deferred import torch
from rlhf.rewards.combining import RewardTerm, gated, gated_steps, training_sum
from rlhf.roles import ScoredGroup
from rlhf.types import StepReward

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TrainingScores:
    """Combines the rewards of a run's groups for training."""

    def __init__(self, rewards: Mapping[str, RewardConfig]) -> None:
        self.terms = {
            name: RewardTerm(weight=reward.weight, gate=reward.gate, normalize=reward.normalize)
            for name, reward in rewards.items()
        }
        self.normalizes = any(term.normalize != "none" for term in self.terms.values())

    def normalized(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups with scores computed from normalised rewards, if so configured."""
        if not self.normalizes:
            return list(groups)
        results = []
        for scored in groups:
            sums = training_sum(scored.scores.by_name, self.terms)
            scores = tuple(score for score in sums if score is not None)
            assert len(scores) == len(sums), "a group in which a response has no score is dropped"
            results.append(replace(scored, scores=replace(scored.scores, scores=scores)))
        return results

    @staticmethod
    def shaped(groups: Sequence[ScoredGroup], algorithm: OnlineAlgorithm, *, max_new_tokens: int) -> list[ScoredGroup]:
        """Return whole groups with the scores after the algorithm's length penalty, also of greedy responses."""

        def after(scores: Sequence[float], num_tokens: Sequence[int]) -> list[float]:
            lengths, size = torch.tensor(num_tokens), len(scores)
            shaped: list[float] = algorithm.shaped(
                _column(scores), lengths, group_size=size, max_new_tokens=max_new_tokens
            ).tolist()
            return shaped

        results = []
        for scored in groups:
            tokens, greedy = [info.num_response_tokens for info in scored.group.infos], scored.greedy_score
            scores = replace(scored.scores, scores=tuple(after(scored.scores.scores, tokens)))
            baseline = None if greedy is None else after([greedy], [scored.greedy_tokens])[0]
            results.append(replace(scored, scores=scores, greedy_score=baseline))
        return results

    def by_reward(self, groups: Sequence[ScoredGroup]) -> dict[str, list[float | None]]:
        """Return each reward after gating, by response: 0 outside of the reward's scope, None without an opinion."""
        columns: dict[str, list[float | None]] = {name: [] for name in self.terms}
        for scored in groups:
            products = gated(scored.scores.by_name, self.terms)
            for name, column in columns.items():
                column += products.get(name, [0.0] * len(scored.scores.scores))
        return columns

    def by_step(
        self, groups: Sequence[ScoredGroup], step_terms: Callable[[Tensor], Tensor]
    ) -> tuple[list[ScoredGroup], dict[int, tuple[StepReward, ...]]]:
        """Return the groups without the score credited by steps, and the credited steps by sequence id.

        `step_terms` maps the step rewards of a prompt's responses, from one gated reward, to their training values.
        Each value is then multiplied by the reward's weight. The remaining score comes from all other rewards.
        """
        steps_by_sequence: dict[int, tuple[StepReward, ...]] = {}
        left = []
        for scored in groups:
            scores = list(scored.scores.scores)
            credited: list[list[StepReward]] = [[] for _ in scores]
            for name, values in gated_steps(scored.scores.steps, scored.scores.by_name, self.terms).items():
                weight = self.terms[name].weight
                flat = torch.tensor([value for step_values in values for value in step_values], dtype=torch.float64)
                trained = iter((weight * step_terms(flat)).tolist())
                for place, (step_values, steps) in enumerate(zip(values, scored.scores.steps[name], strict=True)):
                    scores[place] -= weight * sum(step_values)
                    counted = steps[: len(step_values)]  # empty if the gate has no opinion
                    credited[place] += [StepReward(end=step.end, value=next(trained)) for step in counted]
            left.append(replace(scored, scores=replace(scored.scores, scores=tuple(scores))))
            if scored.scores.steps:
                ids = [info.sequence_id for info in scored.group.infos]
                steps_by_sequence |= zip(ids, map(tuple, credited), strict=True)
        return left, steps_by_sequence

    def by_turn(
        self,
        groups: Sequence[ScoredGroup],
        steps: Mapping[int, tuple[StepReward, ...]],
        turn_advantages: Callable[[Tensor, Tensor, Sequence[str]], Tensor],
    ) -> tuple[list[ScoredGroup], dict[int, tuple[StepReward, ...]]]:
        """Return the groups with their whole scores, and the advantage of each turn by sequence id.

        `groups` and `steps` are the results of `by_step`. A turn's reward is the sum of its steps; the last turn also
        gets the remaining score. The turns are in the order of play, and in a session with several sequences this is
        not the order of the tokens.
        """
        whole: list[ScoredGroup] = []
        by_sequence: dict[int, tuple[StepReward, ...]] = {}
        for scored in groups:
            infos, scores = scored.group.infos, list(scored.scores.scores)
            rewards = [[0.0] * len(info.turns) for info in infos]
            for place, info in enumerate(infos):
                order = sorted(range(len(info.turns)), key=lambda turn, turns=info.turns: turns[turn].end)  # type: ignore[misc]
                ends = [info.turns[turn].end for turn in order]
                if ends:
                    rewards[place][-1] = scores[place]
                for step in steps.get(info.sequence_id, ()):
                    scores[place] += step.value
                    if ends:  # a conversation that failed before a turn has none
                        rewards[place][order[bisect_left(ends, step.end)]] += step.value
            flat = _column([reward for turns in rewards for reward in turns])
            counts = torch.tensor([len(info.turns) for info in infos])
            states = [turn.state for info in infos for turn in info.turns]
            values = turn_advantages(flat, counts, states).split(counts.tolist())
            for info, of_turns in zip(infos, values, strict=True):
                by_sequence[info.sequence_id] = tuple(
                    StepReward(end=turn.end, value=value)
                    for turn, value in zip(info.turns, of_turns.tolist(), strict=True)
                )
            whole.append(replace(scored, scores=replace(scored.scores, scores=tuple(scores))))
        return whole, by_sequence

    def outcomes(self, groups: Sequence[ScoredGroup], scores: Sequence[float]) -> SequenceOutcomes:
        """Return the outcomes of groups of equal size. `scores` covers all responses, in the order of the groups."""
        greedy = [scored.greedy_score for scored in groups if scored.greedy_score is not None]
        infos = [info for scored in groups for info in scored.group.infos]
        columns = self.by_reward(groups)
        return SequenceOutcomes(
            scores=_column(scores),
            by_reward={name: _column([value or 0.0 for value in values]) for name, values in columns.items()},
            has_opinion={
                name: torch.tensor([value is not None for value in values])
                for name, values in columns.items()
                if None in values
            },
            weights={name: term.weight for name, term in self.terms.items()},
            num_tokens=torch.tensor([info.num_response_tokens for info in infos]),
            group_size=len(groups[0].group.infos),
            greedy_scores=_column(greedy) if greedy else None,
        )

    def is_flat(self, scored: ScoredGroup, config: Config, algorithm: OnlineAlgorithm | None) -> bool:
        """Return whether a group carries no signal: its responses are compared, and have equal steps, turns and
        outcomes. `algorithm` is None for learning without advantages."""
        assert config.rollouts is not None
        if not config.algorithm.compares_responses:
            return False
        steps = gated_steps(scored.scores.steps, scored.scores.by_name, self.terms)
        counting = [values for name, values in steps.items() if self.terms[name].weight != 0.0]
        if any(len({value for step_values in values for value in step_values}) > 1 for values in counting):
            return False
        (scored,) = self.normalized([scored])
        if algorithm is None:
            return len(set(scored.scores.scores)) == 1
        (scored,) = self.shaped([scored], algorithm, max_new_tokens=config.rollouts.max_response_tokens)
        if config.algorithm.compares_turns:
            _, compared = self.by_turn(*self.by_step([scored], algorithm.step_terms), algorithm.turn_advantages)
            if any(abs(turn.value) > FLAT_BELOW for turns in compared.values() for turn in turns):
                return False
        return algorithm.is_flat(self.outcomes([scored], scored.scores.scores))


def _column(values: Sequence[float]) -> Float[Tensor, " B"]:
    return torch.tensor(values, dtype=torch.float64)
