"""The packed forward pass: B sequences in one row of N tokens, without padding, each seeing only itself.

Called by every worker that holds a model. Attention runs sequence by sequence: on a GPU all of them in one call of
flash attention (rlhf.models.varlen), elsewhere one after the other through PyTorch's scaled_dot_product_attention. The
layers between see one row of N tokens. Positions restart at every sequence. Nothing here computes a loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.errors import UserError
from rlhf.models.branches import Branches, positions, predecessors
from rlhf.models.sequence_parallel import ULYSSES, current_group, filled_up, own_part, summed
from rlhf.models.varlen import Borders, borders, obstacle, varlen_attention
from rlhf.objectives.distillation import Divergence, TeacherStates, weighted_divergence_sum
from rlhf.objectives.logprobs import (
    chunked_logprobs,
    chunked_logprobs_and_collisions,
    chunked_logprobs_only,
    weighted_logprob_sum,
)
from rlhf.objectives.products import widens_products
from rlhf.types import VocabularyHead

ATTENTION = "rlhf_packed"  # its name among transformers' attention functions

_log = logging.getLogger(__name__)


def hidden_states(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    branches: Branches | None = None,
    *,
    noise_alpha: float | None = None,
) -> Float[Tensor, "N H"]:
    """Last hidden state (after the final norm) of every token, in a row where sequences stand side by side.

    Of a row that ranks share, those of this rank's `own_part`. noise_alpha: of `embedding_noise`; None: none.
    """
    body: Any = model.base_model
    token_ids, lengths, branches = filled_up(token_ids, lengths, branches)
    sizes: list[int] = lengths.tolist()
    if branches is not None or token_ids.is_cuda:
        return _run(body, token_ids, sizes, branches, noise_alpha)
    if sizes == sorted(sizes) or current_group() is not None:
        return _run(body, token_ids, sizes, None, noise_alpha)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)  # brings equal lengths together
    starts = (lengths.cumsum(0) - lengths).tolist()
    tokens = torch.cat([torch.arange(starts[i], starts[i] + sizes[i], device=token_ids.device) for i in order])
    by_length = [sizes[i] for i in order]
    hidden = _run(body, token_ids[tokens], by_length, None, noise_alpha)
    return hidden.index_select(0, tokens.argsort())


def _run(
    body: Any, token_ids: Tensor, lengths: Sequence[int], tree: Branches | None, noise_alpha: float | None
) -> Float[Tensor, "N H"]:
    group = current_group()
    _set_attention(body, ATTENTION if group is None else ULYSSES)
    places = positions(lengths, tree, device=token_ids.device)
    attention: dict[str, Any] = {"sequence_lengths": lengths, "branches": tree}
    if token_ids.is_cuda:
        attention["borders"] = borders(lengths, tree, device=token_ids.device)
    if group is not None:
        attention |= {"within": ATTENTION, "group": group}
    own = own_part(len(token_ids))
    given: dict[str, Tensor] = {"input_ids": token_ids[None, own]}
    if noise_alpha is not None:
        embedded = body.get_input_embeddings()(token_ids[None, own])
        sizes = torch.tensor(lengths, device=embedded.device)
        of_tokens = sizes.repeat_interleave(sizes)[own]
        given = {"inputs_embeds": embedded + embedding_noise(embedded, of_tokens, alpha=noise_alpha)}
    outputs = body(**given, position_ids=places[None, own], use_cache=False, **attention)
    hidden: Tensor = outputs.last_hidden_state[0]
    return hidden


def embedding_noise(
    embedded: Float[Tensor, "1 N H"], lengths: Int[Tensor, " N"], *, alpha: float
) -> Float[Tensor, "1 N H"]:
    """Uniform in +- alpha / sqrt(L H), with L the length of the token's sequence (NEFTune, arXiv:2310.05914, eq. 1)."""
    bound = alpha / (lengths * embedded.shape[-1]).to(embedded.dtype).sqrt()
    return torch.empty_like(embedded).uniform_(-1.0, 1.0) * bound[None, :, None]


