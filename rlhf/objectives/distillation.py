"""Compute divergences between a student's and a teacher's next-token distributions.

Divergences take log-probabilities over a common support, the last axis. The sums take the student's hidden states with
the teacher's hidden states or largest log-probabilities, and hold the logits of a few hundred rows at a time. A teacher
with another tokenizer is compared at the ends of spans (rlhf.objectives.spans). Only the student gets a gradient.
On-policy distillation only from sampled tokens (arXiv:2306.08543; TRL's sampled_token) needs teacher_advantages in a
policy gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.logprobs import chunked_logprobs_only
from rlhf.objectives.spans import hybrid_distance
from rlhf.objectives.vocabulary_head import Factors, Head, HeadOptions, chunks, sum_over_rows

Divergence = Callable[[Tensor, Tensor], Tensor]  # (student_logprobs, teacher_logprobs) over the last axis


def forward_kl(student_logprobs: Float[Tensor, "*B V"], teacher_logprobs: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Return KL(teacher || student): the student covers all of the teacher's modes (arXiv:1503.02531)."""
    return _kl(teacher_logprobs, student_logprobs)


def entry_clipped_forward_kl(
    student_logprobs: Float[Tensor, "*B V"], teacher_logprobs: Float[Tensor, "*B V"], *, most: float
) -> Float[Tensor, "*B"]:
    """Return the sum over the vocabulary of min(q log(q / p), most), q the teacher: forward_kl with clipped entries.

    OPSD, arXiv:2601.18734, in the form of its code (`jsd_token_clip`). A clipped entry has no gradient.
    """
    difference = torch.where(teacher_logprobs == -torch.inf, 0.0, teacher_logprobs - student_logprobs)
    return (teacher_logprobs.exp() * difference).clamp(max=most).sum(-1)


