"""Express the reductions of verl and OpenRLHF in our token weights, for policy and value losses.

Both add 1e-8 to the tokens of a sequence before the division, and verl to every count of a masked mean: `shrunk` and
`verl_mean` restore this.
"""

from __future__ import annotations

from torch import Tensor

from rlhf.objectives.aggregation import Aggregation, token_weights
from rlhf.objectives.masking import masked_sum
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, gradient

EPS = 1e-8
VERL_MODES: dict[str, Aggregation] = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-mean": "sequence_mean_token_mean",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-sum-norm": "token_sum_norm",
}


def shrunk(layout: Layout, dtype_like: Tensor) -> Tensor:
    """Return n / (n + 1e-8) of each token's sequence, where n is the number of tokens."""
    counts = layout.counts.to(dtype_like.dtype)
    return layout.spread(counts / (counts + EPS))


def verl_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return verl's masked mean of the values."""
    return masked_sum(values, mask) / (mask.sum().to(values.dtype) + EPS)


def weighted(
    losses: Tensor,
    layout: Layout,
    mode: Aggregation,
    num_tokens: float,
    num_sequences: float = 1.0,
    horizon: float = 1.0,
) -> Tensor:
    """Return the loss of the terms [N] with our weights."""
    counts = {"num_tokens": num_tokens, "num_sequences": num_sequences, "max_new_tokens": horizon}
    return (losses * token_weights(layout.mask, layout.lengths, mode=mode, dtype=losses.dtype, **counts)).sum()


def verl_aggregated(arguments: Arguments, losses: Tensor, layout: Layout, mode: str | None = None) -> Tensor:
    """Read verl's aggregation parameters; `mode` overrides the parameter, as in GSPO and SAPO."""
    named = arguments.param("loss_agg_mode", "token-mean")
    named = mode or named
    names = ("batch_num_tokens", "global_batch_size", "loss_scale_factor", "dp_size")
    num_tokens, num_sequences, horizon, ranks = map(arguments.optional, names)
    if named == "seq-mean-token-mean":
        losses = losses * shrunk(layout, losses)
    tokens = 1.0 if named == "token-sum" else num_tokens or float(layout.mask.sum())
    sequences = num_sequences or float((layout.counts > 0).sum())
    return weighted(losses, layout, VERL_MODES[named], tokens, sequences, horizon or layout.width) * (ranks or 1.0)


def openrlhf_aggregated(arguments: Arguments, losses: Tensor, layout: Layout, *, by_sequence: bool = False) -> Tensor:
    """Read OpenRLHF's aggregation parameters; `by_sequence` overrides the parameter, as in GSPO."""
    by_sequence = not arguments.param("token_level_loss", True) or by_sequence
    num_tokens, num_sequences = arguments.optional("batch_num_tokens"), arguments.optional("global_batch_size")
    ranks = arguments.number("dp_size", 1)
    if by_sequence:
        losses = losses * shrunk(layout, losses)
    mode: Aggregation = "sequence_mean_token_mean" if by_sequence else "token_mean"
    tokens, sequences = num_tokens or float(layout.mask.sum()), num_sequences or float((layout.counts > 0).sum())
    loss = weighted(losses, layout, mode, tokens, sequences)
    return loss if (num_sequences if by_sequence else num_tokens) is None else loss * ranks


def reduction(aggregated: object, name: str) -> Adapter:
    """Return the adapter of a library's reduction itself."""

    def adapter(arguments: Arguments) -> Outputs:
        layout, losses = Layout(arguments.mask("loss_mask")), arguments.variable(name)
        loss = aggregated(arguments, layout.flat(losses), layout)  # type: ignore[operator]
        return {"loss": loss, f"grad_{name}": gradient(loss, losses)}

    return adapter


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "agg_loss"): reduction(verl_aggregated, "loss_mat"),
    ("openrlhf", "aggregate_loss"): reduction(openrlhf_aggregated, "loss"),
}
