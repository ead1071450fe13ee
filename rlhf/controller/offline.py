"""Train on fixed data: examples, pairs of responses, or responses with labels.

    rows -> reference logprobs or teacher's states -> minibatches -> update

The trained role gets the data sets once, as columns, and a step names rows. The reference is the policy before
training: the policy's ranks compute the logprobs before a checkpoint is restored.

With streamed data the role gets the rows of each step instead, just before the step. The logprobs of the reference are
then computed for the rows of all steps, in the order of the steps, and kept on disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rlhf.config.schema.root import Config
from rlhf.controller.loop import TrainingLoop
from rlhf.controller.record import RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.data.examples import Example
from rlhf.data.packing import balance
from rlhf.data.stream import Cursor, Tokenized
from rlhf.data.windows import DataStream, WindowedStream
from rlhf.errors import RESUMES, RunError
from rlhf.roles import Metrics, OfflineRole, Ref, StatesByRank, TeacherRole
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Last
from rlhf.types import MinibatchPlan, TokenValues
from rlhf.vision.sight import image_effect, refuse_blindness

logger = logging.getLogger(__name__)

REFERENCE_MICROBATCHES = 64  # number of micro-batches that one call sends to a rank


class DataRow(Tokenized, Protocol):
    """The attributes of a data row read by the loop."""

    @property
    def example_id(self) -> int: ...

    @property
    def num_targets(self) -> int:
        """Count the tokens in the loss mask, the denominator of a mean over tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    plan: MinibatchPlan
    states: StatesByRank  # the teacher's states; empty without a teacher
    epoch: int  # epoch of the last row
    cursor: Cursor  # start of the next batch
    rows: Sequence[DataRow]