def reverse_kl(student_logprobs: Float[Tensor, "*B V"], teacher_logprobs: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Return KL(student || teacher): the student seeks the teacher's modes (MiniLLM, arXiv:2306.08543)."""
    return _kl(student_logprobs, teacher_logprobs)


def generalized_jsd(
    student_logprobs: Float[Tensor, "*B V"], teacher_logprobs: Float[Tensor, "*B V"], *, beta: float
) -> Float[Tensor, "*B"]:
    """Return beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    GKD, arXiv:2306.13649, eq. 1, for 0 < beta < 1. The value lies between 0 and the entropy of beta, also for disjoint
    supports. TRL takes beta 0 for forward_kl and beta 1 for reverse_kl, the limits of JSD / beta and JSD / (1 - beta).
    """
    shares = torch.tensor([beta, 1.0 - beta], dtype=student_logprobs.dtype, device=student_logprobs.device).log()
    lowest = torch.finfo(student_logprobs.dtype).min / 2  # logaddexp of two -inf has no gradient
    mixture = torch.logaddexp(teacher_logprobs.clamp(lowest) + shares[0], student_logprobs.clamp(lowest) + shares[1])
    return beta * _kl(teacher_logprobs, mixture) + (1.0 - beta) * _kl(student_logprobs, mixture)


def _kl(logprobs: Float[Tensor, "*B V"], others: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Return KL(p || q). Entries with p = 0 add nothing, for any q."""
    difference = torch.where(logprobs == -torch.inf, 0.0, logprobs - others)
    return (logprobs.exp() * difference).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStates:
    """Hidden states of the teacher for the student's rows, with the teacher's vocabulary head."""

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, rows: Int[Tensor, " n"], *, count: int) -> TeacherStates:
        """Return the predictions of some rows, over the first `count` tokens."""
        bias = self.bias if self.bias is None else self.bias[:count]
        return replace(self, hidden=self.hidden[rows], weight=self.weight[:count], bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTop:
    """The teacher's k largest log-probabilities for the student's rows, at the temperature of the divergence."""

    ids: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    token_logprobs: Float[Tensor, " N"]  # log-probability of each target or sampled token

    @classmethod
    def of_no_rows(cls, *, device: torch.device) -> TeacherTop:
        none = torch.zeros(0, device=device)
        return cls(ids=none[:, None].int(), logprobs=none[:, None], token_logprobs=none)

    def rows(self, rows: Int[Tensor, " n"], *, count: int) -> TeacherTop:
        """Return the predictions of some rows. `count`: tokens of the student, which do not change the rows."""
        return TeacherTop(ids=self.ids[rows], logprobs=self.logprobs[rows], token_logprobs=self.token_logprobs[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpans:
    """The predictions of a teacher with another tokenizer for spans of adjacent rows. A span stands in the last row."""

    last: TeacherStates  # predicts the teacher's last token of the span
    before: Float[Tensor, " N"]  # the teacher's log-probability of the span's tokens before the last one
    logprobs: Float[Tensor, " N"]  # log-probability of the whole span
    num_rows: Int[Tensor, " N"]  # number of rows of the span; 0: no span ends in this row
    pairs: Int[Tensor, "P 2"]  # ids (student's, teacher's) of the tokens for the same text

    def rows(self, rows: Int[Tensor, " n"], *, count: int) -> TeacherSpans:
        """Return the predictions of some rows with whole spans. `count`: tokens of the student."""
        return replace(
            self,
            last=self.last.rows(rows, count=len(self.last.weight)),
            before=self.before[rows],
            logprobs=self.logprobs[rows],
            num_rows=self.num_rows[rows],
        )

    def earlier(self) -> tuple[Int[Tensor, " e"], Int[Tensor, " e"]]:
        """Return the rows of spans before the last row, and the last row of each one's span."""
        ends = self.num_rows.nonzero()[:, 0]
        sizes = self.num_rows[ends] - 1
        owners = ends.repeat_interleave(sizes)
        firsts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        places = torch.arange(len(owners), device=owners.device) - firsts
        return owners - sizes.repeat_interleave(sizes) + places, owners


Teacher = TeacherStates | TeacherTop | TeacherSpans


def binned(logprobs: Float[Tensor, "*B V"], ids: Int[Tensor, "*B k"]) -> Float[Tensor, "*B k+1"]:
    """Return the log-probabilities of k tokens and, last, of all other tokens together: -inf at k = V."""
    ids = ids.long()
    kept = logprobs.gather(-1, ids)
    if ids.shape[-1] == logprobs.shape[-1]:
        return torch.cat([kept, torch.full_like(kept[..., :1], -torch.inf)], dim=-1)
    others = logprobs.scatter(-1, ids, torch.finfo(logprobs.dtype).min / 2)  # a row of only -inf has no gradient
    return torch.cat([kept, others.logsumexp(-1, keepdim=True)], dim=-1)


def with_tail(logprobs: Float[Tensor, "*B k"], *, vocabulary: int) -> Float[Tensor, "*B k+1"]:
    """Return k log-probabilities and, last, of all other tokens together: -inf at k = `vocabulary`.

    The tail is at least the smallest step of the dtype below 1, since the rounding of the k probabilities hides less.
    """
    if logprobs.shape[-1] == vocabulary:
        tail = torch.full_like(logprobs[..., :1], -torch.inf)
    else:
        rest = 1.0 - logprobs.double().exp().sum(-1, keepdim=True)
        tail = rest.clamp(min=torch.finfo(logprobs.dtype).eps).log().to(logprobs.dtype)
    return torch.cat([logprobs, tail], dim=-1)


def top_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    tokens: Int[Tensor, " N"],
    *,
    k: int,
    **options: Unpack[HeadOptions],
) -> TeacherTop:
    """Return the k largest log-probabilities of each row, or all V, and the log-probability of the row's token."""
    head, k = Head(**options), min(k, len(weight))
    with torch.no_grad():
        factors, parts = Factors.of(hidden, weight, head.bias), []
        for rows in chunks(len(hidden), head.chunk_size) or [slice(0, 0)]:
            logprobs = head.logits(factors, rows).log_softmax(-1)
            top = logprobs.topk(k, dim=-1)
            parts.append((top.indices.int(), top.values, logprobs.gather(-1, tokens[rows, None])[:, 0]))
    ids, values, of_tokens = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return TeacherTop(ids=ids, logprobs=values, token_logprobs=of_tokens)


def weighted_divergence_sum(
    divergence: Divergence,
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    teacher: Teacher,
    *,
    token_weight: float,
    divergence_weight: float = 1.0,
    sft_coef: float = 0.0,
    **options: Unpack[HeadOptions],
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return (loss, divergences, logprobs, is_top1). Only the loss has a gradient.

    The loss is token_weight times the sum of divergence_weight * divergence - sft_coef * logprob. logprobs are the
    targets' log-probabilities at temperature 1, and is_top1 is True for targets with the largest logit. Both models'
    logits are divided by temperature (GKD does not multiply the loss by the squared temperature). With the teacher's k
    largest log-probabilities the divergence is over k + 1 outcomes: the k tokens and all others together. With spans it
    is the hybrid distance of each span, in the span's last row. ValueError if rows or vocabularies differ: slice both
    heads to the shared tokens.
    """
    head = Head(**options)
    compared = _compared(divergence, teacher, like=(hidden, weight), temperature=head.temperature)
    before = _before(teacher, hidden, weight, targets, **options)

    def of_rows(logits: Tensor, rows: slice, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        divergences, _ = compared(log_p, rows, before)
        kept = log_p if sft_coef else log_p.detach()
        plain = kept if head.temperature == 1.0 else (kept * head.temperature).log_softmax(-1)
        logprobs = plain.gather(-1, targets[rows, None])[:, 0]
        is_top1 = (log_p.argmax(-1) == targets[rows]).to(divergences.dtype)
        losses = divergence_weight * divergences
        losses = losses - sft_coef * logprobs if sft_coef else losses
        return token_weight * losses, torch.stack([divergences, logprobs, is_top1], dim=-1)

    loss, columns = sum_over_rows(of_rows, hidden, weight, head, numbers=before)
    divergences, logprobs, is_top1 = columns.unbind(-1)
    return loss, divergences, logprobs, is_top1.bool()


def sampled_divergence_sum(
    divergence: Divergence,
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    sampled: Int[Tensor, " N"],
    teacher: Teacher,
    *,
    token_weight: float,
    divergence_weight: float = 1.0,
    **options: Unpack[HeadOptions],
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return (loss, student logprobs, teacher logprobs, student entropies) of the sampled tokens, at the temperature.

    The loss is token_weight times divergence_weight times the sum of divergences, over the outcomes of
    `weighted_divergence_sum`. Only the loss has a gradient. Each head is applied once to a row, but twice to a row of a
    span before the last. For a span, the last row has the teacher's log-probability of the span minus the student's
    log-probabilities of the earlier rows. All remaining rows have nan.
    """
    head = Head(**options)
    compared = _compared(divergence, teacher, like=(hidden, weight), temperature=head.temperature)
    before = _before(teacher, hidden, weight, sampled, **options)

    def of_rows(logits: Tensor, rows: slice, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        divergences, theirs = compared(log_p, rows, before)
        detached, tokens = log_p.detach(), sampled[rows, None]
        of_student = detached.gather(-1, tokens)[:, 0]
        if isinstance(teacher, TeacherTop):
            of_teacher = teacher.token_logprobs[rows].to(logits.dtype)
        elif before is not None and isinstance(teacher, TeacherSpans):
            of_teacher = teacher.logprobs[rows].to(logits.dtype) - before.detach()
            of_teacher = torch.where(teacher.num_rows[rows] > 0, of_teacher, torch.nan)
        else:
            of_teacher = theirs.gather(-1, tokens)[:, 0]
        entropies = torch.special.entr(detached.exp()).sum(-1)
        losses = token_weight * divergence_weight * divergences
        return losses, torch.stack([of_student, of_teacher, entropies], dim=-1)

    loss, columns = sum_over_rows(of_rows, hidden, weight, head, numbers=before)
    logprobs, teacher_columns, entropies = columns.unbind(-1)
    return loss, logprobs, teacher_columns, entropies


def teacher_advantages(
    logprobs: Float[Tensor, "*N"], teacher_logprobs: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """Return log q - log p of each sampled token, detached; 0 outside mask.

    A policy gradient with log q - log p as advantages is in expectation the gradient of -KL(student || teacher) at each
    token, given the previous tokens.
    """
    return torch.where(mask, teacher_logprobs - logprobs.detach(), 0.0)


Compared = Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]]


def _compared(
    divergence: Divergence, teacher: Teacher, *, like: tuple[Tensor, Tensor], temperature: float | Tensor
) -> Compared:
    """Return a function from some rows' log-probabilities of the student to (divergences, teacher's log-probabilities).

    ValueError if rows or vocabularies differ.
    """
    hidden, weight = like
    if isinstance(teacher, TeacherTop):
        return _compared_at_top(divergence, teacher, num_rows=len(hidden), vocabulary=len(weight))
    if isinstance(teacher, TeacherSpans):
        return _compared_at_spans(divergence, teacher, num_rows=len(hidden), temperature=temperature)
    if (len(hidden), len(weight)) != (len(teacher.hidden), len(teacher.weight)):
        raise ValueError(
            f"a divergence needs one teacher row a student row and one vocabulary, got {len(hidden)} and "
            f"{len(teacher.hidden)} rows over {len(weight)} and {len(teacher.weight)} tokens"
        )
    predicted = _predicted(teacher, temperature=temperature)

    def of_rows(log_p: Tensor, rows: slice, _: Tensor | None) -> tuple[Tensor, Tensor]:
        theirs = predicted(rows).to(log_p.dtype)
        return divergence(log_p, theirs), theirs

    return of_rows


def _predicted(states: TeacherStates, *, temperature: float | Tensor) -> Callable[[slice], Tensor]:
    """Return a function from some rows to the teacher's log-probabilities, without a gradient."""
    head = Head(temperature=temperature, softcap=states.softcap, logit_scale=states.logit_scale)
    with torch.no_grad():
        factors = Factors.of(states.hidden, states.weight, states.bias)

    def of_rows(rows: slice) -> Tensor:
        with torch.no_grad():
            return head.logits(factors, rows).log_softmax(-1)

    return of_rows


def _compared_at_top(divergence: Divergence, teacher: TeacherTop, *, num_rows: int, vocabulary: int) -> Compared:
    _refuse_other_count(num_rows, len(teacher.ids))
    if teacher.ids.numel() and int(teacher.ids.max()) >= vocabulary:
        raise ValueError(f"the teacher names token {int(teacher.ids.max())}, the student has {vocabulary} tokens")

    def of_rows(log_p: Tensor, rows: slice, _: Tensor | None) -> tuple[Tensor, Tensor]:
        theirs = with_tail(teacher.logprobs[rows], vocabulary=vocabulary).to(log_p.dtype)
        return divergence(binned(log_p, teacher.ids[rows]), theirs), theirs

    return of_rows


def _compared_at_spans(
    divergence: Divergence, teacher: TeacherSpans, *, num_rows: int, temperature: float | Tensor
) -> Compared:
    _refuse_other_count(num_rows, len(teacher.num_rows))
    predicted = _predicted(teacher.last, temperature=temperature)

    def of_rows(log_p: Tensor, rows: slice, before: Tensor | None) -> tuple[Tensor, Tensor]:
        assert before is not None
        ends = teacher.num_rows[rows].nonzero()[:, 0]
        theirs = (predicted(rows) + teacher.before[rows, None]).to(log_p.dtype)[ends]
        ours = (log_p + before[:, None]).index_select(0, ends)
        distances = hybrid_distance(ours, theirs, teacher.pairs, divergence=divergence)
        return torch.zeros_like(log_p[:, 0]).index_copy(0, ends, distances), theirs

    return of_rows


def _refuse_other_count(num_rows: int, count: int) -> None:
    if num_rows != count:
        raise ValueError(f"a divergence needs one teacher row a student row, got {num_rows} and {count} rows")


def _before(
    teacher: Teacher,
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    tokens: Int[Tensor, " N"],
    **options: Unpack[HeadOptions],
) -> Float[Tensor, " N"] | None:
    """Return in the last row of a span the student's log-probability of the span's earlier tokens. Remaining rows are
    0.

    None: the teacher's rows are no spans.
    """
    if not isinstance(teacher, TeacherSpans):
        return None
    rows, owners = teacher.earlier()
    logprobs = chunked_logprobs_only(hidden.index_select(0, rows), weight, tokens[rows], **options)
    return logprobs.new_zeros(len(hidden)).index_add(0, owners, logprobs)
