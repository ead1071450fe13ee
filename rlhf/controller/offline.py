"""Train on fixed data: examples, pairs of responses, or responses with labels.

    rows -> reference logprobs or teacher's states -> minibatches -> update

The trained role gets the data sets once, as columns, and a step names rows. A step is kept in the order of the online
loop: the checkpoint is written aside, its row is logged, and then the checkpoint becomes valid. A notice to end makes
the current step the last one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from rlhf.config.schema.root import Config
from rlhf.controller.notice import Notice
from rlhf.controller.record import Best, RunRecord
from rlhf.controller.reference import provide_reference
from rlhf.controller.trained import trained_models
from rlhf.data.packing import balance
from rlhf.data.stream import Cursor, Stream
from rlhf.errors import Preempted
from rlhf.roles import OfflineRole, StatesByRank, TeacherRole
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Last
from rlhf.types import MinibatchPlan

logger = logging.getLogger(__name__)

REFERENCE_MICROBATCHES = 64  # per rank in one call


class DataRow(Protocol):
    """The attributes of a data row read by the loop."""

    @property
    def example_id(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def non_token_bytes(self) -> bytes: ...

    @property
    def num_targets(self) -> int:
        """Count the tokens in the loss mask, the denominator of a mean over tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The rows of one optimizer step."""

    plan: MinibatchPlan
    states: StatesByRank  # the teacher's states; empty without a teacher
    epoch: int  # epoch of the last row
    cursor: Cursor  # start of the next batch


class OfflineController:
    """Runs the training loop. `step` is the last finished step; a step is one optimizer step."""

    def __init__(
        self,
        config: Config,
        role: OfflineRole,
        record: RunRecord,
        *,
        train_set: Sequence[DataRow],
        rows: Stream[DataRow],
        eval_sets: Mapping[str, Sequence[DataRow]],
        policy_fingerprint: str,
        teacher: TeacherRole | None = None,
    ) -> None:
        self.config = config
        self.role = role
        self.record = record
        self.train_set = train_set
        self.rows = rows
        self.eval_sets = eval_sets
        self.fingerprint = policy_fingerprint
        self.teacher = teacher
        self.notice = Notice()
        self.is_ahead = teacher is not None and config.cluster.roles.teacher.colocate_with is None
        self.cursor = rows.state()
        self.next_batch: StepRows | None = None
        self.step = 0
        first_set = next(iter(eval_sets), "heldout")
        self.best = Best.of(config.train, f"eval/{first_set}/loss", default_lower=True)

    async def run(self, *, until: int | None = None) -> bool:
        """Train until the last step, or until step `until`, and write a checkpoint there.

        Returns whether the run is over. Continues from `step` if a checkpoint has been restored.
        """
        train, record = self.config.train, self.record
        end = train.num_steps if until is None else until
        arithmetic = await self.role.arithmetic()
        if self.step == 0 and self.eval_sets and self.config.eval.at_start:
            record.begin_step(0)
            await self._evaluate()
            record.write_row(0, record.row())
        while self.step < end and not self.best.is_over:
            step = self.step + 1
            record.begin_step(step)
            last = step == train.num_steps
            with record.stage("step"):
                await self._update(last=last)
            evaluates = bool(self.eval_sets) and (last or step % self.config.eval.every == 0)
            if evaluates:
                await self._evaluate()
            record.memory("policy", await self.role.memory())
            if self.teacher is not None:
                record.memory("teacher", await self.teacher.memory())
            await record.system()
            row = record.row()
            rate = row["update/tokens/total"] / row["time/update_s"]
            length = row["update/tokens/total"] / train.sequences_per_update
            record.add(
                {
                    "throughput/tokens_per_s": Last(value=row["update/tokens/total"] / row["time/step_s"]),
                    "throughput/train_tokens_per_s": Last(value=rate),
                    "throughput/mfu": Last(value=arithmetic.utilisation(tokens_per_s=rate, mean_length=length)),
                }
            )
            self.step = step
            is_best = evaluates and self.best.improves(row, step)
            is_over, is_told = last or self.best.is_over, self.notice.is_given
            if is_over or is_told or step == end or is_best or step % train.checkpoint_every == 0:
                await self._checkpoint(is_best=is_best)
            else:
                record.write_row(step, record.row())
            if is_told and not is_over:
                raise Preempted(f"a checkpoint of step {step} is written")
        if self.step < train.num_steps and not self.best.is_over:
            return False
        await self._take_best()
        return True

    async def _update(self, *, last: bool) -> None:
        """Make one optimizer step. A teacher with separate hardware computes the next rows meanwhile."""
        batch = self.next_batch or await self._take_batch()

        async def update() -> None:
            with self.record.stage("update", role="policy"):
                self.record.add(await self.role.update_on(batch.plan, batch.states))

        if self.is_ahead and not last:
            _, self.next_batch = await asyncio.gather(update(), self._take_batch())
        else:
            await update()
        self.cursor = batch.cursor
        self.record.add({"data/epoch": Last(value=float(batch.epoch))})

    async def _take_batch(self) -> StepRows:
        taken = self.rows.next(self.config.train.sequences_per_update)
        plan, cursor = self._plan([row for _, row in taken]), self.rows.state()
        return StepRows(plan=plan, states=await self._states(0, plan), epoch=taken[-1][0], cursor=cursor)

    async def _states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Return the teacher's states for the planned rows of a data set."""
        if self.teacher is None:
            return ()
        with self.record.stage("teacher", role="teacher"):
            return await self.teacher.states(dataset, plan)

    async def _take_best(self) -> None:
        """After an early stop, load the weights of the best checkpoint for the export."""
        best = self.best.step
        if self.config.train.early_stopping is not None and best is not None and best != self.step:
            logger.info("%s was best at step %d: that is the final model", self.best.metric, best)
            await self.role.load(self.record.folder.checkpoint(best) / "policy")

    async def provide_reference(self) -> None:
        """Give the role the logprobs of the policy before training. Must be called before `restore`."""
        await provide_reference(
            self.role,
            [self.train_set, *self.eval_sets.values()],
            self.record,
            folder=self.config.run.dir / "reference_logprobs",
            plan=self._plan,
            tokens_at_once=REFERENCE_MICROBATCHES * self.config.train.max_tokens_per_microbatch * self.role.num_ranks,
        )

    def _plan(self, rows: Sequence[DataRow]) -> MinibatchPlan:
        """Distribute rows over the ranks by equal work."""
        lengths = [len(row.token_ids) for row in rows]
        return MinibatchPlan(
            sequences_by_rank=tuple(
                tuple(rows[i].example_id for i in sorted(share)) for share in balance(lengths, self.role.num_ranks)
            ),
            num_tokens=sum(row.num_targets for row in rows),
            num_sequences=len(rows),
        )

    async def _evaluate(self) -> None:
        """Measure loss and accuracy on the held-out sets, in chunks of one optimizer step's size."""
        size = self.config.train.sequences_per_update
        with self.record.stage("eval", role="policy"):
            for index, (name, rows) in enumerate(self.eval_sets.items(), start=1):
                parts, whole = [], self._plan(rows)
                for start in range(0, len(rows), size):
                    shares = self._plan(rows[start : start + size]).sequences_by_rank
                    chunk = replace(whole, sequences_by_rank=shares)  # losses are divided by the counts of all chunks
                    parts.append(await self.role.evaluate(index, name, chunk, await self._states(index, chunk)))
                self.record.add(merge_metrics(parts))

    async def _checkpoint(self, *, is_best: bool) -> None:
        """Write the checkpoint aside, log the step, and make the checkpoint valid."""
        folder = self.record.folder
        with self.record.stage("checkpoint"):
            aside = folder.begin_checkpoint(self.step)
            await self.role.save(aside / "policy")
            self.record.write_state(aside, self._state())
        self.record.write_row(self.step, self.record.row())
        self.record.commit_checkpoint(self.step)
        if is_best:
            folder.mark_best(self.step)
        await self.record.prune(self.config.train.keep_checkpoints)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": asdict(self.cursor),
            "best": self.best.state(),
            "policy": self.fingerprint,
            "algorithm": self.config.algorithm.name,
            "trained": trained_models(self.config),
        }

    async def restore(self, step: int) -> None:
        """Restore the checkpoint of a step."""
        state = self.record.read_state(step)
        self.cursor = Cursor(**state["cursor"])
        self.rows.restore(self.cursor)
        self.step = state["step"]
        self.record.restore_best(self.best, state["best"])
        await self.role.load(self.record.folder.checkpoint(step) / "policy")
        logger.info("resumed from the checkpoint of step %d", step)
