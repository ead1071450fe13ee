"""Check a loaded model's forward pass: find a layout of sequences with the model's own hidden states.

Called once wherever a model is loaded. A few short random sequences are compared with transformers' own pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.packed.branches import Branch, Branches
from rlhf.models.packed.by_sequence import mixers_of, separate_sequences
from rlhf.models.packed.forward import (
    attention_of,
    body_of,
    hidden_states,
    own_hidden_states,
    policy_logprobs_only,
    row_states,
)
from rlhf.models.packed.images import DRAWN, image_reader
from rlhf.models.packed.rope import trained_length
from rlhf.models.packed.row_layout import RowLayout, Rows, expected_layout, rows_of, set_rows
from rlhf.models.packed.sequence_parallel import current_group, filled_up, whole_row
from rlhf.models.support import untested_model

LENGTHS = (7, 4, 9)
PROMPT = 3  # tokens shared by the first two sequences
_MOST_TOKENS = 256  # tokens from the start of the vocabulary; special tokens mostly come later

# Largest relative error of a token's hidden state due to rounding. A wrong layout is off by a multiple of it.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}

# Errors raised by a model's code if it cannot take a packed row.
_MODEL_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_log = logging.getLogger(__name__)


@torch.no_grad()
def check_rows(model: Any, device: torch.device) -> RowLayout:
    """Find the layout with correct results for a model's sequences, and use this layout from now on.

    Raise UserError if the model's own pass fails or is random, or if ranks share rows of a model unfit for packing.
    Ranks with shards of the weights or shared rows call this together.
    """
    known = rows_of(model)
    own_attention = attention_of(body_of(model)) if known is None else known.own_attention
    set_rows(model, Rows(layout=RowLayout.ONE_BY_ONE, own_attention=own_attention))
    tokens = _some_tokens(model, device)
    own_states = _own_states(model, tokens)
    _refuse_other_head(model, [ids for ids in tokens if not bool((ids < 0).any())])
    config = model.config.to_dict()
    if (sentence := untested_model(config)) is not None:
        _log.warning("%s: %s", type(model).__name__, sentence)
    layout, reason = expected_layout(config)
    if mixers := mixers_of(model):
        separate_sequences(model)
        if current_group() is not None:
            layout, reason = RowLayout.ONE_BY_ONE, f"its layers of {type(mixers[0]).__name__} need whole sequences"
    if layout >= RowLayout.PACKED:
        set_rows(model, Rows(layout=layout, own_attention=own_attention))
        layout, reason = _measured(model, tokens, own_states, layout, reason)
    if layout is RowLayout.ONE_BY_ONE and current_group() is not None:
        raise UserError(
            f"sequence_parallel needs a model whose sequences can be packed into one row, and {reason}. Set "
            "sequence_parallel to 1, or use another model."
        )
    set_rows(model, Rows(layout=layout, own_attention=own_attention, trained_length=trained_length(model)))
    if layout < RowLayout.SHARED_PROMPTS:
        how = "sequences are packed, and each repeats its prompt" if layout else "sequences are computed one by one"
        _log.warning("%s: %s, because %s. This is slower.", type(model).__name__, how, reason)
    return layout


def _own_states(model: Any, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states of each sequence. Raise UserError if the model fails."""
    try:
        own_states = [own_hidden_states(model, ids) for ids in tokens]
    except _MODEL_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"The forward pass of the model {model.config._name_or_path} fails in {model.dtype} "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Use another model or dtype."
        ) from error
    if not all(bool(states.isfinite().all()) for states in own_states):
        raise UserError(
            f"The hidden states of the model {model.config._name_or_path} are not finite: its weights hold NaN or "
            "infinite values, or its values are too large for its dtype. Download or copy the model again, or use "
            "another dtype."
        )
    if _error(own_hidden_states(model, tokens[0]), own_states[0]) > _tolerance(model):
        raise UserError(
            f"The forward pass of the model {model.config._name_or_path} is random: two passes over the same tokens "
            "give different results. Set its dropout and noise to 0 in config.json, or use another model."
        )
    return own_states


