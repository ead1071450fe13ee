"""The packed forward pass: B sequences in one row of N tokens, without padding, each seeing only itself.

Attention runs sequence by sequence (rlhf.models.packed.attention); the layers between see one row of N tokens. Models
unfit for packing compute the sequences of the row singly (rlhf.models.packed.row_layout).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf.models.packed.attention import ATTENTION
from rlhf.models.packed.branches import Branches, positions, predecessors
from rlhf.models.packed.images import (
    DRAWN,
    ImageReader,
    image_positions,
    image_reader,
    needs_tower,
    sampled_tokens,
    seen_row,
    token_types,
)
from rlhf.models.packed.packed_row import PackedRow, computing, keeps_row_order
from rlhf.models.packed.rope import refuse_beyond_trained_length
from rlhf.models.packed.row_layout import RowLayout, row_layout, rows_of
from rlhf.models.packed.sequence_parallel import current_group, filled_up, own_part, summed
from rlhf.models.packed.varlen import borders
from rlhf.objectives.distillation import Teacher, TeacherStates, TeacherTop, top_logprobs
from rlhf.objectives.logprobs import (
    chunked_logprobs,
    chunked_logprobs_and_collisions,
    chunked_logprobs_only,
    weighted_logprob_sum,
)
from rlhf.types import VocabularyHead


def hidden_states(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    branches: Branches | None = None,
    *,
    noise_alpha: float | None = None,
) -> Float[Tensor, "N H"]:
    """Return the last hidden state (after the final norm) of every token in a row of adjacent sequences.

    In a row shared by ranks only the tokens of this rank's `own_part` are returned. noise_alpha: NEFTune's
    scale of noise on the embeddings; None: no noise.
    """
    layout = row_layout(model)
    if branches is not None and layout < RowLayout.SHARED_PROMPTS:
        raise ValueError(f"the sequences of {type(model).__name__} cannot share prompts: each must hold its own")
    reader = image_reader(model)
    if reader is not None:
        if noise_alpha is not None or current_group() is not None:
            raise ValueError("a vision model takes neither NEFTune's noise nor rows shared by ranks")
        # the token of an empty micro-batch, which may be a part of an image
        token_ids = token_ids.masked_fill((token_ids < 0) & (lengths == 1).repeat_interleave(lengths), 0)
    token_ids, lengths, branches = filled_up(token_ids, lengths, branches)
    sizes: list[int] = lengths.tolist()
    rows = rows_of(model)
    if rows is not None and rows.trained_length is not None:
        longest = int(positions(sizes, branches, device=torch.device("cpu")).max()) + 1
        refuse_beyond_trained_length(model, rows.trained_length, longest)
    if layout is RowLayout.ONE_BY_ONE:
        states = [own_hidden_states(model, ids, noise_alpha=noise_alpha) for ids in token_ids.split(sizes)]
        return torch.cat(states)[own_part(len(token_ids))]
    if branches is not None or token_ids.is_cuda:
        return row_states(model, token_ids, sizes, branches, noise_alpha=noise_alpha)
    if sizes == sorted(sizes) or current_group() is not None or keeps_row_order():
        return row_states(model, token_ids, sizes, None, noise_alpha=noise_alpha)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)  # brings equal lengths together
    starts = (lengths.cumsum(0) - lengths).tolist()
    tokens = torch.cat([torch.arange(starts[i], starts[i] + sizes[i], device=token_ids.device) for i in order])
    by_length = [sizes[i] for i in order]
    hidden = row_states(model, token_ids[tokens], by_length, None, noise_alpha=noise_alpha)
    return hidden.index_select(0, tokens.argsort())


def own_hidden_states(
    model: nn.Module, token_ids: Int[Tensor, " n"], *, noise_alpha: float | None = None
) -> Float[Tensor, "n H"]:
    """Return the last hidden states of one sequence by transformers' own forward pass."""
    body, rows, reader = body_of(model), rows_of(model), image_reader(model)
    if rows is not None:
        _set_attention(body, rows.own_attention)
    if reader is None:
        given = _inputs(body, token_ids[None], [len(token_ids)], slice(None), noise_alpha)
        hidden: Tensor = body(**given, use_cache=False).last_hidden_state[0]
        return hidden
    longer = token_ids
    if needs_tower(model) and not bool((token_ids < 0).any()):
        longer = torch.cat([token_ids, token_ids.new_tensor(reader.expansion(max(DRAWN)))])  # unseen by the others
    row = seen_row(reader, longer)
    with sampled_tokens(body, row, reader.processing.image_token_id):
        outputs = body(input_ids=row.token_ids[None], **row.images, **token_types(body, row), use_cache=False)
    states: Tensor = outputs.last_hidden_state[0, : len(token_ids)]
    return states


