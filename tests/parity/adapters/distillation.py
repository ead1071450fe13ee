"""Divergences between student and teacher: from whole logits, from hidden states, and over a top-k."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlhf.objectives.distillation import (
    Divergence,
    TeacherStates,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    weighted_divergence_sum,
)
from rlhf.objectives.logprobs import chunked_logprobs
from rlhf.objectives.masking import masked_sum
from rlhf.objectives.policy_loss import reinforce
from tests.parity.adapters.logprobs import IGNORED
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import gradient
from tests.plain_logits import logprobs_from_logits

CHUNK = 3


def divergence_of(share: float) -> Divergence:
    """TRL's beta or alpha: the teacher's share of the mixture, and at 0 and 1 the two KLs."""
    if share == 0.0:
        return forward_kl
    if share == 1.0:
        return reverse_kl
    return partial(generalized_jsd, beta=share)


def trl_gkd(arguments: Arguments) -> Outputs:
    """Return TRL's loss from logits, averaged in a chosen way."""
    variable, teacher = arguments.variable("student_logits"), arguments.tensor("teacher_logits")
    temperature = arguments.number("temperature", 1.0)
    student_logprobs = (variable / temperature).log_softmax(-1)
    found = divergence_of(arguments.number("beta", 0.5))(student_logprobs, (teacher / temperature).log_softmax(-1))
    has_labels = arguments.has("labels")
    arguments.ignore("labels")
    kept = arguments.integers("labels") != IGNORED if has_labels else torch.ones(found.shape, dtype=torch.bool)
    total, num_kept = masked_sum(found, kept), int(kept.sum())
    reduction, num_items = arguments.param("reduction", "batchmean"), arguments.optional("num_items_in_batch")
    if num_items is not None:
        loss = total / num_items
    elif reduction == "sum":
        loss = total
    elif reduction == "mean":
        loss = total / (num_kept * variable.shape[-1])
    elif reduction == "batchmean":
        loss = total / max(num_kept if has_labels else len(found), 1)
    else:
        raise Unsupported(f"reduction {reduction!r}")
    return {"loss": loss, "grad_student_logits": gradient(loss, variable)}


def trl_chunked(arguments: Arguments) -> Outputs:
    """From hidden states, in chunks; the student's entropy has no gradient."""
    hidden, weight = arguments.variable("student_hidden"), arguments.variable("student_weight")
    temperature = arguments.number("temperature", 1.0)
    bias = arguments.variable("student_bias") if arguments.has("student_bias") else arguments.maybe("student_bias")
    softcap = arguments.optional("student_final_logit_softcapping")
    scale = arguments.number("student_logit_scale", 1.0)
    teacher = TeacherStates(
        hidden=arguments.tensor("teacher_hidden"),
        weight=arguments.tensor("teacher_weight"),
        bias=arguments.maybe("teacher_bias"),
        softcap=arguments.optional("teacher_final_logit_softcapping"),
        logit_scale=arguments.number("teacher_logit_scale", 1.0),
    )
    loss, found, *_ = weighted_divergence_sum(
        divergence_of(arguments.number("beta")),
        hidden,
        weight,
        torch.zeros(len(hidden), dtype=torch.long),
        teacher,
        token_weight=1.0,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=scale,
        chunk_size=CHUNK,
    )
    _, entropy = chunked_logprobs(
        hidden,
        weight,
        torch.zeros(len(hidden), dtype=torch.long),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=scale,
        chunk_size=CHUNK,
    )
    outputs = {
        "per_token_divergence": found,
        "student_entropy": entropy,
        "grad_student_hidden": gradient(loss, hidden),
        "grad_student_weight": gradient(loss, weight),
    }
    return outputs if bias is None else outputs | {"grad_student_bias": gradient(loss, bias)}


def per_token(found: Tensor, variable: Tensor) -> Outputs:
    """And the gradient of the sum."""
    return {"per_token_loss": found, "grad_student_logits_of_sum": gradient(found.sum(), variable)}


def trl_full_logit(arguments: Arguments) -> Outputs:
    """Over the vocabulary."""
    variable, teacher = arguments.variable("student_logits"), arguments.tensor("teacher_logits")
    divergence = divergence_of(arguments.number("distillation_alpha"))
    return per_token(divergence(variable.log_softmax(-1), teacher.log_softmax(-1)), variable)


def with_tail(logprobs: Tensor) -> Tensor:
    """Add an entry for all further tokens together, clipped below at 1e-7."""
    inside = logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, (-inside.expm1()).log()], dim=-1)


def renormalized(logprobs: Tensor) -> Tensor:
    """Return the distribution conditioned on these tokens."""
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def trl_topk(arguments: Arguments) -> Outputs:
    """Return TRL's loss over the student's k likeliest tokens, with or without an entry for the rest."""
    variable, teacher = arguments.variable("student_logits"), arguments.tensor("teacher_logits")
    divergence = divergence_of(arguments.number("distillation_alpha"))
    tokens = variable.topk(arguments.whole("distillation_topk"), dim=-1).indices
    support = with_tail if arguments.flag("distillation_add_tail") else renormalized
    both = [support(logits.log_softmax(-1).gather(-1, tokens)) for logits in (variable, teacher)]
    return per_token(divergence(*both), variable)


def trl_sampled_token(arguments: Arguments) -> Outputs:
    """Return the policy gradient of the reverse KL, from one sample."""
    if arguments.number("distillation_alpha") != 1.0:
        raise Unsupported("TRL refuses another alpha than 1 here")
    variable, tokens = arguments.variable("student_logits"), arguments.integers("completion_ids")
    logprobs = logprobs_from_logits(variable, tokens)
    advantages = logprobs_from_logits(arguments.tensor("teacher_logits"), tokens) - logprobs.detach()
    return per_token(reinforce(logprobs, advantages, torch.ones_like(tokens, dtype=torch.bool)), variable)


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "GKDTrainer.generalized_jsd_loss"): trl_gkd,
    ("trl", "ChunkedDivergenceFunction.apply"): trl_chunked,
    ("trl", "compute_full_logit_self_distillation_loss"): trl_full_logit,
    ("trl", "compute_topk_self_distillation_loss"): trl_topk,
    ("trl", "compute_sampled_token_self_distillation_loss"): trl_sampled_token,
}