def _measured(
    model: Any, tokens: Sequence[Tensor], own_states: Sequence[Tensor], layout: RowLayout, reason: str
) -> tuple[RowLayout, str]:
    """Return the layout with the model's own hidden states, at most the expected one, and the reason."""
    tolerance = _tolerance(model)
    if failure := _failure(tolerance, own_states, lambda: _states(model, tokens, None)):
        return RowLayout.ONE_BY_ONE, f"its packed pass {failure}"
    if failure := _failure(tolerance, own_states, lambda: _states_beside_last_position(model, tokens)):
        return RowLayout.ONE_BY_ONE, f"its packed pass beside a token at the last position {failure}"
    if layout is RowLayout.PACKED:
        return layout, reason
    shared = PROMPT if len(tokens) == len(LENGTHS) else len(tokens[0]) - LENGTHS[0] + PROMPT  # an image is shared too
    branched = [part[shared:] if index == 1 else part for index, part in enumerate(tokens)]
    branches = [Branch(of=0, length=shared) if index == 1 else None for index in range(len(tokens))]
    branched_states = [own_states[0], own_states[1][shared:], *own_states[2:]]
    if failure := _failure(tolerance, branched_states, lambda: _states(model, branched, branches)):
        return RowLayout.PACKED, f"its pass over a shared prompt {failure}"
    return layout, reason


def _failure(tolerance: float, own_states: Sequence[Tensor], compute: Callable[[], Tensor]) -> str:
    """Describe how a pass fails to give the model's own hidden states. Empty: no failure."""
    try:
        states = compute()
    except _MODEL_ERRORS as failure:
        if isinstance(failure, torch.OutOfMemoryError):
            raise
        return f"fails ({type(failure).__name__}: {' '.join(str(failure).split())})"
    error = _error(states, torch.cat(list(own_states)))
    return "" if error <= tolerance else f"differs from its own forward pass by {error:.1%} of a hidden state"


def _error(states: Float[Tensor, "n H"], expected: Float[Tensor, "n H"]) -> float:
    """Return the largest relative error of a token's hidden state."""
    wanted = expected.float()
    return float(((states.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)).max())


def _states(model: Any, tokens: Sequence[Tensor], branches: Branches | None) -> Float[Tensor, "N H"]:
    """Return the hidden states of a packed row, on every rank sharing it."""
    row = torch.cat(list(tokens))
    lengths = torch.tensor([*map(len, tokens)], device=row.device)
    return whole_row(hidden_states(model, row, lengths, branches), len(row))


def _states_beside_last_position(model: Any, tokens: Sequence[Tensor]) -> Float[Tensor, "N H"]:
    """Return the hidden states of a packed row with an additional token at the model's last position.

    Position embeddings that depend on the longest sequence of a row show here, without a sequence of that length.
    """
    sizes = [*map(len, tokens), 1]
    row, lengths, _ = filled_up(torch.cat([*tokens, tokens[0][:1]]), torch.tensor(sizes), None)
    last = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # BLOOM has none
    moved = sum(sizes) - 1, (last or len(row)) - 1
    states = row_states(model, row, lengths.tolist(), None, moved=moved)
    return whole_row(states, len(row))[: sum(sizes) - 1]


def _refuse_other_head(model: Any, tokens: Sequence[Int[Tensor, " n"]]) -> None:
    """Raise UserError if log-probabilities from the head's weight and the config differ from the model's logits."""
    if hasattr(model, "score"):
        return  # the head is a single linear layer, applied unchanged
    from_head, from_logits = [], []
    for ids in tokens:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0] = False
        from_head.append(policy_logprobs_only(model, ids, torch.tensor([len(ids)], device=ids.device), mask=mask)[1:])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        from_logits.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    expected = torch.cat(from_logits)
    error = (torch.cat(from_head).float() - expected).abs().mean()
    spread = (expected - expected.mean()).abs().mean()
    if not error <= _tolerance(model) * spread.clamp(min=1e-3):
        raise UserError(
            f"{type(model).__name__} computes its logits in a way that this program does not know: log-probabilities "
            f"of the model {model.config._name_or_path} would be off by {float(error):.2g} on average. Use another "
            "model."
        )


def _some_tokens(model: Any, device: torch.device) -> list[Int[Tensor, " n"]]:
    """Return random sequences. The first two begin with the same tokens. The global random state stays.

    A vision model gets sequences with images first: one image that the first two share, then two images.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.get_text_config().vocab_size, _MOST_TOKENS)
    first, second, *rest = (torch.randint(vocabulary, (n,), generator=generator) for n in LENGTHS)
    second[:PROMPT] = first[:PROMPT]
    tokens = [first, second, *rest]
    if (reader := image_reader(model)) is not None:
        one, other = (torch.tensor(reader.expansion(key)) for key in DRAWN)
        seeing = [torch.cat([ids[:PROMPT], one, ids[PROMPT:]]) for ids in tokens[:2]]
        tokens = [*seeing, torch.cat([other, rest[0], one]), *tokens]
    return [ids.to(device) for ids in tokens]


def _tolerance(model: Any) -> float:
    return TOLERANCE[model.dtype]
