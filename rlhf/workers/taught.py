"""Base of the ranks of a student of the models in `teacher`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from rlhf.config import derive
from rlhf.models.packed.forward import Taught
from rlhf.tracking.metrics.reductions import Mean, Reduction
from rlhf.types import VocabularyHead
from rlhf.workers.lessons import Lesson, compared, taught
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.trained import TrainedWorker


class TaughtWorker(TrainedWorker):
    """A student's rank, with the teachers by name, and their vocabulary heads if the run uses hidden states."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teachers = derive.teachers(self.config)
        self.heads: dict[str, VocabularyHead] = {}

    def take_teacher(self, name: str, head: VocabularyHead) -> None:
        """Keep a teacher's vocabulary head. Called for each teacher before the first step, if the run uses states."""
        self.heads[name] = head.to(self.device)

    def taught(self, lessons: Sequence[Lesson], microbatch: Microbatch, mask: Bool[Tensor, " N"]) -> list[Taught]:
        """Return the teachers' predictions of a micro-batch's tokens in mask, on the device."""
        return taught(lessons, microbatch, mask, teachers=self.teachers, heads=self.heads, device=self.device)

    def compared(self, lessons: Sequence[Lesson], microbatch: Microbatch) -> dict[str, Reduction]:
        """Return metrics of the compared tokens, or none if all teachers have the student's tokenizer."""
        if all(head.pairs is None for head in self.heads.values()):
            return {}
        of = compared(lessons, microbatch)
        metrics: dict[str, Reduction] = {"compared/fraction": Mean(total=0.0, count=0)}
        for name, fraction in of.items():
            metrics["compared/fraction"] = metrics["compared/fraction"].merge(fraction)
            if derive.has_named_teachers(self.config) and fraction.count:
                metrics[f"compared_by_teacher/{name}/fraction"] = fraction
        return metrics
