"""Collect a step's batch: choose prompts, and keep, drop or filter groups.

    prompts -> requests -> rollouts -> scored groups -> a whole batch, in the order of the prompts

Prompts are requested in rounds until the batch is whole. A group with a failed reward is dropped, and a group without a
learning signal is filtered (rollouts.dynamic_sampling). The next round requests a new prompt in place of such a group.
With rollouts.oversample, a round requests more prompts than needed; unfinished prompts come first in the next step.
Like the loop, this module sees only scalars, ids and references.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.config.derive import prompts_at_once
from rlhf.config.schema.rewards import error_rules
from rlhf.config.schema.rollouts import DynamicSampling
from rlhf.config.schema.root import Config
from rlhf.controller.carried import CarriedPrompts
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_report import restricted_tokens
from rlhf.controller.rollout_scorer import RolloutScorer, request_for
from rlhf.controller.training_scores import TrainingScores
from rlhf.data.curriculum import Curriculum
from rlhf.data.stream import Cursor
from rlhf.data.windows import DataStream
from rlhf.errors import RunError
from rlhf.rewards.failure_rule import ends_run
from rlhf.rewards.scoring import describe_errors
from rlhf.roles import ScoredGroup
from rlhf.tracking.metrics.reductions import Last, Mean, Reduction, Sum
from rlhf.tracking.run_folder.group_ledger import GroupRecord, StepGroups
from rlhf.types import GroupRequest, Prompt, RolloutInfo, Sampling

RECENT_GROUPS = 32  # window for counting dropped groups; at least prompts_per_step
EpochPrompt = tuple[int, Prompt]  # a prompt and its epoch


def is_within(mean: float, rule: DynamicSampling) -> bool:
    return (rule.min_mean is None or mean >= rule.min_mean) and (rule.max_mean is None or mean <= rule.max_mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    groups: list[ScoredGroup]  # in the order of the plan
    sampled_tokens: int  # in all responses, including those of groups left out
    ended: StepGroups  # how each group has ended, for the ledger of groups


@dataclass(slots=True)
class Outcomes:
    """The groups of a batch so far, by outcome. Only groups in `kept` hold references to tokens."""

    kept: list[ScoredGroup] = field(default_factory=list)
    filtered: list[ScoredGroup] = field(default_factory=list)
    dropped: list[ScoredGroup] = field(default_factory=list)  # a reward failed
    cancelled: list[GroupRequest] = field(default_factory=list)
    num_requested: int = 0

    @property
    def left_out(self) -> list[ScoredGroup]:
        return self.filtered + self.dropped

    @property
    def measured(self) -> list[ScoredGroup]:
        """Return all groups with a score, in plan order."""
        return sorted(self.kept + self.filtered, key=lambda scored: scored.group.request.group_id)


class Collector:
    """Requests the run's prompts in order. The state is only consistent between two steps."""

    def __init__(
        self, config: Config, prompts: DataStream[Prompt], scorer: RolloutScorer, record: RunRecord, sampling: Sampling
    ) -> None:
        """Create a collector at the start of the run's prompts."""
        assert config.rollouts is not None
        self.config = config
        self.rollouts = config.rollouts
        self.prompts = prompts
        self.scorer = scorer
        self.record = record
        self.sampling = sampling
        self.arrived: Callable[[ScoredGroup], None] | None = None  # called with each kept group right after scoring
        # Called with kept groups that have become too old and are requested again.
        self.outdated: Callable[[Sequence[ScoredGroup]], None] = lambda _: None
        weighs = config.algorithm.kind == "advantages"
        self.algorithm = algorithm_of(config.algorithm, OnlineAlgorithm) if weighs else None
        self.scores = TrainingScores(config.rewards)
        self.next_group = 0
        self.unfinished: list[EpochPrompt] = []  # requested first in the next step
        self.carried = CarriedPrompts()  # empty without rollouts.carry_over
        settings = config.data.curriculum
        self.curriculum = None if settings is None else Curriculum(seed=config.run.seed, **settings.model_dump())
        self.skipped: list[tuple[int, int]] = []  # epoch and id of the prompts skipped in this step
        window = max(RECENT_GROUPS, self.rollouts.prompts_per_step)
        # The ids of the recent groups, and whether they were dropped. None: before the run was resumed.
        self.recent_drops: deque[tuple[int | None, bool]] = deque(maxlen=window)

    async def collect(self, step: int, *, version: int) -> Collected:
        """Return the whole batch of a step, sampled by one version of the weights. RunError: a bound is reached."""
        batch = Outcomes()
        self.carried.num_restarted = 0
        count = self.rollouts.prompts_per_step
        while len(batch.kept) < count:
            for scored in await self._round(batch, count - len(batch.kept), step, version):
                self.sort(scored, batch, step)
            if len(batch.kept) < count:
                self.check_filtered(batch, step)
        return self.finish(batch, step)

    def sort(self, scored: ScoredGroup, batch: Outcomes, step: int) -> bool:
        """Add a group to its batch by outcome, and return whether the group is kept. RunError: the failure of a reward
        ends the run."""
        self.recent_drops.append((scored.group.request.group_id, bool(scored.scores.errors)))
        if scored.scores.errors:
            batch.dropped.append(_without_tokens(scored))
            self._check_dropped(scored, step)
        elif self._is_kept(scored):
            batch.kept.append(scored)
            return True
        else:
            batch.filtered.append(_without_tokens(scored))
        return False

    def finish(self, batch: Outcomes, step: int) -> Collected:
        """Record the outcomes of a whole batch, and return the groups. RunError: no token can be trained."""
        self._refuse_restricted(_infos(batch.kept), step)
        if self.curriculum is not None:
            for scored in batch.measured:
                self.curriculum.measure(scored.group.request.prompt.prompt_id, _mean(scored))
        self.record.add(self._metrics(batch))
        tokens = sum(info.num_response_tokens for info in _infos(batch.kept + batch.left_out))
        ended = StepGroups(
            max_staleness=self.rollouts.max_lag,
            trained=_records(batch.kept),
            filtered=_records(batch.filtered),
            dropped=_records(batch.dropped),
            asked_again=[GroupRecord.of(request) for request in batch.cancelled],
            skipped=self.skipped,
        )
        self.skipped = []
        return Collected(groups=batch.kept, sampled_tokens=tokens, ended=ended)

    async def _round(self, batch: Outcomes, needed: int, step: int, version: int) -> list[ScoredGroup]:
        """Request prompts and return the answered groups in plan order."""
        prompts, requests = self.next(prompts_at_once(needed, self.rollouts)), []
        for place, prompt in enumerate(prompts, batch.num_requested):
            request = self.request(prompt, group_id=self.next_group, place=place)
            requests.append(self.carried.continuing(request, version))
            self.next_group += 1
        batch.num_requested += len(requests)
        scorer, sampling, report = self.scorer, self.sampling, self._report
        if len(requests) == needed:
            groups = await scorer.score_all(requests, sampling, step=step, version=version, report=report)
        else:
            rule, is_enough = f"{needed} {self.rollouts.dynamic_sampling!r}", self._countdown(needed)
            groups = await scorer.score_first_finished(
                requests, sampling, is_enough, rule=rule, step=step, version=version, report=report
            )
            answered = {scored.group.request.group_id for scored in groups}
            unfinished = [pair for pair in zip(prompts, requests, strict=True) if pair[1].group_id not in answered]
            self.unfinished = [prompt for prompt, _ in unfinished] + self.unfinished
            batch.cancelled += [request for _, request in unfinished]
            if self.rollouts.carry_over:
                self.carried.update(requests, answered, version)
        if self.config.algorithm.wants_greedy:
            groups = await scorer.add_greedy_baseline(groups, sampling, step=step, version=version)
        return groups

    def _countdown(self, needed: int) -> Callable[[ScoredGroup], bool]:
        """Return a function to call with each group: True for the last group needed, counting only kept groups."""
        left = itertools.count(needed - 1, -1)
        return lambda scored: self._is_kept(scored) and next(left) == 0

    def _report(self, scored: ScoredGroup) -> None:
        if self.arrived is not None and self._is_kept(scored):
            self.arrived(scored)

    def _is_kept(self, scored: ScoredGroup) -> bool:
        """Return whether the group is trained on: the scores carry a signal, and their mean is within the bounds."""
        if scored.scores.errors:
            return False
        rule = self.rollouts.dynamic_sampling
        if rule is None:
            return True
        masks = self.algorithm is not None and self.algorithm.config.mask_truncated
        if masks and all(info.finish_reason == "length" for info in scored.group.infos):
            return False
        return not self.scores.is_flat(scored, self.config, self.algorithm) and is_within(_mean(scored), rule)

    def next(self, count: int) -> list[EpochPrompt]:
        """Return the next prompts: first the unfinished prompts, then the stream's. The curriculum may skip some."""
        prompts, self.unfinished = self.unfinished[:count], self.unfinished[count:]
        while len(prompts) < count:
            ((epoch, prompt),) = self.prompts.next(1)
            if self.curriculum is None or self.curriculum.takes(prompt.prompt_id, epoch):
                prompts.append((epoch, prompt))
            else:
                self.skipped.append((epoch, prompt.prompt_id))
        return prompts

    def request(self, chosen: EpochPrompt, *, group_id: int, place: int) -> GroupRequest:
        """Return the request of a prompt. Each group of a batch has a different `place`."""
        epoch, prompt = chosen
        samples, seed = self.rollouts.samples_per_prompt, self.config.run.seed
        ids = {"group_id": group_id, "first_sequence_id": place * samples}
        return request_for(prompt, **ids, samples=samples, run_seed=seed, epoch=epoch, temperature=prompt.temperature)

    def _check_dropped(self, scored: ScoredGroup, step: int) -> None:
        """Raise RunError if the rule of the failure ends the run, or if too many groups were dropped."""
        policy, window = self.config.reward_policy, self.recent_drops.maxlen
        assert window is not None
        is_fatal = ends_run(scored.scores.errors, error_rules(self.config.rewards), policy.on_error)
        count = sum(is_dropped for _, is_dropped in self.recent_drops)
        most = policy.max_dropped_fraction * window
        if not is_fatal and count <= most:
            return
        self.scorer.forget_untrained()
        if is_fatal:
            fix = (
                "on_error is fail, for the reward or in reward_policy. Set on_error to drop, so that another prompt "
                "replaces this prompt, or set rewards.NAME.on_error to the score of such a response."
            )
        else:
            fix = (
                f"{count} of the last {len(self.recent_drops)} groups were dropped, and "
                f"reward_policy.max_dropped_fraction {policy.max_dropped_fraction:g} allows {most:g} of {window}. "
                "Correct the reward, raise max_dropped_fraction, or set rewards.NAME.on_error to the score of such a "
                "response."
            )
        raise RunError(f"rewards, step {step}: {describe_errors(scored.scores.errors)}. {fix}")

    def _refuse_restricted(self, infos: Sequence[RolloutInfo], step: int) -> None:
        """Raise RunError if grammars restricted all sampled tokens of a batch, because the policy could not learn."""
        if any(info.num_response_tokens for info in infos):
            return
        self.scorer.forget_untrained()
        reasons = ", ".join(f"{reason}: {number}" for reason, number in restricted_tokens(infos).most_common())
        raise RunError(
            f"rollouts, step {step}: a grammar restricted all sampled tokens of the batch ({reasons}), so no token "
            "can be trained on. Let the agent ask with tool_choice auto, and without response_format and "
            "structured_outputs."
        )

    def check_filtered(self, batch: Outcomes, step: int) -> None:
        """Raise RunError if too many groups were filtered while the batch is still incomplete. In flight, groups of
        later batches may also be kept and filtered."""
        rule, count = self.rollouts.dynamic_sampling, max(self.rollouts.prompts_per_step, len(batch.kept))
        if rule is None or len(batch.filtered) <= rule.max_filtered_fraction * count:
            return
        means = [_mean(scored) for scored in batch.filtered]
        tried = {scored.group.request.prompt.prompt_id for scored in batch.kept + batch.left_out}
        if len(tried) == self.prompts.size:
            fix = (
                f"All {len(tried)} prompts of data.train were tried, and this policy can learn from no further "
                "prompt. Add prompts, or end the run here"
            )
        else:
            fix = (
                "Choose other prompts, sample more responses to each, widen the bounds of the mean, or raise "
                "max_filtered_fraction"
            )
        raise RunError(
            f"rollouts, step {step}: {len(batch.filtered)} groups were filtered, more than "
            f"rollouts.dynamic_sampling.max_filtered_fraction {rule.max_filtered_fraction:g} of {count} prompts "
            f"allows, and {len(batch.kept)} were kept. The mean scores of the filtered groups are {min(means):g} to "
            f"{max(means):g}. {fix}."
        )

    def _metrics(self, batch: Outcomes) -> Mapping[str, Reduction]:
        """Return the metrics of untrained groups. rlhf.controller.rollout_report has the metrics of the batch."""
        metrics: dict[str, Reduction] = {
            "rollouts/dropped_groups/total": Sum(total=len(batch.dropped)),
            "rollouts/tokens/total": Sum(total=sum(info.num_tokens for info in _infos(batch.left_out))),
            "data/epoch": Last(value=float(self.prompts.state().epoch)),
        }
        if self.rollouts.dynamic_sampling is not None:
            middle = sum(map(_mean, batch.kept)) / len(batch.kept)
            means, answered = [_mean(scored) for scored in batch.filtered], len(batch.measured)
            scores = [score for scored in batch.measured for score in scored.scores.scores]
            metrics |= {
                "rollouts/filtered_groups/fraction": Mean(total=len(means), count=answered),
                "rollouts/filtered_easy/fraction": Mean(total=sum(m > middle for m in means), count=answered),
                "rollouts/filtered_hard/fraction": Mean(total=sum(m <= middle for m in means), count=answered),
                "rewards/answered_score/mean": Mean.of(scores),
            }
        if self.rollouts.oversample > 1.0:
            answered = len(batch.kept) + len(batch.left_out)
            metrics["rollouts/cancelled_groups/total"] = Sum(total=batch.num_requested - answered)
        if self.rollouts.carry_over:
            carried = [float(scored.group.request.continues is not None) for scored in batch.kept]
            metrics["rollouts/carried/fraction"] = Mean.of(carried)
            metrics["rollouts/reasked_groups/total"] = Sum(total=self.carried.num_restarted)
        if self.curriculum is not None:
            measured, within = self.curriculum.counts()
            metrics["data/passed_over/total"] = Sum(total=len(self.skipped))
            metrics["data/within_band/fraction"] = Mean(total=within, count=measured)
        return metrics

    def state(self, *, untrained: Collection[int] = ()) -> dict[str, Any]:
        """Return the position in the prompts, for a checkpoint. `untrained`: ids of the groups to request again in a
        resumed run. If these groups are dropped again, the drops are counted again."""
        return {
            "cursor": asdict(self.prompts.state()),
            "stream": self.prompts.order_state(),
            "skipped": list(self.skipped),
            "waiting": [(epoch, prompt.prompt_id) for epoch, prompt in self.unfinished],
            "begun": self.carried.state(),
            "next_group": self.next_group,
            "recent_drops": [is_dropped for group_id, is_dropped in self.recent_drops if group_id not in untrained],
            "curriculum": None if self.curriculum is None else self.curriculum.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the position from a checkpoint. A curriculum without stored state starts afresh."""
        self.prompts.restore(Cursor(**state["cursor"]))
        self.unfinished = [(epoch, self.prompts.at(prompt_id)) for epoch, prompt_id in state["waiting"]]
        self.carried.restore(state["begun"] if self.rollouts.carry_over else ())
        self.next_group = state["next_group"]
        self.skipped = [(epoch, prompt_id) for epoch, prompt_id in state["skipped"]]
        self.recent_drops.clear()
        self.recent_drops.extend((None, is_dropped) for is_dropped in state["recent_drops"])
        if self.curriculum is not None and state["curriculum"] is not None:
            self.curriculum.restore(state["curriculum"])


def _records(groups: Sequence[ScoredGroup]) -> list[GroupRecord]:
    return [GroupRecord.of(scored.group.request, scored.group.infos) for scored in groups]


def _mean(scored: ScoredGroup) -> float:
    return sum(scored.scores.scores) / len(scored.scores.scores)


def _without_tokens(scored: ScoredGroup) -> ScoredGroup:
    return replace(scored, group=replace(scored.group, rollouts=None))


def _infos(groups: Sequence[ScoredGroup]) -> list[RolloutInfo]:
    return [info for scored in groups for info in scored.group.infos]
