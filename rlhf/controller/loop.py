"""The training loop shared by online and offline runs. A subclass adds the step.

    step -> evaluation -> metrics -> checkpoint

A step is stored in this order: the checkpoint is written aside, the row is logged, and then the checkpoint becomes
valid. So a checkpoint always has a row. A notice to end makes the current step the last one. The loop sees scalars, ids
and references, computes nothing on tokens, and knows nothing of Ray.

The trained roles are one unit. After each step every rank takes a snapshot of its state. When a rank is lost, all ranks
are started again. The ranks restore the newest snapshot that all ranks have, and repeat the work.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from rlhf.config.derive import restarts_gangs, trained_sections
from rlhf.config.files.differences import home, portable
from rlhf.config.schema.root import Config
from rlhf.controller.callback_calls import CallbackFailed
from rlhf.controller.notice import Notice
from rlhf.controller.record import Best, RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import RESUMES, Preempted, RunError, WorkerLost
from rlhf.role_table import roles_of
from rlhf.roles import MeasuredRole, Metrics, ProfiledRole, TrainedRole
from rlhf.tracking.metrics.reductions import Last

T = TypeVar("T")
logger = logging.getLogger(__name__)


@contextmanager
def sparing_loaded_objects() -> Generator[None]:
    """Keep Python's garbage collection in the block from scanning the objects loaded so far, which would take 0.3 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class TrainingLoop(ABC):
    """Runs the training loop. `step` is the last finished step. `checkpoint_step` is the step of the newest checkpoint,
    and `trained_step` is the step of the trained roles' state."""

    def __init__(
        self,
        config: Config,
        record: RunRecord,
        roles: Mapping[str, MeasuredRole | None],
        trained: Mapping[str, TrainedRole],
        *,
        eval_sets: Collection[str],
        eval_metric: str,
        lower_is_better: bool,
        policy_fingerprint: str,
        supervisor: Supervisor,
    ) -> None:
        """Create a loop before the first step. `roles`: None for a role that the run lacks.

        Args:
            trained: the roles saved in a checkpoint, each in a folder of the role's name. The policy is the first.
            eval_metric: metric of the first evaluation set for choosing the best step by default.
        """
        self.config = config
        self.record = record
        self.measured = roles
        self.trained = trained
        self.evaluates = bool(eval_sets)
        self.fingerprint = policy_fingerprint
        self.supervisor = supervisor
        self.notice = Notice()
        self.step = self.checkpoint_step = self.trained_step = 0
        self.finished_state: Mapping[str, Any] = {}  # this loop's state in a checkpoint of the last finished step
        self.survives = restarts_gangs(config)  # whether lost ranks are started again
        first_set = next(iter(eval_sets), "heldout")
        self.row: Mapping[str, float] = {}  # metrics of the last logged step
        self.best = Best.of(config.train, f"eval/{first_set}/{eval_metric}", default_lower=lower_is_better)

    @abstractmethod
    async def train_step(self, step: int) -> None:
        """Execute all updates of a step."""

    @abstractmethod
    async def evaluate(self, step: int) -> None:
        """Add the metrics of the evaluation sets under the weights of a step."""

    @abstractmethod
    def trained_tokens(self, row: Mapping[str, float]) -> tuple[float, float]:
        """Return the tokens of a step's batch, and their mean number per sequence."""

    @abstractmethod
    def position(self) -> Mapping[str, Any]:
        """Return the position in the data and the state of the algorithm, for a checkpoint."""

    @abstractmethod
    async def restore_position(self, state: Mapping[str, Any]) -> None:
        """Restore the position of a checkpoint."""

    def saving(self) -> AbstractAsyncContextManager[None]:
        """Make the trained roles ready to be saved in the block."""
        return nullcontext()

    async def begin(self) -> None:
        self.arithmetic = await self.trained["policy"].arithmetic()

    async def end(self) -> None:
        """Prepare the policy for export: after an early stop, load the weights of the best checkpoint."""
        best = self.best.step
        if self.config.train.early_stopping is not None and best is not None and best != self.step:
            logger.info("%s was best at step %d: the final model is the model of this step", self.best.metric, best)
            await self.trained["policy"].load(self.record.folder.checkpoint(best) / "policy")

    async def export(self) -> Path:
        """Write the final model aside, and return the folder."""

        async def write() -> Path:
            await self.end()
            aside = self.record.folder.begin_final()
            await self.trained["policy"].export(aside)
            return aside

        return await self.despite_losses(write)

    async def despite_losses(self, work: Callable[[], Awaitable[T]], *, oldest: int | None = None) -> T:
        """Return the result of the work. After the loss of a trained rank, repeat the work, and forget its metrics.
        `oldest`: the oldest step with a state from which the work can start. None: only the present state."""
        oldest = self.trained_step if oldest is None else oldest
        while True:
            metrics: list[Metrics] = []
            try:
                with self.record.apart(metrics, is_shown=True):
                    result = await work()
            except WorkerLost as lost:
                if not self.survives or lost.role not in self.trained:
                    raise
                await _whole(self._recover(lost, oldest))
                continue
            for part in metrics:
                self.record.add(part)
            return result

    async def _recover(self, lost: WorkerLost, oldest: int) -> None:
        """Restart all trained ranks. A rank of another role may be lost during the restart."""
        restart = partial(self.restart_trained, oldest)
        while True:
            try:
                return await self.supervisor.recover(lost, restart, work=(oldest, lost.stage))
            except WorkerLost as other:
                if other.role == lost.role or other.role not in self.trained:
                    raise
                lost = other

    async def restart_trained(self, oldest: int) -> None:
        """Start all trained ranks again, and restore the newest snapshot common to all ranks, or the newest checkpoint.
        The steps until `oldest` are trained again."""
        roles = self.trained
        await _all_ended([role.restart() for role in roles.values()])
        newest = [step for step in [await role.newest_snapshot() for role in roles.values()] if step is not None]
        if len(newest) == len(roles):
            self.trained_step = min(*newest, self.trained_step)  # without the metrics of a step, the step is repeated
            await _all_ended([role.restore_snapshot(self.trained_step) for role in roles.values()])
        else:
            self.trained_step = self.checkpoint_step
            if self.checkpoint_step:
                await self._load(self.checkpoint_step)
        while self.trained_step < oldest:
            await self.repeat(self.trained_step + 1)

    async def repeat(self, step: int) -> None:
        """Train a finished step again. Raise RunError if the batch is gone."""
        raise RunError(
            f"The newest snapshot that every rank has is of step {self.trained_step}, but the batch of step {step} is "
            f"no longer stored, so the step cannot be repeated. {RESUMES}"
        )

    async def take_snapshot(self, step: int) -> None:
        """Let every rank begin to copy its state after a step, if lost ranks are started again."""
        self.trained_step = step
        if self.survives:
            await asyncio.gather(*(role.take_snapshot(step) for role in self.trained.values()))

    async def wait_for_snapshots(self) -> None:
        """Wait until every rank has a whole snapshot, if lost ranks are started again."""
        if self.survives:
            await asyncio.gather(*(role.newest_snapshot() for role in self.trained.values()))

    async def run(self, *, until: int | None = None) -> bool:
        """Train until the last step or step `until`, and write a checkpoint there. Return whether the run is over."""
        train, record = self.config.train, self.record
        end = train.num_steps if until is None else until
        record.begin_step(self.step)
        await self.despite_losses(partial(self.take_snapshot, self.step))
        await self.despite_losses(self.begin)
        if self.step == 0 and self.evaluates and self.config.eval.at_start:
            await self.despite_losses(partial(self.evaluate, 0))
            self.row = record.row()
            record.write_row(0, self.row)
            await record.callbacks.call("on_evaluation", 0, _of_evaluation(self.row))
        while self.step < end and not self.is_over:
            self.finished_state = self.state()
            try:
                await self._next_step(is_last=self.step + 1 == end)
            except Preempted:
                await self._save_finished()
                raise
        return self.step >= train.num_steps or self.is_over

    @property
    def is_over(self) -> bool:
        """Return whether early stopping or a callback has ended the run."""
        return self.best.is_over or self.record.callbacks.stopped is not None

    async def _next_step(self, *, is_last: bool) -> None:
        """Execute a step, and write a checkpoint after the last step. Raise Preempted if the run must end."""
        train, record, step = self.config.train, self.record, self.step + 1
        record.begin_step(step)
        async with self._profile(step):
            with record.stage("step"):
                await self.train_step(step)
        evaluates = self.evaluates and (step == train.num_steps or step % self.config.eval.every == 0)
        if evaluates:
            await self.despite_losses(partial(self.evaluate, step))
        await self._measure()
        self.step = step
        is_best = evaluates and self.best.improves(record.row(), step)
        is_over, is_told = step == train.num_steps or self.best.is_over, self.notice.is_given
        if is_over or is_told or is_last or is_best or step % train.checkpoint_every == 0:
            await self.checkpoint(is_best=is_best)
        else:
            self._log_step()
        await self._call_back(evaluates=evaluates)
        if is_told and not (is_over or self.is_over):
            raise Preempted(f"a checkpoint of step {step} is written")

    async def _call_back(self, *, evaluates: bool) -> None:
        """Call the callbacks of a logged step. If a callback fails or stops the run, the step gets a checkpoint."""
        callbacks, failure = self.record.callbacks, None
        try:
            if evaluates:
                await callbacks.call("on_evaluation", self.step, _of_evaluation(self.row))
            await callbacks.call("on_step", self.step, self.row)
        except CallbackFailed as error:
            failure = error
        if failure or callbacks.stopped:
            await self.save_step()
        if failure is not None:
            raise CallbackFailed(
                f"{failure} A checkpoint of step {self.step} is written. {RESUMES}"
            ) from failure.__cause__
        if self.checkpoint_step == self.step:
            await callbacks.call("on_checkpoint", self.step, self.record.folder.checkpoint(self.step))
        if callbacks.stopped is not None:
            logger.info("step %d: %s", self.step, callbacks.stopped)

    @asynccontextmanager
    async def _profile(self, step: int) -> AsyncIterator[None]:
        """Profile the ranks and engines in the block, if the configuration names the step."""
        profile = self.config.tracking.profile
        if profile is None or step not in profile.steps:
            yield
            return
        present = [self.measured.get(name) for name in roles_of("trained", "frozen", "engines")]
        roles = [cast("ProfiledRole", role) for role in present if role is not None]
        folder = self.record.folder.path / "profiles" / f"step_{step:06d}"
        await self.despite_losses(lambda: asyncio.gather(*(role.start_profile() for role in roles)))
        yield
        await self.despite_losses(lambda: asyncio.gather(*(role.stop_profile(folder) for role in roles)))
        logger.info("step %d took longer, because it was profiled. The profiles are in %s", step, folder)

    async def _save_finished(self) -> None:
        """Write a missing checkpoint of the last finished step from snapshots, because a rank may not come back."""
        step = self.finished_state["step"]
        if not self.survives or self.checkpoint_step >= step:
            return
        try:
            await self.save_aside(self.finished_state, from_snapshots=True)
        except (OSError, RunError) as error:
            logger.warning("the state after step %d could not be saved: %s", step, error)
        else:
            await self.commit(step)
            logger.info("a checkpoint of step %d is written from the memory of the nodes", step)
            try:
                await self.record.callbacks.call("on_checkpoint", step, self.record.folder.checkpoint(step))
            except CallbackFailed as failure:  # the run ends as preempted
                logger.warning("%s", failure)

    async def finish_step(self, step: int, *, has_throughput: bool) -> None:
        """Measure and log a step whose updates another loop has made."""
        await self._measure(has_throughput=has_throughput)
        self.step = self.trained_step = step
        self._log_step()

    async def save_step(self) -> None:
        """Write a checkpoint of the last logged step, unless there is one."""
        if self.checkpoint_step < self.step:
            await self.despite_losses(self._save)
            await self.commit(self.step)
            await self.record.prune(self.config.train.keep_checkpoints)

    async def _measure(self, *, has_throughput: bool = True) -> None:
        """Add the memory of the roles and nodes, and the throughput of the step."""
        record = self.record

        async def measure_memory() -> None:
            for name, role in self.measured.items():
                if role is not None:
                    record.memory(name, await role.memory())

        await self.despite_losses(measure_memory)
        await record.system()
        if not has_throughput:
            return
        row = record.row()
        tokens, mean_length = self.trained_tokens(row)
        record.add({"throughput/tokens_per_s": Last(value=tokens / row["time/step_s"])})
        if not row.keys() >= {"update/tokens/total", "time/update_s"}:  # the step did not train the policy
            return
        rate = row["update/tokens/total"] / row["time/update_s"]
        record.add(
            {
                "throughput/train_tokens_per_s": Last(value=rate),
            }
        )
        used = self.arithmetic.utilisation(tokens_per_s=rate, mean_length=mean_length)
        if not math.isnan(used):  # nan: a server holds the policy
            record.add({"throughput/mfu": Last(value=used)})

    def _log_step(self) -> None:
        self.record.add(self.supervisor.metrics())
        self.row = self.record.row()
        self.record.write_row(self.step, self.row)

    async def checkpoint(self, *, is_best: bool) -> None:
        """Write the checkpoint aside, log the step, and make the checkpoint valid."""
        with self.record.stage("checkpoint"):
            await self.despite_losses(self._save)
        self._log_step()
        await self.commit(self.step)
        if is_best:
            self.record.folder.mark_best(self.step)
        await self.record.prune(self.config.train.keep_checkpoints)

    async def _save(self) -> None:
        async with self.saving():
            await self.save_aside(self.state())

    async def save_aside(self, state: Mapping[str, Any], *, from_snapshots: bool = False) -> Path:
        """Write a checkpoint, not valid yet, of the present state or the ranks' snapshots, and return the folder."""
        aside = self.record.folder.begin_checkpoint(state["step"])
        for name, role in self.trained.items():
            await (role.save_snapshots(state["step"], aside / name) if from_snapshots else role.save(aside / name))
        self.record.write_state(aside, state)
        return aside

    async def commit(self, step: int) -> None:
        """Make the checkpoint of a step, written aside before, valid. A cancellation takes effect afterwards."""
        await _whole(self.record.commit_checkpoint(step))
        self.checkpoint_step = step

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the trained roles' state."""
        return {
            "step": self.step,
            **self.position(),
            "best": self.best.state(),
            "policy": self.fingerprint,
            "algorithm": self.config.algorithm.short_name,
            "algorithm_code": self.config.algorithm.code_digest,
            "trained": trained_models(self.config),
        }

    async def restore(self, step: int) -> None:
        state = self.record.read_state(step)
        self.step = self.checkpoint_step = self.trained_step = state["step"]
        await self.restore_position(state)
        self.record.restore_best(self.best, state["best"])
        await self.despite_losses(partial(self._load, step))
        logger.info("resumed from the checkpoint of step %d", step)

    async def _load(self, step: int) -> None:
        for name, role in self.trained.items():
            await role.load(self.record.folder.checkpoint(step) / name)


def _of_evaluation(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("eval/")}


async def _all_ended(calls: Sequence[Awaitable[None]]) -> None:
    """Wait until all calls have ended, and then raise the first failure, so that no later failure disturbs a
    restart."""
    for end in await asyncio.gather(*calls, return_exceptions=True):
        if end is not None:
            raise end


async def _whole(work: Awaitable[None]) -> None:
    """Wait for the work. A cancellation takes effect after the work."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await working
        raise


def trained_models(config: Config) -> dict[str, Any]:
    """Describe a checkpoint's weights for a resumed run: each trained role's model, adapter shape, dtype and ranks. The
    description has the form of a configuration."""
    models, keys = trained_sections(config), {"model", "adapter", "dtype", "lora"}
    tree: dict[str, Any] = {  # dropout may change between runs, like the learning rate
        role: model.model_dump(mode="json", include=keys, exclude={"lora": {"dropout"}})
        for role, model in models.items()
    }
    roles: Any = {role: {"workers", "zero_stage"} for role in models}
    ranks = config.cluster.roles.model_dump(mode="json", include=roles)
    described: dict[str, Any] = portable(tree | {"cluster": {"roles": ranks}}, home(config))
    return described
