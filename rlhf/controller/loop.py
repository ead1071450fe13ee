"""The training loop shared by online and offline runs. A subclass adds its step.

    step -> evaluation -> metrics -> checkpoint

A step is kept in this order: its checkpoint is written aside, its row is logged, and then the checkpoint becomes valid.
So a checkpoint always has its row. A notice to end makes the current step the last one. The loop sees scalars, ids and
references. It computes nothing on tokens and knows nothing of Ray.
"""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rlhf.config.derive import trained_sections
from rlhf.config.files.differences import home, portable
from rlhf.config.schema.root import Config
from rlhf.controller.notice import Notice
from rlhf.controller.record import Best, RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import Preempted
from rlhf.roles import MeasuredRole, TrainedRole
from rlhf.tracking.metrics.reductions import Last

logger = logging.getLogger(__name__)


@contextmanager
def sparing_loaded_objects() -> Generator[None]:
    """Exempt the objects loaded so far from garbage collections in the block.

    A collection that visits the objects of all modules takes 0.3 s, and a large step causes several.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class TrainingLoop(ABC):
    """Runs the training loop. `step` is the last finished step, `kept_step` that of the newest checkpoint."""

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
        """Create a loop that has not begun.

        Args:
            roles: all roles by name. None: the run has no such role.
            trained: the roles saved in a checkpoint, in a folder of their name. The policy is the first.
            eval_sets: names of the evaluation sets.
            eval_metric: metric of the first evaluation set that chooses the best step by default.
        """
        self.config = config
        self.record = record
        self.measured = roles
        self.trained = trained
        self.evaluates = bool(eval_sets)
        self.fingerprint = policy_fingerprint
        self.supervisor = supervisor
        self.notice = Notice()
        self.step = self.kept_step = 0
        first_set = next(iter(eval_sets), "heldout")
        self.best = Best.of(config.train, f"eval/{first_set}/{eval_metric}", default_lower=lower_is_better)

    @abstractmethod
    async def train_step(self, step: int) -> None:
        """Carry out all updates of a step."""

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
        """Prepare the roles for the first step."""
        self.arithmetic = await self.trained["policy"].arithmetic()

    async def end(self) -> None:
        """Prepare the policy for its export: after an early stop, load the weights of the best checkpoint."""
        best = self.best.step
        if self.config.train.early_stopping is not None and best is not None and best != self.step:
            logger.info("%s was best at step %d: that is the final model", self.best.metric, best)
            await self.trained["policy"].load(self.record.folder.checkpoint(best) / "policy")

    async def run(self, *, until: int | None = None) -> bool:
        """Train until the last step, or until step `until`, and write a checkpoint there.

        Returns whether the run is over. Continues from `step` if a checkpoint has been restored.
        """
        train, record = self.config.train, self.record
        end = train.num_steps if until is None else until
        record.begin_step(self.step)
        await self.begin()
        if self.step == 0 and self.evaluates and self.config.eval.at_start:
            await self.evaluate(0)
            record.write_row(0, record.row())
        while self.step < end and not self.best.is_over:
            step = self.step + 1
            last = step == train.num_steps
            record.begin_step(step)
            with record.stage("step"):
                await self.train_step(step)
            evaluates = self.evaluates and (last or step % self.config.eval.every == 0)
            if evaluates:
                await self.evaluate(step)
            await self._measure()
            self.step = step
            is_best = evaluates and self.best.improves(record.row(), step)
            is_over, is_told = last or self.best.is_over, self.notice.is_given
            if is_over or is_told or step == end or is_best or step % train.checkpoint_every == 0:
                await self.checkpoint(is_best=is_best)
            else:
                record.write_row(step, record.row())
            if is_told and not is_over:
                raise Preempted(f"a checkpoint of step {step} is written")
        if self.step < train.num_steps and not self.best.is_over:
            return False
        await self.end()
        return True

    async def _measure(self) -> None:
        """Add the memory of the roles and nodes, and the throughput of the step."""
        record = self.record
        for name, role in self.measured.items():
            if role is not None:
                record.memory(name, await role.memory())
        await record.system()
        record.add(self.supervisor.metrics())
        row = record.row()
        tokens, mean_length = self.trained_tokens(row)
        rate = row.get("update/tokens/total", 0.0) / row["time/update_s"]  # 0 while only the critic is trained
        record.add(
            {
                "throughput/tokens_per_s": Last(value=tokens / row["time/step_s"]),
                "throughput/train_tokens_per_s": Last(value=rate),
                "throughput/mfu": Last(value=self.arithmetic.utilisation(tokens_per_s=rate, mean_length=mean_length)),
            }
        )

    async def checkpoint(self, *, is_best: bool) -> None:
        """Write the checkpoint aside, log the step, and make the checkpoint valid."""
        with self.record.stage("checkpoint"):
            async with self.saving():
                await self.save_aside(self.state())
        self.record.write_row(self.step, self.record.row())
        self.commit()
        if is_best:
            self.record.folder.mark_best(self.step)
        await self.record.prune(self.config.train.keep_checkpoints)

    async def save_aside(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of the last step that is not valid yet, and return its folder."""
        aside = self.record.folder.begin_checkpoint(self.step)
        for name, role in self.trained.items():
            await role.save(aside / name)
        self.record.write_state(aside, state)
        return aside

    def commit(self) -> None:
        """Make the checkpoint written aside valid."""
        self.record.commit_checkpoint(self.step)
        self.kept_step = self.step

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without that of the trained roles."""
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
        self.step = self.kept_step = state["step"]
        await self.restore_position(state)
        self.record.restore_best(self.best, state["best"])
        for name, role in self.trained.items():
            await role.load(self.record.folder.checkpoint(step) / name)
        logger.info("resumed from the checkpoint of step %d", step)


def trained_models(config: Config) -> dict[str, Any]:
    """Describe the weights of a checkpoint in configuration keys, which a resumed run compares.

    They are each trained role's model, adapter shape, dtype, number of ranks and sharding.
    """
    models = trained_sections(config)
    roles = config.cluster.roles.model_dump(mode="json")
    tree: dict[str, Any] = {
        role: model.model_dump(mode="json", include={"model", "adapter", "dtype", "lora"})
        for role, model in models.items()
    }
    for role in models:
        if tree[role]["lora"] is not None:
            del tree[role]["lora"]["dropout"]  # may change between runs, like the learning rate
    ranks = {role: {key: roles[role][key] for key in ("workers", "zero_stage")} for role in models}
    described: dict[str, Any] = portable(tree | {"cluster": {"roles": ranks}}, home(config))
    return described
