"""Express the reductions of verl and OpenRLHF in our token weights, for policy and value losses.

Both add 1e-8 to the tokens of a sequence before the division, and verl to every count of a masked mean: `shrunk` and
`verl_mean` restore this.
"""

from __future__ import annotations

from torch import Tensor

from rlhf.objectives.aggregation import Aggregation, token_weights
from rlhf.objectives.masking import masked_sum, sequence_counts
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
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
    """n / (n + 1e-8) of each token's sequence."""
    counts = sequence_counts(layout.mask, layout.lengths).to(dtype_like.dtype)
    return layout.spread(counts / (counts + EPS))


def verl_mean(values: Tensor, mask: Tensor) -> Tensor:
    """verl's masked mean."""
    return masked_sum(values, mask) / (mask.sum().to(values.dtype) + EPS)


def weighted(
    losses: Tensor,
    layout: Layout,
    mode: Aggregation,
    *,
    num_tokens: float,
    num_sequences: float,
    max_new_tokens: float = 1.0,
) -> Tensor:
    """Loss of the terms [N] with our weights."""
    weights = token_weights(
        layout.mask,
        layout.lengths,
        mode=mode,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_new_tokens=max_new_tokens,
        dtype=losses.dtype,
    )
    return (losses * weights).sum()


def verl_aggregated(arguments: Arguments, losses: Tensor, layout: Layout, mode: str | None = None) -> Tensor:
    """Read verl's aggregation parameters; `mode` overrides the parameter, as in GSPO and SAPO."""
    named = arguments.param("loss_agg_mode", "token-mean") if mode is None else mode
    if mode is not None:
        arguments.ignore("loss_agg_mode")
    if named not in VERL_MODES:
        raise Unsupported(f"loss_agg_mode {named!r}")
    counts = sequence_counts(layout.mask, layout.lengths)
    num_tokens, num_sequences, horizon, ranks = _step_counts(arguments)
    if ranks > 1 and (num_tokens if named == "token-mean" else num_sequences) is None and named != "token-sum":
        raise Unsupported("several ranks without the counts of the whole batch")
    if named == "seq-mean-token-mean":
        losses = losses * shrunk(layout, losses)
    by_token = named in ("token-mean", "token-sum")
    loss = weighted(
        losses,
        layout,
        VERL_MODES[named],
        num_tokens=_or(num_tokens, float(layout.mask.sum())) if named == "token-mean" else 1.0,
        num_sequences=1.0 if by_token else _or(num_sequences, float((counts > 0).sum())),
        max_new_tokens=_or(horizon, layout.width),
    )
    return loss * ranks


def _step_counts(arguments: Arguments) -> tuple[float | None, float | None, float | None, float]:
    """Read verl's counts of the whole step: parameters of agg_loss, an object in the configuration of a loss."""
    nested = arguments.param("global_batch_info", {})
    names = ("batch_num_tokens", "global_batch_size", "loss_scale_factor", "dp_size")
    if not isinstance(nested, dict) or not nested.keys() <= set(names):
        raise Unsupported(f"global_batch_info {nested!r}")
    num_tokens, num_sequences, horizon, ranks = (arguments.optional(name, nested.get(name)) for name in names)
    return num_tokens, num_sequences, horizon, 1.0 if ranks is None else ranks


def openrlhf_aggregated(arguments: Arguments, losses: Tensor, layout: Layout, per_token: bool | None = None) -> Tensor:
    """Read OpenRLHF's aggregation parameters; `per_token` overrides the parameter, as in GSPO."""
    token_level = arguments.flag("token_level_loss", True)
    token_level = token_level if per_token is None else per_token
    counts = sequence_counts(layout.mask, layout.lengths)
    num_tokens = arguments.optional("batch_num_tokens")
    num_sequences = arguments.optional("global_batch_size")
    ranks = arguments.number("dp_size", 1)
    given = num_tokens if token_level else num_sequences
    if not token_level:
        losses = losses * shrunk(layout, losses)
    loss = weighted(
        losses,
        layout,
        "token_mean" if token_level else "sequence_mean_token_mean",
        num_tokens=_or(num_tokens, float(layout.mask.sum())) if token_level else 1.0,
        num_sequences=1.0 if token_level else _or(num_sequences, float((counts > 0).sum())),
    )
    return loss if given is None else loss * ranks


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def verl_agg_loss(arguments: Arguments) -> Outputs:
    """verl's reduction itself."""
    layout = Layout(arguments.mask("loss_mask"))
    losses = arguments.variable("loss_mat")
    loss = verl_aggregated(arguments, layout.flat(losses), layout)
    return {"loss": loss, "grad_loss_mat": gradient(loss, losses)}


def openrlhf_aggregate_loss(arguments: Arguments) -> Outputs:
    """OpenRLHF's reduction itself."""
    layout = Layout(arguments.mask("loss_mask"))
    losses = arguments.variable("loss")
    loss = openrlhf_aggregated(arguments, layout.flat(losses), layout)
    return {"loss": loss, "grad_loss": gradient(loss, losses)}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("verl", "agg_loss"): verl_agg_loss,
    ("openrlhf", "aggregate_loss"): openrlhf_aggregate_loss,
}