def body_of(model: Any) -> Any:
    """Return the layers below a model's head."""
    body = model.base_model
    return model.model if body is model else body  # Llama 4's base_model is the model itself


def row_states(
    model: Any,
    token_ids: Int[Tensor, " N"],
    lengths: Sequence[int],
    tree: Branches | None,
    *,
    noise_alpha: float | None = None,
    moved: tuple[int, int] | None = None,
) -> Float[Tensor, "N H"]:
    """Return the last hidden states of one packed row, or of this rank's `own_part` of the row.

    Positions in the sequences follow from lengths and tree. moved: the index of one token, and another position.
    """
    body, reader = body_of(model), image_reader(model)
    _set_attention(body, ATTENTION)
    if reader is not None:
        return _seen_states(model, body, reader, token_ids, lengths, tree, moved)
    places = positions(lengths, tree, device=token_ids.device)
    if moved is not None:
        places[moved[0]] = moved[1]
    local = own_part(len(token_ids))
    given = _inputs(body, token_ids[None, local], lengths, local, noise_alpha)
    with computing(_packed_row(token_ids, lengths, tree)):
        outputs = body(**given, position_ids=places[None, local], use_cache=False)
    hidden: Tensor = outputs.last_hidden_state[0]
    return hidden


def _seen_states(
    model: nn.Module,
    body: Any,
    reader: ImageReader,
    token_ids: Int[Tensor, " N"],
    lengths: Sequence[int],
    tree: Branches | None,
    moved: tuple[int, int] | None,
) -> Float[Tensor, "N H"]:
    """Return the last hidden states of one packed row of a vision model."""
    num_tokens = len(token_ids)
    if needs_tower(model) and not bool((token_ids < 0).any()):
        drawn = reader.expansion(max(DRAWN))  # a further sequence, left out of the result
        token_ids, lengths = torch.cat([token_ids, token_ids.new_tensor(drawn)]), [*lengths, len(drawn)]
        tree = None if tree is None else [*tree, None]
    row = seen_row(reader, token_ids)
    places = image_positions(body, reader, row, token_ids, lengths, tree)
    if moved is not None:
        places[..., moved[0]] = moved[1]
    with computing(_packed_row(token_ids, lengths, tree)), sampled_tokens(body, row, reader.processing.image_token_id):
        outputs = body(input_ids=row.token_ids[None], **row.images, position_ids=places, use_cache=False)
    hidden: Tensor = outputs.last_hidden_state[0, :num_tokens]
    return hidden


def _packed_row(token_ids: Int[Tensor, " N"], lengths: Sequence[int], tree: Branches | None) -> PackedRow:
    on_gpu = borders(lengths, tree, device=token_ids.device) if token_ids.is_cuda else None
    return PackedRow(lengths=lengths, branches=tree, borders=on_gpu, group=current_group())


def _inputs(
    body: Any, token_ids: Int[Tensor, "1 n"], lengths: Sequence[int], local: slice, noise_alpha: float | None
) -> dict[str, Tensor]:
    """Return the model's inputs for a row: the token ids, or embeddings with NEFTune's noise (arXiv:2310.05914, eq. 1).

    The noise is uniform in +- noise_alpha / sqrt(L H), with L the length of the token's sequence.
    """
    if noise_alpha is None:
        return {"input_ids": token_ids}
    embedded = body.get_input_embeddings()(token_ids)
    sizes = torch.tensor(lengths, device=embedded.device)
    of_tokens = sizes.repeat_interleave(sizes)[local]
    bound = noise_alpha / (of_tokens * embedded.shape[-1]).to(embedded.dtype).sqrt()
    return {"inputs_embeds": embedded + torch.empty_like(embedded).uniform_(-1.0, 1.0) * bound[None, :, None]}


def policy_logprobs(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy_grad: bool = False,
    others: Int[Tensor, "N k"] | None = None,
) -> tuple[Float[Tensor, "N ..."], Float[Tensor, " N"]]:
    """Return (logprobs, entropy) of the tokens in mask given the tokens before them; 0 elsewhere.

    `temperature` is the sampling temperature, a number or one value for each token. The vocabulary head runs only
    where the next token is in mask. The entropy has a gradient only with entropy_grad. With `others`, k further tokens
    in place of each token, logprobs have 1 + k columns, the token's first.
    """
    of_rows = partial(chunked_logprobs, entropy_grad=entropy_grad)
    targets = None if others is None else torch.cat([token_ids[:, None], others.to(token_ids)], dim=1)
    logprobs, entropy = masked_columns(
        model,
        token_ids,
        lengths,
        mask=mask,
        branches=branches,
        temperature=temperature,
        of_rows=of_rows,
        targets=targets,
    )
    return logprobs, entropy