class OfflineController(TrainingLoop):
    """The loop of a run on fixed data. A step is an optimizer step."""

    def __init__(
        self,
        config: Config,
        role: OfflineRole,
        record: RunRecord,
        *,
        train_set: Sequence[DataRow],
        rows: DataStream[DataRow],
        deliver: Callable[[Sequence[DataRow]], Awaitable[None]] | None = None,
        eval_sets: Mapping[str, Sequence[DataRow]],
        policy_fingerprint: str,
        supervisor: Supervisor,
        teacher: TeacherRole | None = None,
    ) -> None:
        """Create the controller. deliver: replaces the role's training set by a step's rows, for streamed data."""
        super().__init__(
            config,
            record,
            {"policy": role, **({} if teacher is None else {teacher.role: teacher})},
            {"policy": role},
            eval_sets=eval_sets,
            eval_metric="loss",
            lower_is_better=True,
            policy_fingerprint=policy_fingerprint,
            supervisor=supervisor,
        )
        self.role = role
        self.train_set = train_set
        self.rows = rows
        self.deliver = deliver if isinstance(rows, WindowedStream) else None
        self.references: list[Path] = []  # files of the reference's logprobs by step, for streamed data
        self.eval_sets = eval_sets
        self.teacher = teacher
        self.is_ahead = teacher is not None and config.cluster.roles.teacher.colocate_with is None
        self.cursor = rows.state()
        self.next_batch: StepRows | None = None
        self.last_update: tuple[int, StepRows | None] = 0, None  # step and rows
        self.sight: Metrics = {}  # measured at the start, for the row of the first step

    async def train_step(self, step: int) -> None:
        """Make one optimizer step. A teacher with separate hardware computes the next rows at the same time."""
        self.record.add(self.sight)
        self.sight = {}
        batch = self.next_batch or await self._take_batch()
        if self.is_ahead and step < self.config.train.num_steps:
            _, self.next_batch = await asyncio.gather(self._update(batch, step), self._take_batch())
        else:
            await self._update(batch, step)
        self.cursor, self.last_update = batch.cursor, (step, batch)
        self.record.add({"data/epoch": Last(value=float(batch.epoch))})

    async def _update(self, batch: StepRows, step: int) -> None:
        learnt: list[Metrics] = []

        async def update() -> None:
            if self.trained_step < step:
                learnt.clear()
                await self._deliver(batch, step)
                with self.record.apart(learnt, is_shown=True), self.record.stage("update"):
                    snapshot = step if self.survives else None
                    self.record.add(await self.role.update_on(batch.plan, batch.states, snapshot=snapshot))
                await self.take_snapshot(step)

        await self.despite_losses(update, oldest=step - 1)
        for metrics in learnt:
            self.record.add(metrics)

    async def repeat(self, step: int) -> None:
        number, batch = self.last_update
        if step != number or batch is None:
            await super().repeat(step)
            return
        await self._deliver(batch, step)
        await self.role.update_on(batch.plan, await self._states(0, batch.plan))
        await self.take_snapshot(step)

    async def _take_batch(self) -> StepRows:
        taken = self.rows.next(self.config.train.sequences_per_update)
        rows = [row for _, row in taken]
        plan, cursor = self._plan(rows, numbered=self.deliver is not None), self.rows.state()
        return StepRows(plan=plan, states=await self._states(0, plan), epoch=taken[-1][0], cursor=cursor, rows=rows)

    async def _deliver(self, batch: StepRows, step: int) -> None:
        """Give the role the rows of a step of streamed data, with the reference's logprobs if the run has any."""
        if self.deliver is None:
            return
        await self.deliver(batch.rows)
        if self.references and not await self.role.read_reference(0, self.references[step - 1], compare=False):
            path = self.references[step - 1]
            raise RunError(
                f"reference: {path} is missing or damaged. Remove the file, and the run computes the "
                f"log-probabilities again. {RESUMES}"
            )

    async def _states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        if self.teacher is None:
            return ()
        with self.record.stage(self.teacher.role):
            return await self.teacher.states(dataset, plan)

    async def check_sight(self, token_ids: Sequence[int], other_ids: Sequence[int]) -> None:
        """Raise RunError if the model gives equal log-probabilities for a row's own and other images."""
        own, other = await self.role.probe(token_ids), await self.role.probe(other_ids)
        effect = image_effect(own, other, token_ids)
        refuse_blindness(token_ids, policy=effect, engine=None)
        self.sight = {"update/image_effect": Last(value=effect)}

    async def provide_reference(self) -> None:
        """Give the role the logprobs of every data set by the policy before training, from disk or computed once. Must
        be called before `restore`."""
        await self.despite_losses(self._provide_reference)

    async def _provide_reference(self) -> None:
        role, folder = self.role, self.config.run.dir / "reference_logprobs"
        if self.deliver is not None:
            await self._provide_streamed_reference(folder)
        in_memory = [
            *([] if self.deliver is not None else [(0, self.train_set)]),
            *enumerate(self.eval_sets.values(), 1),
        ]
        for index, rows in in_memory:
            path = folder / f"{await role.reference_key(index)}.safetensors"
            if path.exists():
                if await role.read_reference(index, path):
                    logger.info("the reference log-probabilities of data set %d are read from %s", index, path)
                    continue
                logger.warning(
                    "%s is damaged or belongs to different weights; the log-probabilities are computed again", path
                )
            columns: list[Ref[TokenValues]] = []
            done = 0
            for chunk in self._chunks(rows):
                columns += await role.reference_logprobs(index, self._plan(chunk))
                done += len(chunk)
                self.record.progress.stage("reference", done, len(rows))
            await role.store_reference(index, path, columns)
            logger.info("the reference log-probabilities of %d rows are written to %s", len(rows), path)

    async def _provide_streamed_reference(self, folder: Path) -> None:
        """Compute the reference's logprobs of the rows of every step, unless an earlier start of the run has computed
        them. So each row is read twice: here, and when it is trained on."""
        stream, steps = self.rows, self.config.train.num_steps
        assert isinstance(stream, WindowedStream)
        assert self.deliver is not None
        stream.restore(self.cursor)  # a lost rank may have ended an earlier attempt in the middle of the rows
        batch = await self._take_batch()
        await self.deliver(batch.rows)
        name = f"{await self.role.reference_key(0)}-{stream.fingerprint}"
        self.references = [folder / f"{name}-{step:06d}.safetensors" for step in range(1, steps + 1)]
        missing = {path for path in self.references if not path.exists()}
        for step, path in enumerate(self.references, start=1):
            if not missing:
                break
            if step > 1:
                batch = await self._take_batch()
                await self.deliver(batch.rows)
            if path in missing:
                columns = await self.role.reference_logprobs(0, batch.plan)
                await self.role.store_reference(0, path, columns)
                missing.remove(path)
            self.record.progress.stage("reference", step, steps)
        stream.restore(self.cursor)

    def _chunks(self, rows: Sequence[DataRow]) -> Iterator[Sequence[DataRow]]:
        """Yield adjacent rows of about some micro-batches per rank. Each chunk is a call with a separate deadline."""
        at_once = REFERENCE_MICROBATCHES * self.config.train.max_tokens_per_microbatch * self.role.num_ranks
        start = size = 0
        for end, row in enumerate(rows, start=1):
            size += len(row.token_ids)
            if size >= at_once or end == len(rows):
                yield rows[start:end]
                start, size = end, 0

    def _plan(self, rows: Sequence[DataRow], *, numbered: bool = False) -> MinibatchPlan:
        """Plan an optimizer step or a chunk. numbered: the rows are their data set, so their numbers are the ids."""
        ids = range(len(rows)) if numbered else [row.example_id for row in rows]
        shares = balance([len(row.token_ids) for row in rows], self.role.num_ranks)
        return MinibatchPlan(
            sequences_by_rank=tuple(tuple(ids[i] for i in sorted(share)) for share in shares),
            num_tokens=sum(row.num_targets for row in rows),
            num_sequences=len(rows),
            teachers={
                i: row.teacher for i, row in zip(ids, rows, strict=True) if isinstance(row, Example) and row.teacher
            },
        )

    async def evaluate(self, step: int) -> None:
        """Measure loss and accuracy on the held-out sets, in chunks of an optimizer step's size."""
        size = self.config.train.sequences_per_update
        with self.record.stage("eval", role="policy"):
            for index, (name, rows) in enumerate(self.eval_sets.items(), start=1):
                parts, whole = [], self._plan(rows)
                for start in range(0, len(rows), size):
                    shares = self._plan(rows[start : start + size]).sequences_by_rank
                    chunk = replace(whole, sequences_by_rank=shares)  # losses are divided by the counts of all chunks
                    parts.append(await self.role.evaluate(index, name, chunk, await self._states(index, chunk)))
                self.record.add(merge_metrics(parts))

    def trained_tokens(self, row: Mapping[str, float]) -> tuple[float, float]:
        tokens = row["update/tokens/total"]
        return tokens, tokens / self.config.train.sequences_per_update

    def position(self) -> Mapping[str, Any]:
        return {"cursor": asdict(self.cursor)}

    async def restore_position(self, state: Mapping[str, Any]) -> None:
        self.cursor = Cursor(**state["cursor"])
        self.rows.restore(self.cursor)
