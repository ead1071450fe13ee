"""Define how a step's responses become policy updates: by advantages, by pairs, or by a teacher.

    scored groups -> plan -> experience -> updates

rlhf.controller.online collects the groups. Like rlhf.controller.online, this module computes on scalars alone.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.schema.root import Config
from rlhf.controller.batches import temperatures, visits
from rlhf.controller.record import RunRecord
from rlhf.controller.training_scores import TrainingScores
from rlhf.roles import (
    CriticRole,
    OnlineTeacherRole,
    PolicyRole,
    Ref,
    ReferenceRole,
    RemoteColumns,
    RewardRole,
    RolloutRole,
    ScoredGroup,
    SequenceReport,
)
from rlhf.types import PrivilegedPrompts, TokenValues


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRoles:
    """The roles of an online run. None: the run has no such role."""

    policy: PolicyRole
    rollout: RolloutRole
    reward: RewardRole
    reference: ReferenceRole | None = None
    teacher: OnlineTeacherRole | None = None
    critic: CriticRole | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Training signals of a step's responses, by sequence id. Untrained responses are absent."""

    trained: frozenset[int] = frozenset()  # sequences with token signals in the policy
    reports: Mapping[int, SequenceReport] = field(default_factory=dict)
    advantages: Mapping[int, float] = field(default_factory=dict)
    preferred: Mapping[int, bool] = field(default_factory=dict)  # True for the chosen response of a pair
    teacher_logprobs: Mapping[int, float] = field(default_factory=dict)  # means over the sampled tokens
    privileged: tuple[Ref[PrivilegedPrompts], ...] = ()  # of a policy that teaches itself, for the samples file


Columns = list[RemoteColumns[TokenValues]]


class ColumnsByGroup:
    """Columns of a frozen model with separate hardware, computed for each group while later groups are sampled."""

    def __init__(self) -> None:
        self._computing: dict[int, asyncio.Task[Columns]] = {}

    def begin(self, scored: ScoredGroup, work: Coroutine[Any, Any, Columns]) -> None:
        """Begin to compute the columns of a group, in place of earlier columns."""
        self._computing[scored.group.request.group_id] = asyncio.create_task(work)

    async def take(
        self, groups: Sequence[ScoredGroup], compute: Callable[[Sequence[ScoredGroup]], Awaitable[Columns]]
    ) -> Columns:
        """Return the columns of the groups: first the begun columns, and then the remaining columns, computed now."""
        computing = self._computing
        begun = [one for one in groups if one.group.request.group_id in computing]
        left = [one for one in groups if one.group.request.group_id not in computing]
        computed = await compute(left) if left else []
        ready = await asyncio.gather(*(computing[one.group.request.group_id] for one in begun))
        return [column for columns in [*ready, computed] for column in columns]

    def forget(self, groups: Sequence[ScoredGroup]) -> None:
        """Forget the columns of trained groups, or of groups without used responses."""
        for scored in groups:
            self._computing.pop(scored.group.request.group_id, None)


class Learning(ABC):
    """A learning method, such as advantages or pairs. The metrics go to the run's record."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        assert config.rollouts is not None
        self.config = config
        self.roles = roles
        self.record = record
        self.rollouts = config.rollouts
        self.scores = TrainingScores(config.rewards)
        self.columns = ColumnsByGroup()  # columns of the reference or the teacher

    @abstractmethod
    def arrived(self, scored: ScoredGroup) -> None:
        """Begin the computations of a group that need no other group, before the batch is whole."""

    @abstractmethod
    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Make all optimizer steps of a step. The groups carry the reported scores. After the loss of a rank, the ranks
        have the state of the previous step again, and the method is called again with the same groups."""

    def renews_reference(self, step: int) -> bool:
        """Return whether the policy after this step becomes the reference."""
        return False

    async def renew_reference(self, step: int) -> None:  # noqa: B027
        """Replace the reference by the policy after this step."""

    def end_step(self, groups: Sequence[ScoredGroup], signals: Signals) -> None:
        """Forget the columns of the trained groups. A subclass adapts coefficients to the measured values."""
        self.columns.forget(groups)

    def state(self) -> Mapping[str, Any]:
        """Return the state for a checkpoint, without the trained roles."""
        return {}

    async def restore(self, state: Mapping[str, Any], step: int) -> None:  # noqa: B027
        """Restore the state of a step's checkpoint."""

    def visits(self, num_minibatches: int, step: int) -> list[int]:
        train, run = self.config.train, self.config.run
        return visits(num_minibatches, epochs=train.epochs_per_batch, seed=run.seed, step=step)


class ReferencedLearning(Learning):
    """A learning method with a reference that may be renewed from the policy every few steps (sync_ref_model in TRL).

        policy -> model folder in references/ -> reference

    The weights go through a folder, so a resumed run has the same reference as at the checkpoint. Each folder stays as
    long as a checkpoint needs the folder.
    """

    leaves_out: bool  # whether some responses of a group are not trained on
    reference_every: int | None  # steps between two renewals; None keeps the first reference
    reference_step: int = 0  # step of the last renewal; 0: the model before training

    @property
    def computes_by_group(self) -> bool:
        """Return whether the reference, on separate hardware, computes each finished group at once. This is false if
        the reference is renewed while later batches are sampled, because the weights would be those of another step."""
        alone = self.roles.reference is not None and self.config.cluster.roles.reference.colocate_with is None
        return alone and (self.reference_every is None or self.rollouts.max_staleness == 0)

    async def reference_logprobs(self, groups: Sequence[ScoredGroup]) -> Columns:
        """Return a column of the reference for each group; none without a reference."""
        if self.roles.reference is None:
            return []
        present = frozenset(info.sequence_id for scored in groups for info in scored.group.infos)
        only, warmth = present if self.leaves_out else None, temperatures(groups)
        return await self.roles.reference.logprobs([one.group for one in groups], only=only, temperatures=warmth)

    def renews_reference(self, step: int) -> bool:
        return self.reference_every is not None and step % self.reference_every == 0

    async def renew_reference(self, step: int) -> None:
        folder = self.record.folder
        assert self.roles.reference is not None
        with self.record.stage(self.roles.reference.role):
            await self.roles.policy.export(folder.begin_reference(step))
            await asyncio.to_thread(folder.seal, folder.reference(step), step=step)
            needed = {self.record.read_state(other)["reference_step"] for other in folder.checkpoint_steps()}
            await self.roles.reference.become(folder.commit_reference(step, keep=needed))
        self.reference_step = step

    def state(self) -> Mapping[str, Any]:
        return {"reference_step": self.reference_step}

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Restore the reference of a step's checkpoint. Raise UserError if the reference's folder is damaged."""
        self.reference_step = state["reference_step"]
        if self.reference_step:
            self.record.folder.refuse_damaged_reference(self.reference_step, checkpoint=step)
            assert self.roles.reference is not None
            await self.roles.reference.become(self.record.folder.reference(self.reference_step))
