"""Train a rank of a policy that distils itself: the teacher is the same rank with a privileged prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms.self_distillation import SelfDistillation
from rlhf.config.schema.model import TeacherConfig
from rlhf.roles import Metrics, SequenceReport
from rlhf.types import (
    ONLY_TEACHER,
    BatchPlan,
    LearntStates,
    PrivilegedPrompts,
    Rollouts,
    TeacherColumn,
    TokenValues,
)
from rlhf.workers.online.online_worker import Share
from rlhf.workers.online.self_teacher import SelfTeacher
from rlhf.workers.online.student import StudentWorker


class SelfTaughtWorker(StudentWorker):
    """Computes the teacher's side of a batch before the updates, and learns as a student does."""

    family = SelfDistillation
    algorithm: SelfDistillation
    states: LearntStates | None = None  # of this rank's share; None: only sampled tokens are compared

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teachers = {ONLY_TEACHER: TeacherConfig(model=self.config.policy.model)}

    def build(self) -> str:
        """Load the model, and copy the teacher's weights."""
        fingerprint = super().build()
        self.self_teacher = SelfTeacher(self, self.algorithm.config)
        return fingerprint

    def prepare(
        self, plan: BatchPlan, *parts: Rollouts | TokenValues | PrivilegedPrompts
    ) -> tuple[tuple[SequenceReport, ...], Metrics]:
        """Receive this rank's share of a batch, with a privileged prompt for each response. Collective."""
        self.prompts = [part for part in parts if isinstance(part, PrivilegedPrompts)]
        return super().prepare(plan, *(part for part in parts if not isinstance(part, PrivilegedPrompts)))

    def receive(
        self, plan: BatchPlan, parts: Sequence[Rollouts | TokenValues], temperatures: Mapping[int, float]
    ) -> tuple[Share, Float[Tensor, " N"] | None]:
        """Return this rank's share, with the teacher's log-probabilities if these are compared. Collective."""
        self.states = None  # frees the last batch's states and head before the next ones exist
        self.heads.clear()
        share, _ = super().receive(plan, parts, temperatures)
        if not self.algorithm.config.reads_teacher_states:
            return share, self.self_teacher.logprobs(share, self.prompts).nan_to_num()
        self.states, self.heads[ONLY_TEACHER] = self.self_teacher.states(share, self.prompts)
        return share, None

    def forward_backward(self, minibatch: int, *states: TeacherColumn) -> Metrics:
        return super().forward_backward(minibatch, *([] if self.states is None else [self.states]))

    def optim_step(self) -> Metrics:
        metrics = super().optim_step()
        self.self_teacher.after_update()
        return metrics