def policy_logprobs_only(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    temperature: float | Float[Tensor, " N"] = 1.0,
) -> Float[Tensor, " N"]:
    """Return the logprobs of `policy_logprobs` without computing the entropy, for references."""
    (logprobs,) = masked_columns(
        model, token_ids, lengths, mask=mask, branches=branches, temperature=temperature, of_rows=chunked_logprobs_only
    )
    return logprobs


def masked_columns(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    temperature: float | Float[Tensor, " N"] = 1.0,
    of_rows: Callable[..., Tensor | tuple[Tensor, ...]],
    targets: Int[Tensor, "N m"] | None = None,
) -> tuple[Float[Tensor, "N ..."], ...]:
    """Apply a function of rlhf.objectives.logprobs to the tokens in mask. Return each result as a whole column.

    `targets`: the tokens whose log-probabilities are wanted. None: the tokens themselves.
    """
    chosen, hidden = _states_before(model, token_ids, lengths, mask, branches)
    at = temperature[chosen] if isinstance(temperature, Tensor) else temperature
    wanted = (token_ids if targets is None else targets)[chosen]
    columns = of_rows(hidden, lm_head_weight(model), wanted, temperature=at, **lm_head_settings(model))
    columns = (columns,) if isinstance(columns, Tensor) else columns
    return tuple(_spread(values, chosen, len(token_ids)) for values in columns)


policy_logprobs_and_collisions = partial(masked_columns, of_rows=chunked_logprobs_and_collisions)  # for WPO


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
    """Return (sum of -token_weight * logprob over the tokens in mask, logprobs without gradient, top-1 hits).

    The columns are 0 and False outside mask. by_probability: each term times the token's probability, held constant
    (DFT). noise_alpha: NEFTune's alpha.
    """
    chosen, hidden = _states_before(model, token_ids, lengths, mask, None, noise_alpha=noise_alpha)
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


