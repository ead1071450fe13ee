"""The loop of training on fixed examples.

    examples -> minibatches -> update

The data sets are handed to the trained role once, as columns; a step names rows. As online, a checkpoint is written
aside, its row is logged, and only then is it made valid.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf.config.root import Config
from rlhf.controller.record import Best, RunRecord
from rlhf.data.examples import Example
from rlhf.data.packing import balance
from rlhf.data.stream import Cursor, Stream
from rlhf.roles import SupervisedRole
from rlhf.tracking.metrics import merge
from rlhf.tracking.reductions import Last
from rlhf.types import MinibatchPlan

logger = logging.getLogger(__name__)


class OfflineController:
    """One run. `step` is the last step that is done; a step is one optimizer step."""

    def __init__(
        self,
        config: Config,
        role: SupervisedRole,
        record: RunRecord,
        *,
        examples: Stream[Example],
        eval_sets: Mapping[str, Sequence[Example]],
        policy_fingerprint: str,
    ) -> None:
        self.config = config
        self.role = role
        self.record = record
        self.examples = examples
        self.eval_sets = eval_sets
        self.fingerprint = policy_fingerprint
        self.step = 0
        first_set = next(iter(eval_sets), "heldout")
        self.best = Best.by(config.train.best_metric, f"eval/{first_set}/loss", default_lower=True)

    async def run(self) -> None:
        """Train until the last step. Continues from `step` if a checkpoint has been restored."""
        train, record = self.config.train, self.record
        arithmetic = await self.role.arithmetic()
        if self.step == 0 and self.eval_sets and self.config.eval.at_start:
            record.begin_step()
            await self._evaluate()
            record.write_row(0, record.row())
        while self.step < train.steps:
            step = self.step + 1
            record.begin_step()
            with record.stage("step"), record.stage("update", role="policy"):
                taken = self.examples.next(train.sequences_per_update)
                record.add(await self.role.update_on(self._plan([example for _, example in taken])))
            record.add({"data/epoch": Last(value=float(taken[-1][0]))})
            last = step == train.steps
            evaluates = bool(self.eval_sets) and (last or step % self.config.eval.every == 0)
            if evaluates:
                await self._evaluate()
            record.memory("policy", await self.role.memory())
            row = record.row()
            rate = row["update/tokens/total"] / row["time/update_s"]
            length = row["update/tokens/total"] / train.sequences_per_update
            record.add(
                {
                    "throughput/tokens_per_s": Last(value=rate),
                    "throughput/train_tokens_per_s": Last(value=rate),
                    "throughput/mfu": Last(value=arithmetic.utilisation(tokens_per_s=rate, mean_length=length)),
                }
            )
            self.step = step
            is_best = evaluates and self.best.improves(row, step)
            if last or step % train.checkpoint_every == 0:
                await self._checkpoint(is_best=is_best)
            else:
                record.write_row(step, record.row())

    def _plan(self, examples: Sequence[Example]) -> MinibatchPlan:
        """Rows to ranks, by equal work."""
        lengths = [len(example.token_ids) for example in examples]
        return MinibatchPlan(
            sequences_by_rank=tuple(
                tuple(examples[i].example_id for i in sorted(share)) for share in balance(lengths, self.role.num_ranks)
            ),
            num_tokens=sum(sum(example.loss_mask) for example in examples),
            num_sequences=len(examples),
        )

    async def _evaluate(self) -> None:
        """Loss and accuracy on the held-out sets, in pieces of one optimizer step's size."""
        size = self.config.train.sequences_per_update
        with self.record.stage("eval", role="policy"):
            for index, (name, examples) in enumerate(self.eval_sets.items(), start=1):
                parts = []
                for start in range(0, len(examples), size):
                    piece = self._plan(examples[start : start + size])
                    parts.append(await self.role.evaluate(index, name, piece))
                self.record.add(merge(parts))

    async def _checkpoint(self, *, is_best: bool) -> None:
        """Write the checkpoint aside, log the step, make the checkpoint valid."""
        folder = self.record.folder
        with self.record.stage("checkpoint"):
            aside = folder.begin_checkpoint(self.step)
            await self.role.save(aside / "policy")
            self.record.write_state(aside, self._state())
        self.record.write_row(self.step, self.record.row())
        folder.commit_checkpoint(self.step)
        if is_best:
            folder.mark_best(self.step)
        folder.prune(self.config.train.keep_checkpoints)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": asdict(self.examples.state()),
            "best": self.best.state(),
            "policy": self.fingerprint,
        }

    async def restore(self, step: int) -> None:
        """Continue from the checkpoint of a step."""
        state = self.record.read_state(step)
        self.examples.restore(Cursor(**state["cursor"]))
        self.step = state["step"]
        self.best.restore(state["best"])
        await self.role.load(self.record.folder.checkpoint(step) / "policy")
        logger.info("resumed from the checkpoint of step %d", step)