def policy_logprobs(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(logprobs, entropy) of the tokens in mask given those before them, at that sampling temperature; 0 elsewhere.

    The vocabulary head runs only where the next token is in mask. The entropy has a gradient only with entropy_grad.
    """
    chosen, before = _masked_positions(mask, lengths, branches)
    hidden = hidden_states(model, token_ids, lengths, branches)
    logprobs, entropy = chunked_logprobs(
        hidden.index_select(0, before),
        lm_head_weight(model),
        token_ids[chosen],
        temperature=temperature,
        entropy_grad=entropy_grad,
        **lm_head_settings(model),
    )
    return _spread(logprobs, chosen, len(token_ids)), _spread(entropy, chosen, len(token_ids))


def policy_logprobs_only(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """`policy_logprobs` without the work of the entropy: for references."""
    chosen, before = _masked_positions(mask, lengths, branches)
    hidden = hidden_states(model, token_ids, lengths, branches)
    logprobs = chunked_logprobs_only(
        hidden.index_select(0, before),
        lm_head_weight(model),
        token_ids[chosen],
        temperature=temperature,
        **lm_head_settings(model),
    )
    return _spread(logprobs, chosen, len(token_ids))


def policy_logprobs_and_collisions(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(logprobs, log-probabilities that two draws in their places agree, without gradient), for on_policy_weights."""
    chosen, before = _masked_positions(mask, lengths, branches)
    hidden = hidden_states(model, token_ids, lengths, branches)
    logprobs, collisions = chunked_logprobs_and_collisions(
        hidden.index_select(0, before),
        lm_head_weight(model),
        token_ids[chosen],
        temperature=temperature,
        **lm_head_settings(model),
    )
    return _spread(logprobs, chosen, len(token_ids)), _spread(collisions, chosen, len(token_ids))


def supervised_loss(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    token_weight: float,
    by_probability: bool = False,
    noise_alpha: float | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """(sum of -token_weight * logprob over the tokens in mask, the logprobs without gradient, whether the likeliest).

    The columns are 0 and False outside mask. The head is applied once, not twice as by `policy_logprobs`.
    by_probability: each term times its token's probability, held constant (DFT). noise_alpha: NEFTune's.
    """
    chosen, before = _masked_positions(mask, lengths)
    hidden = hidden_states(model, token_ids, lengths, noise_alpha=noise_alpha).index_select(0, before)
    weights = torch.full_like(chosen, -token_weight, dtype=torch.float32)
    loss, logprobs, is_top1 = weighted_logprob_sum(
        hidden,
        lm_head_weight(model),
        token_ids[chosen],
        weights,
        by_probability=by_probability,
        **lm_head_settings(model),
    )
    likeliest = _spread(is_top1.to(torch.uint8), chosen, len(token_ids)).bool()
    return summed(loss), _spread(logprobs, chosen, len(token_ids)), likeliest


def learnt_states(
    model: nn.Module, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], *, mask: Bool[Tensor, " N"]
) -> Float[Tensor, "n H"]:
    """The last hidden states in which the tokens in mask are predicted, in the tokens' order."""
    _, before = _masked_positions(mask, lengths)
    return hidden_states(model, token_ids, lengths).index_select(0, before)


def distillation_loss(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    teacher: Float[Tensor, "n K"],
    head: VocabularyHead,
    divergence: Divergence,
    temperature: float,
    token_weight: float,
    sft_coef: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """(sum of token_weight * (divergence - sft_coef * logprob) over the tokens in mask, the divergences, the logprobs,
    whether the likeliest). The columns have no gradient and are 0 outside mask, the logprobs are at temperature 1.

    `teacher`: its `learnt_states` of the same row, `head`: its own. Where one of the heads has rows beyond the other's,
    which stand for no token, both distributions are over the rows that they share.
    """
    chosen, before = _masked_positions(mask, lengths)
    hidden = hidden_states(model, token_ids, lengths).index_select(0, before)
    weight, settings = lm_head_weight(model), lm_head_settings(model)
    shared = partial(_first, count=min(len(weight), len(head.weight)))
    places = mask.cumsum(0)[chosen] - 1  # among all in mask, of which this rank may hold a part
    loss, *columns = weighted_divergence_sum(
        divergence,
        hidden,
        shared(weight),
        token_ids[chosen],
        TeacherStates(
            hidden=teacher[places],
            weight=shared(head.weight),
            bias=head.bias if head.bias is None else shared(head.bias),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        ),
        token_weight=token_weight,
        sft_coef=sft_coef,
        temperature=temperature,
        **settings | {"bias": settings["bias"] if settings["bias"] is None else shared(settings["bias"])},
    )
    divergences, logprobs, is_top1 = (_spread(column.float(), chosen, len(token_ids)) for column in columns)
    return summed(loss), divergences, logprobs, is_top1.bool()


def _first(rows: Tensor, *, count: int) -> Tensor:
    """Itself where nothing is cut: a slice would have a gradient of its own, as large."""
    return rows if len(rows) == count else rows[:count]


def lm_head_weight(model: Any) -> Float[Tensor, "V H"]:
    """The weight of the vocabulary head (the embedding itself where they are tied)."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def lm_head_settings(model: Any) -> dict[str, Any]:
    """What stands between the head's product and the logits: bias, logit scale and softcap, from the model's config."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    return {
        "bias": model.get_output_embeddings().bias,
        "softcap": getattr(config, "final_logit_softcapping", None),  # Gemma
        "logit_scale": scale / (getattr(config, "logits_scaling", None) or 1.0),  # Granite
    }


def _masked_positions(mask: Tensor, lengths: Tensor, branches: Branches | None = None) -> tuple[Tensor, Tensor]:
    """(tokens in mask, the tokens before them) of which this rank holds the latter, counted from its part's first.

    ValueError if mask holds a sequence's first token.
    """
    before = predecessors(lengths, branches)
    if bool(mask[before < 0].any()):
        raise ValueError("mask is True on the first token of a sequence: nothing before it predicts it")
    own = own_part(len(mask))
    mask = mask & (before >= own.start) & (before < own.stop)
    chosen = mask.nonzero()[:, 0]
    return chosen, before[chosen] - own.start


def _spread(values: Tensor, positions: Tensor, size: int) -> Tensor:
    """The whole column, 0 elsewhere; of a row that ranks share, with what they have found."""
    return summed(values.new_zeros(size).index_copy(0, positions, values))


def _set_attention(body: Any, name: str) -> None:
    if body.config._attn_implementation != name:
        body.set_attn_implementation(name)


@cache
def _say_slow(why: str) -> None:
    _log.warning("attention runs one sequence at a time, which is slower on a GPU: %s", why)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Q N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    attention_mask: None,
    *,
    sequence_lengths: Sequence[int],
    branches: Branches | None = None,
    borders: Borders | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 N Q D"], None]:
    """Causal attention inside each sequence, as transformers calls it.

    With borders (on a GPU) in one kernel call, where that kernel knows the model's attention; else neighbours of equal
    length share one. Grouped heads, sliding windows and capped logits (Gemma 2) are handled, learnt sinks and position
    biases refused.
    """
    if s_aux is not None or position_bias is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks or a position bias, which the attention of packed sequences "
            "does not know. Use another model."
        )
    if borders is not None:
        why = obstacle(query, softcap=softcap, dropout=dropout)
        if why is None:
            return varlen_attention(query, key, value, borders, window=sliding_window, scale=scaling), None
        _say_slow(why)
    dtype = query.dtype
    if widens_products(query):
        query, key, value = query.float(), key.float(), value.float()
    attend = partial(_attention, window=sliding_window, scale=scaling, softcap=softcap, dropout=dropout)
    if branches is None:
        parts = _by_sequence(query, key, value, sequence_lengths, attend)
    else:
        parts = _by_branch(query, key, value, sequence_lengths, branches, attend)
    return torch.cat(list(parts))[None].to(dtype), None


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], attend: Callable[..., Tensor]
) -> Iterator[Float[Tensor, "n Q D"]]:
    """Each run of neighbours of equal length in one kernel call."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = (x[0].split(sizes, 1) for x in (query, key, value))  # one backward for all parts
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        yield attend(q, k, v).transpose(1, 2).flatten(0, 1)


def _by_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    branches: Branches,
    attend: Callable[..., Tensor],
) -> Iterator[Float[Tensor, "n Q D"]]:
    """Each sequence against itself and, if it is a branch, the part of its trunk that it continues."""
    queries, keys, values = (x.split(list(lengths), 2) for x in (query, key, value))  # one backward for all parts
    for q, k, v, branch in zip(queries, keys, values, branches, strict=True):
        if branch is not None:
            k = torch.cat([keys[branch.of][:, :, : branch.length], k], 2)
            v = torch.cat([values[branch.of][:, :, : branch.length], v], 2)
        yield attend(q, k, v).transpose(1, 2)[0]


def _attention(
    q: Float[Tensor, "b Q n D"],
    k: Float[Tensor, "b K m D"],
    v: Float[Tensor, "b K m D"],
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Float[Tensor, "b Q n D"]:
    """Causal attention of the last n of m tokens. softcap: logits become softcap * tanh(logits / softcap) (Gemma 2)."""
    seen, asking = k.shape[2], q.shape[2]
    is_plain = softcap is None and seen == asking and (window is None or seen <= window)
    allowed = None if is_plain else _causal(seen, window=window or seen, device=q.device)[seen - asking :]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=is_plain, scale=scale, dropout_p=dropout, enable_gqa=True
        )
    assert allowed is not None
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    capped = softcap * torch.tanh(logits.float() / softcap)
    return capped.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype) @ v


def _causal(length: int, *, window: int, device: torch.device) -> Bool[Tensor, "n n"]:
    """True where a token (row) sees another (column): itself and the window - 1 before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
