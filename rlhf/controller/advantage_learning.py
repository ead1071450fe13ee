"""Learn from advantages: weigh every sampled token by its advantage over the expectation (PPO, GRPO).

    chosen responses -> plan -> reference logprobs, values -> old logprobs -> advantages -> minibatches -> updates

Responses dropped by selection (rollouts.keep_per_prompt, raft) are not computed on. Masked responses
(algorithm.mask_truncated) are not computed on either, but the scores count in the baseline of the group.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.privileged import SelfTeaching
from rlhf.config.derive import leaves_out, rows_per_step, updates_per_step
from rlhf.config.schema.root import Config
from rlhf.controller.batches import only, plan_batch, plan_given
from rlhf.controller.entropy_bonus import EntropyBonus
from rlhf.controller.idle_correction import IdleCorrection
from rlhf.controller.learning import Columns, OnlineRoles, ReferencedLearning, Signals
from rlhf.controller.privileged import contexts_of, privileged_prompts
from rlhf.controller.record import RunRecord
from rlhf.objectives.kl import adaptive_kl_coef
from rlhf.objectives.selection import best, most_spread
from rlhf.roles import (
    CriticRole,
    GivenByRank,
    PolicyRole,
    PrepareReport,
    Ref,
    RemoteColumns,
    ScoredGroup,
    SequenceReport,
    TrainedRole,
)
from rlhf.tracking.metrics.reductions import Last, Mean
from rlhf.types import BatchPlan, PrivilegedPrompts, RolloutInfo, StepReward

logger = logging.getLogger(__name__)
KEPT_BY = {"spread": most_spread, "best": best}


def _not_empty(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    return [scored for scored in groups if scored.group.infos]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    is_chosen: bool  # whether a response was chosen, even if masked
    plan: BatchPlan  # without scores: no response is trained
    report: PrepareReport
    advantages: Mapping[int, float]  # by sequence id
    privileged: tuple[Ref[PrivilegedPrompts], ...] = ()


def training_signals(parts: Sequence[Experience]) -> Signals:
    """Return the signals of the trained portions of a batch."""
    return Signals(
        trained=frozenset(i for part in parts for i in part.plan.scores),
        reports={s.sequence_id: s for part in parts for s in part.report.sequences},
        advantages={i: value for part in parts for i, value in part.advantages.items()},
        privileged=tuple(ref for part in parts for ref in part.privileged),
    )


class AdvantageLearning(ReferencedLearning):
    """Trains on the tokens of all kept responses. `kl_coef` and `entropy.in_force` are the coefficients of the next
    step."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        super().__init__(config, roles, record)
        self.algorithm = algorithm_of(config.algorithm, OnlineAlgorithm)
        self.kl_coef = self.algorithm.config.kl.coef
        self.prompt_values: Mapping[int, float] = {}  # value by prompt id; empty: no values are estimated
        self.entropy = EntropyBonus(self.algorithm.config.entropy)
        self.leaves_out = leaves_out(config)
        self.reference_every = self.algorithm.config.reference_every
        self.num_minibatches = rows_per_step(config, self.rollouts) // config.train.sequences_per_update
        self.idle = IdleCorrection(self.algorithm.config, updates_per_step=updates_per_step(config))

    def arrived(self, scored: ScoredGroup) -> None:
        """Begin the reference log-probabilities of a group if the reference has hardware of its own."""
        if self.computes_by_group and (trained := self._not_masked(self._chosen([scored]))):
            self.columns.begin(scored, self.reference_logprobs(trained))

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Run the stages of the module's docstring. If no response is chosen, the step makes no update."""
        return await self.update_from([await self.prepare(groups, step)], groups, step)

    async def update_from(self, parts: Sequence[Experience], groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Make the updates of a batch from the experience of all portions. `groups`: the whole batch."""
        trained = [part for part in parts if part.plan.scores]
        if not trained and any(part.is_chosen for part in parts):
            logger.warning(
                "step %d: every response was truncated (algorithm.mask_truncated), so nothing is updated", step
            )
        elif not trained:
            logger.warning("step %d: no response reaches algorithm.min_score, so the policy is not updated", step)
        elif not any(minibatch.num_tokens for part in trained for minibatch in part.plan.minibatches):
            logger.warning(
                "step %d: a grammar restricted all tokens of the kept responses, so nothing is updated", step
            )
        num_minibatches = len(trained[0].plan.minibatches) if trained else 0
        given = self.given(groups, step, num_minibatches=num_minibatches)
        with self.record.stage("update"):
            for minibatch in self.visits(num_minibatches, step):
                await self._update(minibatch, step, given[minibatch] if given else ())
        return training_signals(trained)

    def end_step(self, groups: Sequence[ScoredGroup], signals: Signals) -> None:
        super().end_step(groups, signals)
        if self.idle.watches:
            self.idle.see(self.record.row())
        if self.algorithm.config.entropy.adaptive is not None:
            self.record.add({"update/entropy_coef": Last(value=self.entropy.in_force)})
            self.entropy.adapt(self.record.row().get("update/entropy/mean"))  # None while only the critic is trained
        self._adapt_kl(list(signals.reports.values()), num_sequences=len(signals.trained))

    async def prepare(
        self, groups: Sequence[ScoredGroup], step: int, own: Mapping[int, float] | None = None
    ) -> Experience:
        """Choose the responses to train on and, unless there are none, compute their experience. `own` advantages by
        sequence id replace the algorithm's."""
        record = self.record
        kept, steps = self.scores.by_step(self._kept(groups), self.algorithm.step_terms)
        turns: Mapping[int, tuple[StepReward, ...]] = {}
        if self.algorithm.config.compares_turns:
            kept, turns = self.scores.by_turn(kept, steps, self.algorithm.turn_advantages)
            steps = {}
        trained = self._not_masked(kept)
        if self.leaves_out:
            total, count = (sum(len(scored.group.infos) for scored in some) for some in (trained, groups))
            record.add({"advantages/kept/fraction": Mean(total=total, count=count)})
        plan = replace(self.plan(trained, step, self.roles.policy, steps), turns=turns)
        plan = self._with_imitation(plan, groups)
        report = PrepareReport(sequences=(), metrics={})
        advantages: Mapping[int, float] = {}
        prompts: list[RemoteColumns[PrivilegedPrompts]] = []
        with record.stage("experience"):
            if trained:
                prompts = await self._privileged_prompts(trained, groups)
                report, advantages = await self._experience(plan, kept, trained, prompts, own)
        return Experience(
            is_chosen=bool(kept),
            plan=plan,
            report=report,
            advantages=advantages,
            privileged=tuple(column.ref for column in prompts),
        )

    def state(self) -> Mapping[str, Any]:
        values = {"prompt_values": {str(i): value for i, value in self.prompt_values.items()}}
        shared = {"kl_coef": self.kl_coef, "entropy": self.entropy.state(), **super().state()}
        return shared | values if self.prompt_values else shared

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        self.kl_coef = state["kl_coef"]
        self.prompt_values = {int(i): value for i, value in state.get("prompt_values", {}).items()}
        self.entropy.restore(state["entropy"])
        await super().restore(state, step)

    def _chosen(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups reduced to their kept responses, with the scores used for training. The reported scores
        select the responses. Groups without a kept response are left out."""
        keep, kept = self.rollouts.keep_per_prompt, []
        for scored, trained in zip(groups, self._shaped(self.scores.normalized(groups)), strict=True):
            scores = scored.scores.scores
            places = self.algorithm.kept(scores) if keep is None else KEPT_BY[keep.by](scores, keep.count)
            kept.append(only(trained, places))
        return _not_empty(kept)

    def _kept(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups as chosen, and measure how many carry no signal."""
        if self.algorithm.config.compares_responses:
            flat = 0  # with dynamic sampling, the collector has filtered groups of equal scores
            if self.rollouts.dynamic_sampling is None:
                flat = sum(self.scores.is_flat(scored, self.config, self.algorithm) for scored in groups)
            self.record.add({"advantages/zero_groups/fraction": Mean(total=flat, count=len(groups))})
        if self.algorithm.config.penalizes_length:
            normalized = self.scores.normalized(groups)
            before, after = (
                [score for scored in some for score in scored.scores.scores]
                for some in (normalized, self._shaped(normalized))
            )
            penalty = Mean(total=sum(before) - sum(after), count=len(before))
            self.record.add({"advantages/length_penalty/mean": penalty})
        return self._chosen(groups)

    def _shaped(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return whole groups with the scores after the length penalty."""
        most = self.rollouts.max_response_tokens
        return self.scores.shaped(groups, self.algorithm, max_new_tokens=most)

    def _not_masked(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups reduced to unmasked responses. Groups without an unmasked response are left out."""
        if not self.algorithm.config.mask_truncated:
            return list(groups)
        finished = [[i for i, info in enumerate(one.group.infos) if info.finish_reason != "length"] for one in groups]
        return _not_empty([only(scored, places) for scored, places in zip(groups, finished, strict=True)])

    def plan(
        self,
        groups: Sequence[ScoredGroup],
        step: int,
        role: TrainedRole,
        steps: Mapping[int, tuple[StepReward, ...]],
        drawn: Sequence[Sequence[RolloutInfo]] | None = None,
    ) -> BatchPlan:
        """Return the minibatches of the groups, equal for all roles, over the ranks of one role."""
        plan = plan_batch(
            groups,
            step=step,
            seed=self.config.run.seed,
            num_minibatches=self.num_minibatches,
            num_ranks=role.num_ranks,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy.in_force,
            drawn=drawn,
        )
        return replace(plan, steps=steps)

    def _with_imitation(self, plan: BatchPlan, groups: Sequence[ScoredGroup]) -> BatchPlan:
        """Return the plan with the responses to imitate, if there are any. The reported scores decide on each."""
        if not self.algorithm.imitates:
            return plan
        reported = (zip(scored.group.infos, scored.scores.scores, strict=True) for scored in groups)
        weight = self.algorithm.imitation_weight
        return replace(plan, imitation={info.sequence_id: weight(score) for pairs in reported for info, score in pairs})

    def given(self, groups: Sequence[ScoredGroup], step: int, *, num_minibatches: int) -> list[GivenByRank]:
        """Return the given responses of the batch's prompts by minibatch. Empty: the step learns from none."""
        share = self.algorithm.given_share(step)
        if not share or not num_minibatches:
            return []
        shape = {"num_minibatches": num_minibatches, "num_ranks": self.roles.policy.num_ranks}
        dealt = plan_given(groups, share=share, step=step, seed=self.config.run.seed, **shape)
        return [[[of_rank] for of_rank in by_rank] for by_rank in dealt]

    async def _experience(
        self,
        plan: BatchPlan,
        kept: Sequence[ScoredGroup],
        trained: Sequence[ScoredGroup],
        prompts: Sequence[RemoteColumns[PrivilegedPrompts]],
        own: Mapping[int, float] | None,
    ) -> tuple[PrepareReport, Mapping[int, float]]:
        """Compute reference logprobs, values, old logprobs and advantages. `kept` holds all scores to compare.
        `trained` holds the same groups without masked responses, `prompts` those of a policy that teaches itself."""
        roles, config, critic = self.roles, self.algorithm.config, self.roles.critic
        groups = [scored.group for scored in trained]
        placed = self.config.cluster.roles
        share_bundles = placed.reference.colocate_with == placed.critic.colocate_with == "policy"
        in_turn = asyncio.Semaphore(1 if share_bundles else 2)

        async def logprobs() -> Columns:
            async with in_turn:
                return await self.columns.take(trained, self.reference_logprobs)

        critic_plan = plan if critic is None else self.plan(trained, plan.step, critic, plan.steps)

        async def old_values() -> Columns:
            async with in_turn:
                return [] if critic is None else await critic.values(critic_plan, groups)

        references, values = await asyncio.gather(logprobs(), old_values())
        report = await roles.policy.prepare(plan, groups, [*references, *prompts])
        scores = {
            info.sequence_id: score
            for scored in kept
            for info, score in zip(scored.group.infos, scored.scores.scores, strict=True)
        }
        if config.kl.place == "reward" and critic is None:
            for sequence in report.sequences:
                if sequence.kl_ref is not None:
                    scores[sequence.sequence_id] -= plan.kl_coef * sequence.kl_ref
        if own is None:
            estimated = self.algorithm.sequence_advantages(self._outcomes(kept, list(scores.values())))
            own = None if estimated is None else dict(zip(scores, estimated.tolist(), strict=True))
        advantages = await roles.policy.set_advantages(plan, own, values)
        if critic is not None:
            await critic.prepare(critic_plan, advantages.returns)
        self.record.add(report.metrics)
        self.record.add(advantages.metrics)
        return report, advantages.mean_advantages

    def _outcomes(self, groups: Sequence[ScoredGroup], scores: Sequence[float]) -> SequenceOutcomes:
        """Return the outcomes compared by the algorithm, with the values of the prompts if there are any."""
        outcomes = self.scores.outcomes(groups, scores)
        if not self.prompt_values:
            return outcomes
        values = [self.prompt_values[scored.group.request.prompt.prompt_id] for scored in groups]
        self.record.add({"advantages/prompt_value/mean": Mean.of(values)})
        return replace(outcomes, prompt_values=outcomes.scores.new_tensor(values))

    async def _privileged_prompts(
        self, trained: Sequence[ScoredGroup], groups: Sequence[ScoredGroup]
    ) -> list[RemoteColumns[PrivilegedPrompts]]:
        """Return the teacher's prompts of a policy that teaches itself, or no prompts. The reported scores of whole
        groups choose the better responses."""
        section = self.algorithm.config
        if not isinstance(section, SelfTeaching):
            return []
        whole = {scored.group.request.group_id: scored for scored in groups}
        contexts = []
        for scored in trained:
            of_group = contexts_of(whole[scored.group.request.group_id], section)
            ids = [info.sequence_id for info in scored.group.infos]
            contexts.append({i: of_group[i] for i in ids if i in of_group})
        taught, count = sum(map(len, contexts)), sum(len(scored.group.infos) for scored in trained)
        self.record.add({"experience/privileged/fraction": Mean(total=taught, count=count)})
        return await privileged_prompts(self.roles.reward, trained, contexts)

    async def _update(self, minibatch: int, step: int, given: GivenByRank) -> None:
        """Make one optimizer step of each trained role. Roles with separate hardware update concurrently."""
        policy, trained = self.roles.policy, self.trained(step)
        updates = [self._update_one(role, minibatch, *([given] if role is policy else [])) for role in trained]
        if self.config.cluster.roles.critic.colocate_with is None:
            await asyncio.gather(*updates)
            return
        for update in updates:
            await update

    async def _update_one(self, role: PolicyRole | CriticRole, minibatch: int, *given: GivenByRank) -> None:
        self.record.add(await role.forward_backward(minibatch, *given))
        self.record.add(await role.optim_step())

    def trained(self, step: int) -> list[PolicyRole | CriticRole]:
        """Return the roles updated in a step."""
        critic = self.roles.critic
        if critic is None:
            return [self.roles.policy]
        return [critic] if step <= self.algorithm.config.critic_only_steps else [self.roles.policy, critic]

    def _adapt_kl(self, reports: Sequence[SequenceReport], *, num_sequences: int) -> None:
        adaptive = self.algorithm.config.kl.adaptive
        if self.algorithm.config.kl.coef > 0.0:
            self.record.add({"experience/kl_coef": Last(value=self.kl_coef)})
        kls = [sequence.kl_ref for sequence in reports if sequence.kl_ref is not None]
        if adaptive is not None and kls:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                kl=sum(kls) / len(kls),
                target=adaptive.target,
                horizon=float(adaptive.horizon),
                num_sequences=num_sequences,
            )