def weighted_cross_entropy(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    weights: Float[Tensor, " N"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """Return (sum of -weights * logprob over the tokens in mask, logprobs without gradient, 0 outside mask).

    For equal weights on some tokens and 0 on all others, the sum and its gradient have the bits of `supervised_loss`.
    """
    chosen, hidden = _states_before(model, token_ids, lengths, mask, None)
    counted = weights[chosen] != 0.0
    learnt, others = chosen[counted], chosen[~counted]
    head, settings = lm_head_weight(model), lm_head_settings(model)
    of_learnt = -weights[learnt]
    loss, logprobs, _ = weighted_logprob_sum(hidden[counted], head, token_ids[learnt], of_learnt, **settings)
    with torch.no_grad():
        rest = chunked_logprobs_only(hidden[~counted], head, token_ids[others], **settings)
    both = torch.cat([logprobs, rest])
    return summed(loss), _spread(both, torch.cat([learnt, others]), len(token_ids))


def learnt_states(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
) -> Float[Tensor, "n H"]:
    """Return the last hidden states predicting the tokens in mask, in token order. Each rank of a row gets all."""
    chosen, hidden = _states_before(model, token_ids, lengths, mask, branches)
    if current_group() is None:
        return hidden
    whole = hidden.new_zeros(int(mask.sum()), hidden.shape[1])
    return summed(whole.index_copy(0, mask.cumsum(0)[chosen] - 1, hidden))


def state_logprobs(
    model: nn.Module, hidden: Float[Tensor, "n H"], token_ids: Int[Tensor, " n"], *, temperature: float
) -> Float[Tensor, " n"]:
    """Return the log-probability of the token predicted by each state."""
    options = {"temperature": temperature, **lm_head_settings(model)}
    return chunked_logprobs_only(hidden, lm_head_weight(model), token_ids, **options)


def vocabulary_head(model: Any) -> VocabularyHead:
    """Return a copy of the model's head, to use after the weights have changed. The head must be whole."""
    settings = lm_head_settings(model)
    bias = settings.pop("bias")
    bias = None if bias is None else bias.detach().clone()
    return VocabularyHead(weight=lm_head_weight(model).detach().clone(), bias=bias, **settings)


def learnt_top(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    k: int,
    temperature: float,
    vocabulary: int,
) -> TeacherTop:
    """Return the k largest log-probabilities of the predictions of the tokens in mask, in token order.

    The distributions cover the first `vocabulary` rows of the head.
    """
    chosen, hidden = _states_before(model, token_ids, lengths, mask, branches)
    weight, settings = lm_head_weight(model)[:vocabulary], lm_head_settings(model)
    settings["bias"] = settings["bias"] if settings["bias"] is None else settings["bias"][:vocabulary]
    return top_logprobs(hidden, weight, token_ids[chosen], k=k, temperature=temperature, **settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """A teacher's predictions of some of a row's tokens in mask."""

    places: Int[Tensor, " n"]  # of these tokens among the tokens in mask, ascending
    teacher: Teacher  # a row for each place
    weight: float = 1.0  # of the divergence


def distillation_loss(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    *,
    mask: Bool[Tensor, " N"],
    branches: Branches | None = None,
    taught: Sequence[Taught],
    divergence_sum: Callable[..., tuple[Tensor, ...]],
    temperature: float,
    token_weight: float,
) -> tuple[Tensor, ...]:
    """Apply a divergence sum of rlhf.objectives.distillation to the tokens in mask: return the loss and whole columns.

    The columns have no gradient and are 0 outside mask. `taught` has one teacher for each token in mask. If a head has
    extra rows without tokens, the distributions of student and teacher use the common rows.
    """
    chosen, hidden = _states_before(model, token_ids, lengths, mask, branches)
    weight, settings = lm_head_weight(model), lm_head_settings(model)
    places = mask.cumsum(0)[chosen] - 1  # positions among all tokens in mask; this rank may hold only some of them

    def part(one: Taught) -> tuple[Tensor, ...]:
        own = torch.full_like(mask, -1, dtype=torch.int64)  # by place, the row of the teacher
        own[one.places] = torch.arange(len(one.places), device=mask.device)
        rows = own[places]
        at = (rows >= 0).nonzero()[:, 0]
        is_whole = len(at) == len(places)
        count = min(len(weight), len(one.teacher.weight)) if isinstance(one.teacher, TeacherStates) else len(weight)

        def common(rows: Tensor) -> Tensor:
            return rows if len(rows) == count else rows[:count]  # a slice would have a gradient of the same size

        loss, *columns = divergence_sum(
            hidden if is_whole else hidden.index_select(0, at),
            common(weight),
            token_ids[chosen[at]],
            one.teacher.rows(rows[at], count=count),
            token_weight=token_weight,
            divergence_weight=one.weight,
            temperature=temperature,
            **settings | {"bias": settings["bias"] if settings["bias"] is None else common(settings["bias"])},
        )
        return loss, *(_spread(column.float(), chosen[at], len(token_ids)) for column in columns)

    nothing = Taught(places=places[:0], teacher=TeacherTop.of_no_rows(device=mask.device))
    loss, *columns = (sum(values) for values in zip(*(part(one) for one in taught or [nothing]), strict=True))
    return summed(loss), *columns


def lm_head_weight(model: Any) -> Float[Tensor, "V H"]:
    """Return the weight of the vocabulary head (the embedding itself if tied)."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def lm_head_settings(model: Any) -> dict[str, Any]:
    """Return the steps between the head's product and the logits: bias, logit scale and softcap, from the config."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return {
        "bias": model.get_output_embeddings().bias,
        "softcap": softcap,  # Gemma
        "logit_scale": scale / (getattr(config, "logits_scaling", None) or 1.0),  # Granite
    }


def _states_before(
    model: nn.Module,
    token_ids: Int[Tensor, " N"],
    lengths: Int[Tensor, " B"],
    mask: Bool[Tensor, " N"],
    branches: Branches | None,
    *,
    noise_alpha: float | None = None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n H"]]:
    """Return (tokens in mask, the last hidden states that predict these tokens), for predecessors on this rank.

    Raise ValueError if mask holds a sequence's first token.
    """
    before = predecessors(lengths, branches)
    if bool(mask[before < 0].any()):
        raise ValueError("mask is True on the first token of a sequence: nothing before it predicts it")
    local = own_part(len(mask))
    chosen = (mask & (before >= local.start) & (before < local.stop)).nonzero()[:, 0]
    hidden = hidden_states(model, token_ids, lengths, branches, noise_alpha=noise_alpha)
    return chosen, hidden.index_select(0, before[chosen] - local.start)


def _spread(values: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return the whole column, 0 elsewhere. For a row shared by ranks, the results of all ranks are summed."""
    return summed(values.new_zeros(size, *values.shape[1:]).index_copy(0, positions, values))


def attention_of(body: Any) -> str:
    """Return the name of the attention function of the language model's layers."""
    name: str = body.config.get_text_config()._attn_implementation
    return name


def _set_attention(body: Any, name: str) -> None:
    """Set the attention function of the language model. The attention of a vision tower stays."""
    if attention_of(body) != name:
        sees = getattr(body.config, "vision_config", None) is not None
        body.set_attn_implementation({"text_config": name} if sees else name)
