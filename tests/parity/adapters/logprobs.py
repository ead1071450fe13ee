"""Log-probabilities and entropies, from logits and from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.logprobs import chunked_logprobs
from rlhf.objectives.masking import sequence_counts, sequence_sums
from tests.parity.adapters.aggregation import verl_aggregated
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout, gradient
from tests.plain_logits import (
    collision_logprob_from_logits,
    entropy_from_logits,
    is_top1_from_logits,
    logprobs_from_logits,
)

IGNORED = -100  # the label that Hugging Face's losses skip


def selected(logits: Tensor, index: Tensor) -> Tensor:
    """Return the log-probability of a token per row, or of several tokens along a last axis."""
    if index.ndim == logits.ndim - 1:
        return logprobs_from_logits(logits, index)
    return torch.stack([logprobs_from_logits(logits, column) for column in index.unbind(-1)], dim=-1)


def trl_selective(*, with_entropy: bool) -> Adapter:
    """At a temperature; rows outside row_mask are zero."""

    def adapter(arguments: Arguments) -> Outputs:
        variable, index = arguments.variable("logits"), arguments.integers("index")
        logits = variable / arguments.number("temperature", 1.0)
        logps, entropy = selected(logits, index), entropy_from_logits(logits)
        if arguments.has("row_mask"):
            kept = arguments.mask("row_mask")
            logps, entropy = torch.where(kept, logps, 0.0), torch.where(kept, entropy, 0.0)
        outputs = {"logps": logps, "grad_logits_of_sum": gradient(logps.sum(), variable)}
        if not with_entropy:
            return outputs
        arguments.ignore("entropy_requires_grad")
        return {"logps": logps, "entropy": entropy}

    return adapter


def entropy(*, in_float32: bool = False) -> Adapter:
    """Of every row; the size of a chunk must not matter."""

    def adapter(arguments: Arguments) -> Outputs:
        arguments.ignore("chunk_size")
        logits = arguments.variable("logits")
        found = entropy_from_logits(logits.float() if in_float32 else logits)
        return {"entropy": found, "grad_logits_of_sum": gradient(found.sum(), logits)}

    return adapter


def verl_entropy_loss(arguments: Arguments) -> Outputs:
    """The entropy, aggregated as a loss."""
    layout, logits = Layout(arguments.mask("response_mask")), arguments.variable("logits")
    loss = verl_aggregated(arguments, layout.flat(entropy_from_logits(logits)), layout)
    return {"entropy": loss, "grad_logits": gradient(loss, logits)}


def of_labels(arguments: Arguments) -> Outputs:
    """Return the log-probability of a label per row."""
    logits = arguments.variable("logits")
    logps = logprobs_from_logits(logits / arguments.number("temperature", 1.0), arguments.integers("labels"))
    return {"logps": logps, "grad_logits_of_sum": gradient(logps.sum(), logits)}


def trl_batch_logps(arguments: Arguments) -> Outputs:
    """Sum or average over the labels that are not ignored, each predicted at the previous position."""
    if arguments.flag("is_encoder_decoder", False):
        raise Unsupported("encoder-decoder models")
    variable, labels = arguments.variable("logits"), arguments.integers("labels")[:, 1:]
    layout = Layout(labels != IGNORED)
    flat = logprobs_from_logits(layout.flat(variable[:, :-1]), layout.flat(labels).clamp(min=0))
    logps = sequence_sums(torch.where(layout.mask, flat, 0.0), layout.lengths)
    if arguments.flag("average_log_prob", False):
        logps = logps / sequence_counts(layout.mask, layout.lengths)  # nan without labels, as in TRL
    return {"logps": logps, "grad_logits_of_sum": gradient(logps.sum(), variable)}


def trl_chunked(arguments: Arguments) -> Outputs:
    """From hidden states; the statistics without a gradient come from the whole logits."""
    hidden, weight = arguments.variable("hidden"), arguments.variable("weight")
    targets, bias = arguments.integers("targets"), arguments.maybe("bias")
    bias = None if bias is None else bias.requires_grad_()
    settings = {
        "temperature": arguments.number("temperature"),
        "softcap": arguments.optional("final_logit_softcapping"),
        "logit_scale": arguments.number("logit_scale", 1.0),
    }
    logps, entropies = chunked_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        **settings,
        entropy_grad=True,
        chunk_size=arguments.whole("chunk_size"),
    )
    logits = torch.nn.functional.linear(hidden, weight, bias).detach() * settings["logit_scale"]
    if settings["softcap"] is not None:
        logits = settings["softcap"] * (logits / settings["softcap"]).tanh()
    logits = logits / settings["temperature"]
    objective = (logps + 0.1 * entropies).sum()
    of_bias = {} if bias is None else {"grad_bias_of_lp+0.1ent": gradient(objective, bias)}
    return {
        **of_bias,
        "logps": logps,
        "entropy": entropies,
        "log_sum_sq_probs": collision_logprob_from_logits(logits),
        "mean_logits": logits.mean(-1),
        "is_top1": is_top1_from_logits(logits, targets),
        "grad_hidden_of_lp+0.1ent": gradient(objective, hidden),
        "grad_weight_of_lp+0.1ent": gradient(objective, weight),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "selective_log_softmax"): trl_selective(with_entropy=False),
    ("trl", "selective_log_softmax_and_entropy"): trl_selective(with_entropy=True),
    ("trl", "entropy_from_logits"): entropy(),
    ("trl", "CPOTrainer.get_batch_logps"): trl_batch_logps,
    ("trl", "ChunkedLogProbFunction.apply"): trl_chunked,
    ("verl", "entropy_from_logits"): entropy(),
    ("verl", "entropy_from_logits_with_chunking"): entropy(in_float32=True),
    ("verl", "compute_entropy_loss"): verl_entropy_loss,
    ("verl", "logprobs_from_logits"): of_labels,
    ("verl", "logprobs_from_logits_naive"): of_labels,
    ("verl", "logprobs_from_logits_v2"): of_labels,
    ("openrlhf", "compute_entropy"): entropy(),
    ("openrlhf", "log_probs_from_logits"): of_labels,
}
