"""Compare the distributions of two tokenizers over the spans of a text, as GOLD does."""

from __future__ import annotations

import torch

from rlhf.data.spans import matched_spans
from rlhf.objectives.distillation import TeacherSpans, TeacherStates, weighted_divergence_sum
from tests.parity.adapters.distillation import divergence_of
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import gradient


def trl_align(arguments: Arguments) -> Outputs:
    """Return the tokens of each side in each span."""
    spans = matched_spans(*(arguments.integers(f"{side}_ends").tolist() for side in ("student", "teacher")))
    return {
        "student_groups": [list(range(*span.student)) for span in spans],
        "teacher_groups": [list(range(*span.teacher)) for span in spans],
    }


def trl_loss(arguments: Arguments) -> Outputs:
    """Return TRL's mean over the spans of a response. Without the hybrid loss no token is compared by its text."""
    if arguments.param("uld_token_merge_strategy") != "bayesian":
        raise LookupError("uld_token_merge_strategy")
    variable, teacher = arguments.variable("student_logits"), arguments.tensor("teacher_logits")
    temperature = arguments.number("uld_student_temperature")
    if arguments.number("uld_teacher_temperature") != temperature:
        raise LookupError("uld_teacher_temperature")
    words, others = arguments.raw("student_vocabulary"), arguments.raw("teacher_vocabulary")
    pairs = [(words[word], others[word]) for word in words if word in others]
    beta, is_hybrid = arguments.number("beta"), arguments.param("uld_use_hybrid_loss")
    spans = matched_spans(*(arguments.integers(f"{side}_ends").tolist() for side in ("student", "teacher")))
    ids, scaled = arguments.integers("teacher_ids"), (teacher / temperature).log_softmax(-1)
    of_tokens = scaled.gather(-1, ids[:, None])[:, 0]
    hidden, before = torch.zeros(len(variable), teacher.shape[-1], dtype=teacher.dtype), torch.zeros(len(variable))
    before, num_rows = before.to(teacher.dtype), torch.zeros(len(variable), dtype=torch.int64)
    for span in spans:
        (start, stop), (first, last) = span.student, span.teacher
        hidden[stop - 1], num_rows[stop - 1] = teacher[last - 1], stop - start
        before[stop - 1] = of_tokens[first : last - 1].sum()
    eye = torch.eye(teacher.shape[-1], dtype=teacher.dtype)
    loss, *_ = weighted_divergence_sum(
        divergence_of(beta),
        variable,
        torch.eye(variable.shape[-1], dtype=variable.dtype),
        arguments.integers("student_ids"),
        TeacherSpans(
            last=TeacherStates(hidden=hidden, weight=eye),
            before=before,
            logprobs=before,
            num_rows=num_rows,
            pairs=torch.tensor(pairs if is_hybrid else [], dtype=torch.int64).view(-1, 2),
        ),
        token_weight=1.0 / len(spans),
        temperature=temperature,
        chunk_size=3,
    )
    return {"loss": loss, "grad_student_logits": gradient(loss, variable)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "ULDLoss._align_by_byte_offsets"): trl_align,
    ("trl", "ULDLoss.__call__"): trl_loss,
}
