"""Assign the predictions of the teachers to the tokens of a rank's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.config.schema.model import TeacherConfig
from rlhf.models.packed.forward import Taught
from rlhf.objectives.distillation import Teacher, TeacherSpans, TeacherStates, TeacherTop
from rlhf.tracking.metrics.reductions import Mean, Reduction
from rlhf.types import LearntStates, MinibatchPlan, Ragged, SpanStates, TeacherColumn, TopLogprobs, VocabularyHead
from rlhf.workers.microbatches import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The predictions of one teacher for the sampled, or the given, sequences of a batch."""

    teacher: str
    weight: float  # factor of a token's loss, in addition to the teacher's weight
    column: TeacherColumn
    rows: Int[Tensor, " N"]  # of the column, for each token of the batch; -1: the teacher does not predict the token


def lessons_of(
    plan: MinibatchPlan,
    ids: Sequence[int],
    given: Sequence[TeacherColumn],
    *,
    batch: Ragged,
    mask: Bool[Tensor, " N"],
) -> list[Lesson]:
    """Return the predictions for the samples `ids` of a plan, which stand in this order in `batch`.

    Each of `given` has samples of one teacher, in any order. `mask` is True at the tokens of `ids` that are learned.
    ValueError: a teacher returned another number of tokens.
    """

    def kind(sequence_id: int) -> tuple[str, bool]:
        return plan.teacher_of(sequence_id), sequence_id < 0

    kinds = [kind(i) for i in batch.sequence_ids.tolist()]
    lessons = []
    for teacher, is_given in dict.fromkeys(map(kind, ids)):
        own = [i for i in ids if kind(i) == (teacher, is_given)]
        parts = [part for part in given if len(part.lengths) and plan.teacher_of(int(part.sequence_ids[0])) == teacher]
        column = _gathered(parts, own)
        belongs = torch.tensor([one == (teacher, is_given) for one in kinds]).repeat_interleave(batch.lengths) & mask
        if int(column.lengths.sum()) != int(belongs.sum()):
            returned, learned = int(column.lengths.sum()), int(belongs.sum())
            raise ValueError(f"the teacher returned {returned} states for {learned} tokens in the loss mask")
        rows = torch.where(belongs, belongs.cumsum(0) - 1, -1)
        lessons.append(Lesson(teacher=teacher, weight=plan.weight_of(is_given=is_given), column=column, rows=rows))
    return lessons


def _gathered(parts: Sequence[TeacherColumn], ids: Sequence[int]) -> TeacherColumn:
    form: type[Any] = type(parts[0]) if parts else LearntStates
    column: TeacherColumn = form.gather(parts, ids)
    return column


def taught(
    lessons: Sequence[Lesson],
    microbatch: Microbatch,
    mask: Bool[Tensor, " N"],
    *,
    teachers: Mapping[str, TeacherConfig],
    heads: Mapping[str, VocabularyHead],
    device: torch.device,
) -> list[Taught]:
    """Return the predictions of a micro-batch's tokens in mask. `heads`: of the teachers that return states."""
    tokens, found = microbatch.tokens[mask[microbatch.tokens]], []
    for lesson in lessons:
        rows = lesson.rows[tokens]
        places = (rows >= 0).nonzero()[:, 0]
        if len(places):
            teacher = _teacher(lesson.column, rows[places], heads.get(lesson.teacher), device)
            weight = teachers[lesson.teacher].weight * lesson.weight
            found.append(Taught(places=places.to(device), teacher=teacher, weight=weight))
    return found


def _teacher(
    column: TeacherColumn, rows: Int[Tensor, " n"], head: VocabularyHead | None, device: torch.device
) -> Teacher:
    if isinstance(column, TopLogprobs):
        ids, logprobs, of_tokens = (x[rows].to(device) for x in (column.ids, column.logprobs, column.token_logprobs))
        return TeacherTop(ids=ids, logprobs=logprobs, token_logprobs=of_tokens)
    assert head is not None
    hidden = column.hidden[rows].to(device)
    states = TeacherStates(
        hidden=hidden, weight=head.weight, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    if isinstance(column, LearntStates):
        return states
    assert head.pairs is not None
    before, logprobs, num_rows = (x[rows].to(device) for x in (column.before, column.logprobs, column.num_tokens))
    return TeacherSpans(last=states, before=before, logprobs=logprobs, num_rows=num_rows, pairs=head.pairs)


def by_teacher(
    name: str, values: Float[Tensor, " n"], lessons: Sequence[Lesson], microbatch: Microbatch
) -> dict[str, Reduction]:
    """Return the mean of a micro-batch's column over each teacher's tokens, as `<name>/<teacher>/mean`."""
    means: dict[str, Reduction] = {}
    for lesson in lessons:
        own = values[lesson.rows[microbatch.tokens] >= 0]
        means[f"{name}/{lesson.teacher}/mean"] = Mean(total=float(own.sum()), count=len(own))
    return means


def compared(lessons: Sequence[Lesson], microbatch: Microbatch) -> dict[str, Mean]:
    """Return the compared fraction of a micro-batch's learned tokens, by teacher."""
    fractions: dict[str, Mean] = {}
    for lesson in lessons:
        rows = lesson.rows[microbatch.tokens]
        rows, column = rows[rows >= 0], lesson.column
        count = int(column.num_tokens[rows].sum()) if isinstance(column, SpanStates) else len(rows)
        fraction = Mean(total=count, count=len(rows))
        earlier = fractions.get(lesson.teacher)
        fractions[lesson.teacher] = fraction if earlier is None else earlier.merge(fraction)
    return fractions
