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
from rlhf.objectives.policy_loss import reinforce
from tests.parity.adapters.logprobs import IGNORED
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import gradient
from tests.plain_logits import logprobs_from_logits


def divergence_of(share: float) -> Divergence:
    """TRL's beta or alpha: the teacher's share of the mixture, and at 0 and 1 the two KLs."""
    return {0.0: forward_kl, 1.0: reverse_kl}.get(share, partial(generalized_jsd, beta=share))


def trl_gkd(arguments: Arguments) -> Outputs:
    """Return TRL's loss from logits, averaged in a chosen way."""
    variable, temperature = arguments.variable("student_logits"), arguments.number("temperature", 1.0)
    logprobs = [(x / temperature).log_softmax(-1) for x in (variable, arguments.tensor("teacher_logits"))]
    found = divergence_of(arguments.number("beta", 0.5))(*logprobs)
    has_labels = arguments.has("labels")
    kept = found[arguments.integers("labels") != IGNORED] if has_labels else found
    reduction, num_items = arguments.param("reduction", "batchmean"), arguments.optional("num_items_in_batch")
    counts = {"sum": 1, "mean": kept.numel() * variable.shape[-1], "batchmean": len(kept)}
    loss = kept.sum() / (counts[reduction] if num_items is None else num_items)
    return {"loss": loss, "grad_student_logits": gradient(loss, variable)}


def trl_chunked(arguments: Arguments) -> Outputs:
    """Return the loss from hidden states, in chunks. The student's entropy has no gradient."""
    hidden, weight = arguments.variable("student_hidden"), arguments.variable("student_weight")
    bias, targets = arguments.maybe("student_bias"), torch.zeros(len(hidden), dtype=torch.long)
    head = {
        "bias": None if bias is None else bias.requires_grad_(),
        "temperature": arguments.number("temperature", 1.0),
        "softcap": arguments.optional("student_final_logit_softcapping"),
        "logit_scale": arguments.number("student_logit_scale", 1.0),
        "chunk_size": 3,
    }
    teacher = TeacherStates(
        hidden=arguments.tensor("teacher_hidden"),
        weight=arguments.tensor("teacher_weight"),
        bias=arguments.maybe("teacher_bias"),
        softcap=arguments.optional("teacher_final_logit_softcapping"),
        logit_scale=arguments.number("teacher_logit_scale", 1.0),
    )
    divergence = divergence_of(arguments.number("beta"))
    loss, found, *_ = weighted_divergence_sum(divergence, hidden, weight, targets, teacher, token_weight=1.0, **head)
    of_bias = {} if bias is None else {"grad_student_bias": gradient(loss, bias)}
    return {
        **of_bias,
        "per_token_divergence": found,
        "student_entropy": chunked_logprobs(hidden, weight, targets, **head)[1],
        "grad_student_hidden": gradient(loss, hidden),
        "grad_student_weight": gradient(loss, weight),
    }


def per_token(found: Tensor, variable: Tensor) -> Outputs:
    return {"per_token_loss": found, "grad_student_logits_of_sum": gradient(found.sum(), variable)}


def with_tail(logprobs: Tensor) -> Tensor:
    """Add an entry for all further tokens together, clipped below at 1e-7."""
    inside = logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, (-inside.expm1()).log()], dim=-1)


def trl_self_distillation(arguments: Arguments) -> Outputs:
    """Return TRL's loss over the vocabulary, or over the student's k likeliest tokens and maybe the rest."""
    variable, teacher = arguments.variable("student_logits"), arguments.tensor("teacher_logits")
    both, k = [logits.log_softmax(-1) for logits in (variable, teacher)], arguments.optional("distillation_topk")
    if k is not None:
        tokens = variable.topk(int(k), dim=-1).indices
        both = [logprobs.gather(-1, tokens) for logprobs in both]
        both = [with_tail(x) if arguments.param("distillation_add_tail") else x.log_softmax(-1) for x in both]
    return per_token(divergence_of(arguments.number("distillation_alpha"))(*both), variable)


def trl_sampled_token(arguments: Arguments) -> Outputs:
    """Return the policy gradient of the reverse KL, from one sample."""
    arguments.ignore("distillation_alpha")  # TRL refuses another alpha than 1 here
    variable, tokens = arguments.variable("student_logits"), arguments.integers("completion_ids")
    logprobs = logprobs_from_logits(variable, tokens)
    advantages = logprobs_from_logits(arguments.tensor("teacher_logits"), tokens) - logprobs.detach()
    return per_token(reinforce(logprobs, advantages, torch.ones_like(tokens, dtype=torch.bool)), variable)


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "GKDTrainer.generalized_jsd_loss"): trl_gkd,
    ("trl", "ChunkedDivergenceFunction.apply"): trl_chunked,
    ("trl", "compute_full_logit_self_distillation_loss"): trl_self_distillation,
    ("trl", "compute_topk_self_distillation_loss"): trl_self_distillation,
    ("trl", "compute_sampled_token_self_distillation_loss"): trl_sampled_token,
}
