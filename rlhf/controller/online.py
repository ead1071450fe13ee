"""Train on rollouts.

    prompts -> rollouts -> rewards -> experience -> advantages -> minibatches -> update -> weight sync

Version v of the weights is the result of v training steps. Step s trains on responses of version s - 1, or of an
earlier version (rlhf.controller.batch_queue), and finally syncs version s to the engines. A notice to end while the
step waits for a batch stores the finished responses for a resumed run and keeps the previous step. A later stage is
finished first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhf.algorithms.algorithm import Kind
from rlhf.config.derive import shares_engines_gpus
from rlhf.config.schema.root import Config
from rlhf.controller.advantage_learning import AdvantageLearning
from rlhf.controller.batch_queue import Batch, BatchQueue, digest_of_settings
from rlhf.controller.carried import begun_requests, first_untrained_group
from rlhf.controller.collect import Collector
from rlhf.controller.distillation_learning import DistillationLearning
from rlhf.controller.evaluation import EvalSet, compare_with_teacher, score_held_out
from rlhf.controller.group_queue import GroupQueue
from rlhf.controller.learning import Learning, OnlineRoles, Signals
from rlhf.controller.loop import TrainingLoop
from rlhf.controller.pair_learning import PairLearning
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_report import group_samples, rollout_metrics
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.controller.supervisor import Supervisor
from rlhf.controller.weight_sync import sync_weights
from rlhf.data.stream import Stream
from rlhf.errors import Preempted, ResultsLost, WorkerLost
from rlhf.evaluation.results import Marking
from rlhf.role_table import GUESTS_OF_ENGINES, ROLE_OF_STAGE, ROLES, TRAINED_ROLES, Role
from rlhf.roles import GpuGuest, Metrics, Ref, SampleSelection, ScoredGroup
from rlhf.rollouts.records.spool import forget_after, keep_sampled_by
from rlhf.tracking.metrics.reductions import Last, Sum
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.types import Prompt, Sampling, TokenSignals

T = TypeVar("T")
AHEAD = "rollouts"  # folder of a checkpoint
LEARNERS: Mapping[Kind, type[Learning]] = {
    "advantages": AdvantageLearning,
    "sampled_pairs": PairLearning,
    "sampled_distillation": DistillationLearning,
}


class OnlineController(TrainingLoop):
    """The loop of an online run."""

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
        supervisor: Supervisor,
        rewards_fingerprint: str,
        environment_fingerprint: str = "",
    ) -> None:
        assert config.rollouts is not None
        present = {field.name: getattr(roles, field.name) for field in fields(roles)}
        scored = bool(config.rewards)
        super().__init__(
            config,
            record,
            present,
            {role: present[role] for role in TRAINED_ROLES if present[role] is not None},
            eval_sets=eval_sets,
            eval_metric="score" if scored else "kl_teacher",
            lower_is_better=not scored,
            policy_fingerprint=policy_fingerprint,
            supervisor=supervisor,
        )
        self.roles = roles
        self.eval_sets = eval_sets
        self.marking = marking
        self.probe_ids = probe_ids
        self.rollouts = config.rollouts
        sampling = Sampling(**self.rollouts.model_dump(include=set(Sampling.__dataclass_fields__)))
        self.learning = LEARNERS[config.algorithm.kind](config, roles, record)
        self.in_flight = self.rollouts.weight_updates == "in_flight"
        self.scorer = RolloutScorer(
            roles.rollout,
            roles.reward,
            record,
            rewards_fingerprint=rewards_fingerprint,
            in_flight=self.in_flight,
        )
        arrived = self.learning.arrived if config.train.streamed or self.rollouts.max_staleness else None
        queue = partial(GroupQueue, order=self.rollouts.batch_order) if self.in_flight else BatchQueue
        self.batches: BatchQueue | GroupQueue = queue(
            Collector(
                config,
                prompts,
                self.scorer,
                record,
                sampling,
                arrived=arrived,
                outdated=self.learning.columns.forget,
            ),
            record,
            max_staleness=self.rollouts.max_staleness,
            num_steps=config.train.num_steps,
            settings=digest_of_settings(config, rewards_fingerprint, environment_fingerprint),
        )
        self.sharing = shares_engines_gpus(config)
        self.learnt: list[Metrics] = []  # of the updates of the step in progress
        self.is_published = False  # whether the policy's ranks hold the weights for successors of engines

    async def begin(self) -> None:
        """Prepare the roles, and give the engines their first weights."""
        await super().begin()
        await self._sync(self.step)

    async def run(self, *, until: int | None = None) -> bool:
        """Run the loop, and give up leftover rollouts, since the engines may serve another run."""
        try:
            is_over = await super().run(until=until)
        finally:
            unfinished = await self.batches.stop()
        if unfinished:
            await self.roles.rollout.cancel(unfinished)
        return is_over

    async def end(self) -> None:
        """Load the trained roles onto shared GPUs, and prepare the policy for export."""
        await self._to_trainers(*TRAINED_ROLES, keep_weights=False)
        await super().end()

    async def train_step(self, step: int) -> None:
        roles, record = self.roles, self.record
        began = time.perf_counter()
        batch, busy_s = await self._take(step)
        waited_s = time.perf_counter() - began - busy_s
        for metrics in batch.metrics:
            record.add(metrics)
        record.groups = batch.collected.ended
        groups: Sequence[ScoredGroup] = batch.collected.groups
        seconds = record.row()["time/rollouts_s"]
        record.add(rollout_metrics(groups, version=step - 1))
        record.add({"throughput/rollout_tokens_per_s": Last(value=batch.collected.sampled_tokens / seconds)})
        groups, signals, columns, finishing_s = await self._train(groups, step)
        record.add({"time/trainer_waits_s": Sum(total=waited_s + finishing_s)})
        if self.batches.seconds is not None:
            idle = 1.0 - self.batches.seconds / (time.perf_counter() - began)
            record.add({"time/engines_idle/fraction": Last(value=idle)})
        if self.config.cluster.roles.rollout.is_elastic:
            record.add({"rollouts/engines": Last(value=roles.rollout.num_working)})
        self.learning.end_step(groups, signals)
        try:
            await self._write_samples(groups, signals, columns, step)
        except ResultsLost:
            await self._write_samples(await self._found_again(groups), signals, columns, step)

    async def _write_samples(
        self, groups: Sequence[ScoredGroup], signals: Signals, columns: Sequence[Ref[TokenSignals]], step: int
    ) -> None:
        chosen = self._samples(groups, signals)
        if chosen:
            await self.roles.reward.write_samples(samples_path(self.record.folder.scratch, step), chosen, columns)

    async def _found_again(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        return await self.scorer.found_again(groups, self.batches.collector.sampling)

    def _samples(self, groups: Sequence[ScoredGroup], signals: Signals) -> list[SampleSelection]:
        """Return the records of a step for the samples file."""
        return group_samples(groups, signals, split="train", most=self.config.tracking.samples_per_step)

    async def _train(
        self, groups: Sequence[ScoredGroup], step: int
    ) -> tuple[Sequence[ScoredGroup], Signals, Sequence[Ref[TokenSignals]], float]:
        """Update the trained roles and sync the weights, despite the loss of ranks, or of a node with the tokens.

        Return the groups, the signals, their columns for the samples file, and the seconds of waiting for rollouts.
        """
        signals, columns, waited_s = Signals(), list[Ref[TokenSignals]](), 0.0

        async def learn() -> None:
            nonlocal groups, signals, columns
            try:
                signals = await self.learning.learn(groups, step)
            except ResultsLost as lost:
                self.learning.columns.forget(groups)  # which may be lost too, or could not be computed
                groups = await self._found_again(groups)
                raise self._begins_again(lost) from lost
            written = [i for one in self._samples(groups, signals) for i in one.sequence_ids if i in signals.trained]
            columns = await self.roles.policy.token_signals(written) if written else []

        async def update() -> None:
            if self.trained_step < step:
                with self.record.apart(self.learnt, is_shown=True):
                    await self.batches.during(learn())
                await self.keep(step)

        async def learn_and_sync() -> None:
            nonlocal waited_s
            await self._to_trainers(*GUESTS_OF_ENGINES, keep_weights=False)
            await update()
            began = time.perf_counter()
            await self._with_weights(self.batches.finish(step), self._go_back)
            waited_s += time.perf_counter() - began
            await update()  # again, if the engines have needed the weights before it
            if self.learning.renews_reference(step):
                await self.wait_until_kept()  # with the new reference the step cannot be done again
                await self.learning.renew_reference(step)
            await self._sync(step)
            await self.wait_until_kept()  # a later loss must not need the batch again

        await self.despite_losses(learn_and_sync, oldest=step - 1)
        for metrics in self.learnt:
            self.record.add(metrics)
        self.learnt = []
        return groups, signals, columns, waited_s

    async def restart_trained(self, oldest: int) -> None:
        was_published, self.is_published = self.is_published, False
        await super().restart_trained(oldest)
        if self.trained_step == self.step:  # the updates of the step in progress are lost
            self._forget_updates()
        if was_published and self.roles.rollout.gives_published and self.trained_step == self.scorer.weights[0]:
            await self._publish_again()

    def _begins_again(self, lost: ResultsLost) -> WorkerLost:
        """Return the loss of a trained rank. A step is then repeated with new results."""
        role = lost.role if lost.role in self.trained else next(iter(self.trained))
        return WorkerLost(lost.reason, role=role, rank=0, stage=lost.stage, kind="died")

    def _forget_updates(self) -> None:
        self.learnt.clear()
        self.learning.begin_again()

    async def _publish_again(self) -> None:
        """Publish the weights of the last sync for successors of lost engines, after the loss of the first rank."""
        await self.roles.rollout.withdraw_weights()
        self.roles.rollout.offer_weights(await self.roles.policy.publish(self.trained_step))
        self.is_published = True

    async def _publish_despite_losses(self) -> None:
        await self.despite_losses(self._publish_again)

    async def _go_back(self) -> None:
        """Restore the state before the updates of the step in progress, and publish that state's weights again."""
        self.trained_step = self.step
        await asyncio.gather(*(role.take_back(self.step) for role in self.trained.values()))
        self._forget_updates()
        await self._publish_again()

    async def _with_weights(self, waiting: Awaitable[T], publish: Callable[[], Awaitable[None]]) -> T:
        """Return the result of a wait for engines. Publish the weights again if an engine cannot get the weights."""
        wait = asyncio.ensure_future(waiting)
        try:
            while not wait.done():
                missing = asyncio.ensure_future(self.roles.rollout.weights_are_missing())
                try:
                    await asyncio.wait({wait, missing}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    missing.cancel()
                if not wait.done():
                    await publish()
            return await wait
        finally:
            wait.cancel()
            await asyncio.gather(wait, return_exceptions=True)

    async def _take(self, step: int) -> tuple[Batch, float]:
        """Return the step's batch, and the seconds of training already spent on the batch.

        If the run is to end, keep the previous step and raise Preempted.
        """
        if not self.is_published:
            with self.record.apart([], is_shown=True):  # the last step has measured this version
                await self.despite_losses(partial(self._sync, self.step))
        self.batches.request(step)
        if self.sharing:  # the offloaded policy cannot be saved while engines generate
            return await self.batches.take(step), 0.0
        taken = await self.notice.unless_given(self._learn_while_taking(step))
        if taken is not None:
            return taken
        await self.batches.stop()
        if self.kept_step < self.step:
            await self.despite_losses(partial(self.save_aside, self.finished_state))
            await self.commit(self.step)
        raise Preempted(f"a checkpoint of step {self.step} is written" if self.step else "no step was done")

    async def _learn_while_taking(self, step: int) -> tuple[Batch, float]:
        """Return the whole batch and, with train.streamed, the seconds of the work on the first groups."""
        if not self.config.train.streamed:
            return await self._with_weights(self.batches.take(step), self._publish_despite_losses), 0.0

        async def stream() -> float:
            try:
                with self.record.apart(self.learnt, is_shown=True):
                    return await self._with_weights(self.learning.stream(step), self._publish_again)
            except ResultsLost as lost:
                await self.learning.find_again(self._found_again)
                raise self._begins_again(lost) from lost

        learning = asyncio.create_task(self.despite_losses(stream))
        taking = asyncio.create_task(self.batches.take(step))
        try:
            return await asyncio.gather(taking, learning)
        finally:
            taking.cancel()
            learning.cancel()
            await asyncio.gather(taking, learning, return_exceptions=True)

    async def _sync(self, version: int) -> None:
        """Sync the weights to the engines, verify the weights, and hand the GPU to the engines."""
        roles, record = self.roles, self.record
        if self.sharing:  # free the GPU memory cached by torch, which the engines need
            await self._offload(*(role for role in GUESTS_OF_ENGINES if not ROLES[role].hosts))
            await roles.policy.empty_cache()
            await roles.rollout.wake("weights")
        record.progress.stage("weight_sync")
        with record.timeline.span("weight_sync", ROLE_OF_STAGE["weight_sync"]):
            checksum, metrics = await sync_weights(
                roles.policy,
                roles.rollout,
                version=version,
                probe_ids=self.probe_ids,
                dtype=self.config.policy.dtype,
                hand_over=self._to_engines,
            )
        record.add(metrics)
        self.scorer.weights = version, checksum
        self.is_published = True
        if self.in_flight and version == 0:  # without a checkpoint, an earlier start may have trained other weights
            await asyncio.to_thread(keep_sampled_by, record.folder.spool, version, checksum)
        await self.batches.synced(version)

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
        return [getattr(self.roles, name) for name in names if name in self.sharing]

    async def evaluate(self, step: int) -> None:
        """Answer and score the held-out prompts.

        With a teacher, compare the responses with the teacher's predictions.
        """
        roles = self.roles
        answers = score_held_out(self.eval_sets, self.config, self.marking, self.scorer, step=step)
        answered = await self._with_weights(answers, self._publish_despite_losses)
        if roles.teacher is not None:
            async with self._trainers_turn(roles.teacher.role):
                await compare_with_teacher(answered, self.config, roles.teacher, self.record)

    def trained_tokens(self, row: Mapping[str, float]) -> tuple[float, float]:
        """Return the tokens of all responses with their prompts, and their mean number."""
        mean_length = row["rollouts/prompt_tokens/mean"] + row["rollouts/response_tokens/mean"]
        return mean_length * self.rollouts.prompts_per_step * self.rollouts.samples_per_prompt, mean_length

    def saving(self) -> AbstractAsyncContextManager[None]:
        """Load the trained roles onto shared GPUs in the block."""
        return self._trainers_turn(*TRAINED_ROLES)

    async def checkpoint(self, *, is_best: bool) -> None:
        """Write a checkpoint, and delete the stored responses covered by the checkpoint."""
        await super().checkpoint(is_best=is_best)
        state = self.batches.state()
        self.scorer.keep_from(first_untrained_group(state), begun=begun_requests(state))

    async def save_aside(self, state: Mapping[str, Any], *, kept: bool = False) -> Path:
        """Write a checkpoint before it becomes valid, with all begun or untrained responses."""
        aside = await super().save_aside(state, kept=kept)
        if (self.rollouts.max_staleness and not self.in_flight) or self.rollouts.carry_over:
            start, begun = first_untrained_group(state), begun_requests(state)
            await asyncio.to_thread(self.scorer.copy_to, aside / AHEAD, start=start, begun=begun)
        return aside

    def position(self) -> Mapping[str, Any]:
        return {**self.batches.state(), **self.learning.state()}

    async def restore_position(self, state: Mapping[str, Any]) -> None:
        ahead = self.record.folder.checkpoint(self.step) / AHEAD
        if self.in_flight:  # the weights after the checkpoint are trained anew; other modes may have trained others
            newest = self.step if "outstanding" in state else -1
            await asyncio.to_thread(forget_after, self.record.folder.spool, newest)
        if ahead.is_dir():
            await asyncio.to_thread(self.scorer.take_from, ahead)
        self.batches.restore(state)
        await self.learning.restore(state, self.step)
