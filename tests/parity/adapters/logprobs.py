"""Log-probabilities and entropies, from logits and from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.logprobs import chunked_logprobs
from rlhf.objectives.masking import sequence_sums
from tests.parity.adapters.aggregation import verl_aggregated
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, gradient
from tests.plain_logits import (
    collision_logprob_from_logits,
    entropy_from_logits,
    is_top1_from_logits,
    logprobs_from_logits,
)

IGNORED = -100  # the label that Hugging Face's losses skip


def with_gradient(name: str, values: Tensor, logits: Tensor) -> dict[str, Tensor]:
    return {name: values, "grad_logits_of_sum": gradient(values.sum(), logits)}


def trl_selective(arguments: Arguments) -> Outputs:
    """Return log-probabilities of one token a row, or several on a last axis; zero for rows outside row_mask."""
    variable, index = arguments.variable("logits"), arguments.integers("index")
    logits = variable / arguments.number("temperature", 1.0)
    columns = index.unbind(-1) if index.ndim == logits.ndim else [index]
    logps = torch.stack([logprobs_from_logits(logits, column) for column in columns], dim=-1).view(index.shape)
    kept = arguments.mask("row_mask", torch.ones(logits.shape[:-1], dtype=torch.bool))
    logps = torch.where(kept.view(*kept.shape, *[1] * (index.ndim - kept.ndim)), logps, 0.0)
    return {**with_gradient("logps", logps, variable), "entropy": torch.where(kept, entropy_from_logits(logits), 0.0)}


def entropy(arguments: Arguments) -> Outputs:
    """Return the entropy of every row. The size of a chunk must not matter."""
    arguments.ignore("chunk_size")
    logits = arguments.variable("logits")
    return with_gradient("entropy", entropy_from_logits(logits), logits)


def verl_entropy_loss(arguments: Arguments) -> Outputs:
    """Return the entropy, aggregated as a loss."""
    layout, logits = Layout(arguments.mask("response_mask")), arguments.tensor("logits")
    return {"entropy": verl_aggregated(arguments, layout.flat(entropy_from_logits(logits)), layout)}


def of_labels(arguments: Arguments) -> Outputs:
    return {"logps": logprobs_from_logits(arguments.tensor("logits"), arguments.integers("labels"))}


def trl_batch_logps(arguments: Arguments) -> Outputs:
    """Average over the labels that are not ignored, each predicted at the previous position."""
    logits, labels = arguments.tensor("logits")[:, :-1], arguments.integers("labels")[:, 1:]
    layout, averages = Layout(labels != IGNORED), arguments.param("average_log_prob")
    flat = logprobs_from_logits(layout.flat(logits), layout.flat(labels).clamp(min=0))
    sums = sequence_sums(torch.where(layout.mask, flat, 0.0), layout.lengths)
    return {"logps": sums / layout.counts if averages else sums}


def trl_chunked(arguments: Arguments) -> Outputs:
    """Return log-probabilities from hidden states. Statistics without a gradient come from the whole logits."""
    hidden, weight, bias = (arguments.variable(name) for name in ("hidden", "weight", "bias"))
    targets, chunk_size = arguments.integers("targets"), int(arguments.number("chunk_size"))
    names = ("temperature", "final_logit_softcapping", "logit_scale")
    temperature, softcap, scale = (arguments.number(name) for name in names)
    head = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": scale}
    logps, entropies = chunked_logprobs(hidden, weight, targets, **head, entropy_grad=True, chunk_size=chunk_size)
    logits = torch.nn.functional.linear(hidden, weight, bias).detach() * scale
    logits = softcap * (logits / softcap).tanh() / temperature
    objective = (logps + 0.1 * entropies).sum()
    return {
        "logps": logps,
        "entropy": entropies,
        "log_sum_sq_probs": collision_logprob_from_logits(logits),
        "mean_logits": logits.mean(-1),
        "is_top1": is_top1_from_logits(logits, targets),
        "grad_hidden_of_lp+0.1ent": gradient(objective, hidden),
        "grad_weight_of_lp+0.1ent": gradient(objective, weight),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "selective_log_softmax"): trl_selective,
    ("trl", "selective_log_softmax_and_entropy"): trl_selective,
    ("trl", "entropy_from_logits"): entropy,
    ("trl", "CPOTrainer.get_batch_logps"): trl_batch_logps,
    ("trl", "ChunkedLogProbFunction.apply"): trl_chunked,
    ("verl", "entropy_from_logits"): entropy,
    ("verl", "entropy_from_logits_with_chunking"): entropy,
    ("verl", "compute_entropy_loss"): verl_entropy_loss,
    ("verl", "logprobs_from_logits_v2"): of_labels,
    ("openrlhf", "compute_entropy"): entropy,
}
