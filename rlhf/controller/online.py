"""Train on rollouts.

    prompts -> rollouts -> rewards -> experience -> advantages -> minibatches -> update -> weight sync

Version v of the weights is the result of v training steps. Step s trains on responses of version s - 1, or of an
earlier version, and finally syncs version s to the engines. Batches come from a queue: of whole batches
(rlhf.controller.batch_queue), or of groups in flight (rlhf.controller.group_queue). If a notice to end comes during the
wait for a batch, the finished responses are stored for a resumed run, and a checkpoint of the previous step is written.
If the notice comes in a later stage, the step is finished first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rlhf.algorithms.algorithm import Kind
from rlhf.config.derive import sampler_top_tokens, shares_engines_gpus
from rlhf.config.schema.root import Config
from rlhf.controller.advantage_learning import AdvantageLearning
from rlhf.controller.batch_queue import BatchQueue
from rlhf.controller.carried import begun_requests, first_untrained_group
from rlhf.controller.collect import Collector
from rlhf.controller.distillation_learning import DistillationLearning
from rlhf.controller.evaluation import EvalSet, compare_with_teacher, score_held_out
from rlhf.controller.group_queue import GroupQueue
from rlhf.controller.learning import Learning, OnlineRoles
from rlhf.controller.loop import TrainingLoop
from rlhf.controller.pair_learning import PairLearning
from rlhf.controller.prompt_values import estimate_values
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_queue import Batch, RolloutQueue, digest_of_settings
from rlhf.controller.rollout_report import rollout_metrics
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.controller.self_distillation_learning import SelfDistillationLearning
from rlhf.controller.step_attempt import StepAttempt
from rlhf.controller.streamed_learning import StreamedAdvantageLearning
from rlhf.controller.supervisor import Supervisor
from rlhf.controller.weight_sync import sync_weights
from rlhf.data.stream import Stream
from rlhf.data.windows import DataStream
from rlhf.errors import Preempted
from rlhf.evaluation.results import Marking
from rlhf.role_table import GUESTS_OF_ENGINES, ROLE_OF_STAGE, ROLES, TRAINED_ROLES, Role
from rlhf.roles import GpuGuest
from rlhf.rollouts.records.spool import forget_after, retain_sampled_by
from rlhf.suites.spec import SuiteSpec
from rlhf.tracking.metrics.reductions import Last, Reduction, Sum
from rlhf.types import Prompt, Sampling

T = TypeVar("T")
AHEAD = "rollouts"  # folder of a checkpoint
LEARNERS: Mapping[Kind, type[Learning]] = {
    "advantages": AdvantageLearning,
    "sampled_pairs": PairLearning,
    "sampled_distillation": DistillationLearning,
    "self_distillation": SelfDistillationLearning,
}


class OnlineController(TrainingLoop):
    def __init__(
        self,
        config: Config,
        roles: OnlineRoles,
        record: RunRecord,
        *,
        prompts: DataStream[Prompt],
        eval_sets: Mapping[str, EvalSet],
        marking: Marking,
        probe_ids: Sequence[int],
        other_ids: Sequence[int] = (),
        policy_fingerprint: str,
        supervisor: Supervisor,
        rewards_fingerprint: str,
        suites: SuiteSpec | None = None,
        environment_fingerprint: str = "",
        code: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Create a loop before the first step.

        Args:
            other_ids: probe_ids with different images, to check once that policy and engines see images.
            code: digests of users' code by key, for a checkpoint.
        """
        assert config.rollouts is not None
        present = {field.name: getattr(roles, field.name) for field in fields(roles)}
        scored = bool(config.rewards)
        super().__init__(
            config,
            record,
            present,
            {role: present[role] for role in TRAINED_ROLES if present[role] is not None},
            eval_sets=[*eval_sets, *(() if suites is None else suites.names)],
            eval_metric="score" if scored or not eval_sets else "kl_teacher",
            lower_is_better=not scored and bool(eval_sets),
            policy_fingerprint=policy_fingerprint,
            supervisor=supervisor,
        )
        self.roles, self.code, self.prompts = roles, code, prompts
        self.eval_sets = eval_sets
        self.suites = suites
        self.marking = marking
        self.probe_ids = probe_ids
        self.other_ids = other_ids  # empty after the check
        self.rollouts = config.rollouts
        given = self.rollouts.model_dump(include=set(Sampling.__dataclass_fields__))
        self.sampling = Sampling(**given, top_logprobs=sampler_top_tokens(config))
        learner = StreamedAdvantageLearning if config.train.streamed else LEARNERS[config.algorithm.kind]
        self.learning = learner(config, roles, record)
        self.in_flight = self.rollouts.weight_updates == "in_flight"
        self.scorer = RolloutScorer(
            roles.rollout, roles.reward, record, rewards_fingerprint=rewards_fingerprint, in_flight=self.in_flight
        )
        collector = self.collector = Collector(config, prompts, self.scorer, record, self.sampling)
        collector.outdated = self.learning.columns.forget
        if config.train.streamed or self.rollouts.max_staleness:
            collector.arrived = self.learning.arrived
        queue = partial(GroupQueue, order=self.rollouts.batch_order) if self.in_flight else BatchQueue
        self.batches: RolloutQueue = queue(
            collector,
            record,
            max_staleness=self.rollouts.max_staleness,
            num_steps=config.train.num_steps,
            settings=digest_of_settings(config, rewards_fingerprint, environment_fingerprint),
        )
        self.sharing = shares_engines_gpus(config)
        self.attempt: StepAttempt | None = None  # attempt at the step in progress
        self.is_published = False  # whether the policy's ranks hold the weights for successors of engines

    async def begin(self) -> None:
        """Prepare the roles, and give the engines their first weights."""
        await super().begin()
        await self.sync(self.step)
        learning = self.learning
        if isinstance(learning, AdvantageLearning) and self.config.algorithm.num_value_samples and self.step == 0:
            assert isinstance(self.prompts, Stream), "data.stream_window is refused"
            prompts = [self.prompts.at(row) for row in self.prompts.order.rows]
            values = estimate_values(prompts, self.config, learning.algorithm, self.scorer, self.sampling)
            learning.prompt_values = await self._with_weights(values, self._publish_despite_losses)

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
        await self.to_trainers(*TRAINED_ROLES, keep_weights=False)
        await super().end()

    async def train_step(self, step: int) -> None:
        """Take the batch of a step, learn from the batch, and sync the weights. After a loss, `despite_losses` repeats
        the learning from a part of the batch, or all of `_learn_and_sync`."""
        began = time.perf_counter()
        attempt = self.attempt = StepAttempt(step, self.learning, self.scorer, self.sampling)
        await self._publish_anew()
        self.batches.request(step)
        batch = await self._take(attempt)
        attempt.groups, attempt.waited_s = batch.collected.groups, time.perf_counter() - began - attempt.busy_s
        self.measure_rollouts(batch, step)
        await self.despite_losses(partial(self._learn_and_sync, attempt), oldest=step - 1)
        for metrics in attempt.metrics:
            self.record.add(metrics)
        self._measure_waits(attempt, time.perf_counter() - began)
        self.learning.end_step(attempt.groups, attempt.signals)
        await attempt.write_samples()

    async def _learn_and_sync(self, attempt: StepAttempt) -> None:
        """Execute a step after its batch is complete. The ranks have the state before the step, or after the updates.

        updates -> snapshot -> batches ahead are whole -> reference -> weight sync -> snapshot is whole
        """
        step = attempt.step
        await self.to_trainers(*GUESTS_OF_ENGINES, keep_weights=False)
        await self._update(attempt)
        began = time.perf_counter()
        await self._with_weights(self.batches.until_weights_may_change(), partial(self._go_back, attempt))
        attempt.waited_s += time.perf_counter() - began
        await self._update(attempt)  # repeats the updates if the wait restored the state before them
        if self.learning.renews_reference(step):
            await self.wait_for_snapshots()  # after the renewal, the step cannot be repeated with the old reference
            await self.learning.renew_reference(step)
        await self.sync(step)
        await self.wait_for_snapshots()  # after a later loss, no rank must need the batch again

    async def _update(self, attempt: StepAttempt) -> None:
        """Make the updates of a step, unless already made, and begin the step's snapshot."""
        if self.trained_step < attempt.step:
            await self.batches.during(attempt.learn())
            await self.take_snapshot(attempt.step)

    def measure_rollouts(self, batch: Batch, step: int) -> None:
        record, collected = self.record, batch.collected
        for metrics in batch.metrics:
            record.add(metrics)
        record.groups = collected.ended
        seconds = record.row()["time/rollouts_s"]
        record.add(rollout_metrics(collected.groups, version=step - 1))
        record.add({"throughput/rollout_tokens_per_s": Last(value=collected.sampled_tokens / seconds)})

    def _measure_waits(self, attempt: StepAttempt, seconds: float) -> None:
        metrics: dict[str, Reduction] = {"time/trainer_waits_s": Sum(total=attempt.waited_s)}
        if self.batches.seconds is not None:
            metrics["time/engines_idle/fraction"] = Last(value=1.0 - self.batches.seconds / seconds)
        if self.config.cluster.roles.rollout.is_elastic:
            metrics["rollouts/engines"] = Last(value=self.roles.rollout.num_working)
        self.record.add(metrics)

    async def restart_trained(self, oldest: int) -> None:
        was_published, self.is_published = self.is_published, False
        await super().restart_trained(oldest)
        if self.attempt is not None and self.trained_step == self.step:  # the updates of the step in progress are lost
            self.attempt.begin_again()
        if was_published and self.roles.rollout.gives_published and self.trained_step == self.scorer.weights[0]:
            await self._publish_again()

    async def _publish_again(self) -> None:
        """Publish the weights of the last sync for successors of lost engines, after the loss of the first rank."""
        await self.roles.rollout.withdraw_weights()
        self.roles.rollout.offer_weights(await self.roles.policy.publish(self.trained_step))
        self.is_published = True

    async def _publish_despite_losses(self) -> None:
        await self.despite_losses(self._publish_again)

    async def _publish_anew(self) -> None:
        """Sync the weights of the last step again after the loss of the publishing ranks."""
        if not self.is_published:
            with self.record.apart([], is_shown=True):  # the last step has measured this version
                await self.despite_losses(partial(self.sync, self.step))

    async def _go_back(self, attempt: StepAttempt) -> None:
        """Restore the state before the updates of the step in progress, and publish these weights again."""
        self.trained_step = self.step
        await asyncio.gather(*(role.restore_snapshot(self.step) for role in self.trained.values()))
        attempt.begin_again()
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

    async def _take(self, attempt: StepAttempt) -> Batch:
        """Return the batch of a step. If the run is to end, save the step before and raise Preempted."""
        if self.sharing:  # the offloaded policy cannot be saved while engines generate
            return await self.batches.take(attempt.step)
        learning = self.learning
        if isinstance(learning, StreamedAdvantageLearning):
            taking = self._take_and_stream(attempt, learning)
        else:
            taking = self._with_weights(self.batches.take(attempt.step), self._publish_despite_losses)
        batch = await self.notice.unless_given(taking)
        if batch is not None:
            return batch
        await self.batches.stop()
        if self.checkpoint_step < self.step:
            await self.despite_losses(partial(self.save_aside, self.finished_state))
            await self.commit(self.step)
        raise Preempted(f"a checkpoint of step {self.step} is written" if self.step else "no step was done")

    async def _take_and_stream(self, attempt: StepAttempt, learning: StreamedAdvantageLearning) -> Batch:
        """Return the whole batch, after learning from the first groups."""

        def stream() -> Awaitable[None]:
            return self._with_weights(attempt.stream(learning), self._publish_again)

        streaming = asyncio.create_task(self.despite_losses(stream))
        taking = asyncio.create_task(self.batches.take(attempt.step))
        try:
            batch, _ = await asyncio.gather(taking, streaming)
            return batch
        finally:
            taking.cancel()
            streaming.cancel()
            await asyncio.gather(taking, streaming, return_exceptions=True)

    async def sync(self, version: int) -> None:
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
                other_ids=self.other_ids,
            )
        self.other_ids = ()
        record.add(metrics)
        self.scorer.weights = version, checksum
        self.is_published = True
        if self.in_flight and version == 0:  # without a checkpoint, an earlier start may have trained other weights
            await asyncio.to_thread(retain_sampled_by, record.folder.spool, version, checksum)
        await self.batches.synced(version)

    async def to_trainers(self, *names: Role, keep_weights: bool) -> None:
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
        """Load the named roles on shared GPUs for the block. In the block, the engines sleep and keep their weights."""
        if not self.sharing.intersection(names):
            yield
            return
        await self.to_trainers(*names, keep_weights=True)
        yield
        await self._offload(*names)
        await self.roles.rollout.wake("weights")
        await self.roles.rollout.wake("cache")

    async def _offload(self, *names: Role) -> None:
        await asyncio.gather(*(guest.offload() for guest in self._guests(names)))

    def _guests(self, names: Sequence[Role]) -> list[GpuGuest]:
        return [getattr(self.roles, name) for name in names if name in self.sharing]

    async def evaluate(self, step: int) -> None:
        """Answer and score the held-out prompts. With a teacher, compare responses and the teacher's predictions."""
        roles = self.roles
        answers = score_held_out(self.eval_sets, self.config, self.marking, self.scorer, step=step, suites=self.suites)
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
        self._forget_covered()

    async def save_step(self) -> None:
        await super().save_step()
        self._forget_covered()

    def _forget_covered(self) -> None:
        state = self.batches.state()
        self.scorer.retain_from(first_untrained_group(state), begun=begun_requests(state))

    async def save_aside(self, state: Mapping[str, Any], *, from_snapshots: bool = False) -> Path:
        aside = await super().save_aside(state, from_snapshots=from_snapshots)
        if (self.rollouts.max_staleness and not self.in_flight) or self.rollouts.carry_over:
            start, begun = first_untrained_group(state), begun_requests(state)
            await asyncio.to_thread(self.scorer.save_to, aside / AHEAD, start=start, begun=begun)
        return aside

    def position(self) -> Mapping[str, Any]:
        return {**self.batches.state(), **self.learning.state(), "code": dict(self.code)}

    async def restore_position(self, state: Mapping[str, Any]) -> None:
        ahead = self.record.folder.checkpoint(self.step) / AHEAD
        if self.in_flight:  # the weights after the checkpoint are trained again; other modes may have trained others
            newest = self.step if "outstanding" in state else -1
            await asyncio.to_thread(forget_after, self.record.folder.spool, newest)
        if ahead.is_dir():
            await asyncio.to_thread(self.scorer.restore_from, ahead)
        self.batches.restore(state)
        await self.learning.restore(state, self.step)
