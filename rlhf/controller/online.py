"""Train on rollouts.

    prompts -> rollouts -> rewards -> experience -> advantages -> minibatches -> update -> weight sync

Version v of the weights is the result of v training steps. Step s samples its responses with version s - 1 (rollouts
and training alternate), trains, and syncs version s to the engines before it ends. A step is kept in this order: its
checkpoint is written aside, its row is logged, the checkpoint becomes valid. So a checkpoint always has its row. A
notice to end during the rollouts stores the finished ones for a resumed run and keeps the previous step. A later stage
is finished first.

The loop sees scalars, ids and references. It computes nothing on tokens and knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from rlhf.config.derive import distils_rollouts, pairs_rollouts, shares_engines_gpus
from rlhf.config.schema.root import Config
from rlhf.controller.answers import Answers
from rlhf.controller.by_advantages import AdvantageLearning
from rlhf.controller.by_distillation import DistillationLearning
from rlhf.controller.by_pairs import PairLearning
from rlhf.controller.collect import Collected, Collector
from rlhf.controller.evaluation import EvalSet, compare_with_teacher, score_held_out
from rlhf.controller.learning import Learning, OnlineRoles
from rlhf.controller.notice import Notice
from rlhf.controller.record import Best, RunRecord
from rlhf.controller.sampling import group_samples, rollout_metrics
from rlhf.controller.trained import trained_models
from rlhf.controller.weight_sync import sync_weights
from rlhf.data.stream import Stream
from rlhf.errors import Preempted
from rlhf.evaluation.results import Marking
from rlhf.roles import (
    CriticRole,
    GpuGuest,
    OnlineTeacherRole,
    PolicyRole,
    ReferenceRole,
    RewardRole,
    RolloutRole,
    ScoredGroup,
)
from rlhf.tracking.metrics.reductions import Last, Max, Sum
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.types import Prompt, Role, Sampling

logger = logging.getLogger(__name__)


class OnlineController:
    """Runs the training loop. `step` is the last finished step."""

    def __init__(
        self,
        config: Config,
        roles: OnlineRoles,
        record: RunRecord,
        *,
        prompts: Stream[Prompt],
        eval_sets: Mapping[str, EvalSet],
        marking: Marking,
        probe_ids: Sequence[int],
        policy_fingerprint: str,
        rewards_fingerprint: str,
    ) -> None:
        assert config.rollouts is not None
        self.config = config
        self.roles = roles
        self.record = record
        self.eval_sets = eval_sets
        self.marking = marking
        self.probe_ids = probe_ids
        self.fingerprint = policy_fingerprint
        self.rollouts = config.rollouts
        sampling = Sampling(
            max_new_tokens=self.rollouts.max_new_tokens,
            temperature=self.rollouts.temperature,
            top_p=self.rollouts.top_p,
            top_k=self.rollouts.top_k,
            min_p=self.rollouts.min_p,
            repetition_penalty=self.rollouts.repetition_penalty,
            stop=self.rollouts.stop,
            stop_token_ids=self.rollouts.stop_token_ids,
        )
        self.notice = Notice()
        self.step = 0
        self.kept_step = 0  # step of the newest checkpoint; 0 without one
        self.learning = _learning(config, roles, record)
        first_set = next(iter(eval_sets), "heldout")
        scored = bool(config.rewards)
        metric = f"eval/{first_set}/{'score' if scored else 'kl_teacher'}"
        self.best = Best.of(config.train, metric, default_lower=not scored)
        self.answers = Answers(roles.rollout, roles.reward, record, rewards_fingerprint=rewards_fingerprint)
        self.collector = Collector(config, prompts, self.answers, record, sampling)
        self.sharing = shares_engines_gpus(config)

    async def run(self, *, until: int | None = None) -> bool:
        """Train until the last step, or until step `until`, and write a checkpoint there.

        Returns whether the run is over. Continues from `step` if a checkpoint has been restored.
        """
        train, record = self.config.train, self.record
        end = train.num_steps if until is None else until
        record.begin_step(self.step)
        self.arithmetic = await self.roles.policy.arithmetic()
        await self._sync(self.step)
        if self.step == 0 and self.eval_sets and self.config.eval.at_start:
            await self._evaluate(0)
            record.write_row(0, record.row())
        while self.step < end and not self.best.is_over:
            step = self.step + 1
            self.state_before = self._state()
            record.begin_step(step)
            with record.stage("step"):
                await self._train_step(step)
            last = step == train.num_steps
            evaluates = bool(self.eval_sets) and (last or step % self.config.eval.every == 0)
            if evaluates:
                await self._evaluate(step)
            await self._add_memory()
            self._add_throughput()
            self.step = step
            is_best = evaluates and self.best.improves(record.row(), step)
            is_over, is_told = last or self.best.is_over, self.notice.is_given
            if is_over or is_told or step == end or is_best or step % train.checkpoint_every == 0:
                await self._checkpoint(is_best=is_best)
            else:
                record.write_row(step, record.row())
            if is_told and not is_over:
                raise Preempted(f"a checkpoint of step {step} is written")
        if self.step < train.num_steps and not self.best.is_over:
            return False
        await self._to_trainers("policy", "critic", keep_weights=False)  # for the export
        best = self.best.step
        if train.early_stopping is not None and best is not None and best != self.step:
            logger.info("%s was best at step %d: that is the final model", self.best.metric, best)
            await self.roles.policy.load(record.folder.checkpoint(best) / "policy")
        return True

    async def _train_step(self, step: int) -> None:
        """Run the stages listed in the module's docstring."""
        roles, record = self.roles, self.record
        with record.stage("rollouts", role="rollout"):
            batch = await self._collect(step)
        groups, seconds = batch.groups, record.row()["time/rollouts_s"]
        record.add(rollout_metrics(groups, version=step - 1))
        record.add({"throughput/rollout_tokens_per_s": Last(value=batch.sampled_tokens / seconds)})
        await self._to_trainers("policy", "critic", "reference", "teacher", keep_weights=False)
        signals = await self.learning.learn(groups, step)
        await self._sync(step)
        kept = self.config.tracking.samples_per_step
        if kept:
            chosen = group_samples(groups, signals, split="train", most=kept)
            written = [i for selection in chosen for i in selection.sequence_ids if i in signals.trained]
            columns = await roles.policy.token_signals(written) if written else []
            await roles.reward.write_samples(samples_path(record.folder.own, step), chosen, columns)

    async def _collect(self, step: int) -> Collected:
        """Return the step's batch. If the run is to end, keep the previous step and raise Preempted."""
        if self.sharing:  # the offloaded policy cannot be saved while engines generate
            return await self.collector.collect(step)
        batch = await self.notice.unless_given(self.collector.collect(step))
        if batch is not None:
            return batch
        if self.kept_step < self.step:
            await self._save_aside(self.state_before)
            self._commit()
        raise Preempted(f"a checkpoint of step {self.step} is written" if self.step else "no step was done")

    async def _sync(self, version: int) -> None:
        """Sync the weights to the engines, verify them, and hand the GPU to the engines."""
        roles, record = self.roles, self.record
        if self.sharing:  # free the GPU memory cached by torch, which the engines need
            await self._offload("critic", "reference", "teacher")
            await roles.policy.empty_cache()
            await roles.rollout.wake("weights")
        record.progress.stage("weight_sync")
        with record.timeline.span("weight_sync", "rollout"):
            report = await sync_weights(
                roles.policy,
                roles.rollout,
                version=version,
                probe_ids=self.probe_ids,
                dtype=self.config.policy.dtype,
                hand_over=self._to_engines,
            )
        record.add(
            {
                "weight_sync/version": Last(value=report.version),
                "weight_sync/probe_max_diff": Max(value=report.probe_max_diff),
                "time/weight_sync_s": Sum(total=report.seconds),
                "time/probe_s": Sum(total=report.probe_seconds),
            }
        )

    async def _to_trainers(self, *names: Role, keep_weights: bool) -> None:
        """On shared GPUs, put the engines to sleep and reload the named roles."""
        if self.sharing:
            await self.roles.rollout.sleep(keep_weights=keep_weights)
            await asyncio.gather(*(guest.reload() for guest in self._guests(names)))

    async def _to_engines(self) -> None:
        """Offload the policy once the engines have the new weights, and let the engines allocate their caches."""
        if self.sharing:
            await self._offload("policy")
            await self.roles.rollout.wake("cache")

    @asynccontextmanager
    async def _trainers_turn(self, *names: Role) -> AsyncIterator[None]:
        """Load the named roles on shared GPUs for the block. The engines sleep meanwhile and keep their weights."""
        if not self.sharing.intersection(names):
            yield
            return
        await self._to_trainers(*names, keep_weights=True)
        yield
        await self._offload(*names)
        await self.roles.rollout.wake("weights")
        await self.roles.rollout.wake("cache")

    async def _offload(self, *names: Role) -> None:
        await asyncio.gather(*(guest.offload() for guest in self._guests(names)))

    def _guests(self, names: Sequence[Role]) -> list[GpuGuest]:
        """Return the named roles that share GPUs with the engines."""
        return [getattr(self.roles, name) for name in names if name in self.sharing]

    async def _evaluate(self, step: int) -> None:
        roles = self.roles
        answered = await score_held_out(
            self.eval_sets, self.config, self.marking, self.answers, roles.reward, self.record, step=step
        )
        if roles.teacher is not None:
            await self._compare(answered, roles.teacher)

    async def _compare(self, answered: Mapping[str, Sequence[ScoredGroup]], teacher: OnlineTeacherRole) -> None:
        """Compare the held-out responses with the teacher's predictions."""
        async with self._trainers_turn("teacher"):
            await compare_with_teacher(answered, self.config, teacher, self.record)

    async def _add_memory(self) -> None:
        roles = self.roles
        members: dict[
            str, PolicyRole | RolloutRole | RewardRole | ReferenceRole | OnlineTeacherRole | CriticRole | None
        ] = {
            "policy": roles.policy,
            "rollout": roles.rollout,
            "reward": roles.reward,
            "reference": roles.reference,
            "teacher": roles.teacher,
            "critic": roles.critic,
        }
        for name, role in members.items():
            if role is not None:
                self.record.memory(name, await role.memory())
        await self.record.system()

    def _add_throughput(self) -> None:
        row = self.record.row()
        responses = self.rollouts.prompts_per_step * self.rollouts.samples_per_prompt
        trained = row.get("update/tokens/total", 0.0) / row["time/update_s"]  # 0 while only the critic is trained
        mean_length = row["rollouts/prompt_tokens/mean"] + row["rollouts/response_tokens/mean"]
        self.record.add(
            {
                "throughput/tokens_per_s": Last(value=mean_length * responses / row["time/step_s"]),
                "throughput/train_tokens_per_s": Last(value=trained),
                "throughput/mfu": Last(
                    value=self.arithmetic.utilisation(tokens_per_s=trained, mean_length=mean_length)
                ),
            }
        )

    async def _checkpoint(self, *, is_best: bool) -> None:
        """Write the checkpoint aside, log the step, and make the checkpoint valid."""
        with self.record.stage("checkpoint"):
            async with self._trainers_turn("policy", "critic"):
                await self._save_aside(self._state())
        self.record.write_row(self.step, self.record.row())
        self._commit()
        if is_best:
            self.record.folder.mark_best(self.step)
        await self.record.prune(self.config.train.keep_checkpoints)
        self.answers.clear()

    async def _save_aside(self, state: Mapping[str, Any]) -> None:
        aside = self.record.folder.begin_checkpoint(self.step)
        await self.roles.policy.save(aside / "policy")
        if self.roles.critic is not None:
            await self.roles.critic.save(aside / "critic")
        self.record.write_state(aside, state)

    def _commit(self) -> None:
        self.record.commit_checkpoint(self.step)
        self.kept_step = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            **self.collector.state(),
            **self.learning.state(),
            "best": self.best.state(),
            "policy": self.fingerprint,
            "algorithm": self.config.algorithm.name,
            "trained": trained_models(self.config),
        }

    async def restore(self, step: int) -> None:
        """Restore the checkpoint of a step."""
        state = self.record.read_state(step)
        folder = self.record.folder.checkpoint(step)
        self.collector.restore(state)
        self.step = self.kept_step = state["step"]
        await self.learning.restore(state, step)
        self.record.restore_best(self.best, state["best"])
        await self.roles.policy.load(folder / "policy")
        if self.roles.critic is not None:
            await self.roles.critic.load(folder / "critic")
        logger.info("resumed from the checkpoint of step %d", step)


def _learning(config: Config, roles: OnlineRoles, record: RunRecord) -> Learning:
    """Return the learning method of the configured algorithm."""
    if distils_rollouts(config):
        return DistillationLearning(config, roles, record)
    return (PairLearning if pairs_rollouts(config) else AdvantageLearning)(config, roles, record)
