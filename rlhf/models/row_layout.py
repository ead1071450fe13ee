"""How a model computes the sequences of a micro-batch: in one packed row, or one by one.

A packed row is right only for models with transformers' attention functions. Other layers (short convolutions, linear
attention, state-space models, biases by position) run over the row as one sequence. `rlhf.models.row_check` measures
the right layout for a loaded model; this module holds the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rlhf.errors import UserError

_ATTRIBUTE = "rlhf_rows"  # attribute of a loaded model


class RowLayout(IntEnum):
    """Each layout assumes more of the model than the layout before it."""

    ONE_BY_ONE = 0  # every sequence is a forward pass
    PACKED = 1  # sequences stand in one row, each with a separate prompt
    SHARED_PROMPTS = 2  # sequences stand in one row, and responses share the tokens of their prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Result of the check of a loaded model."""

    layout: RowLayout
    own_attention: str  # name of the attention function set when the model was loaded


def set_rows(model: Any, rows: Rows) -> None:
    """Compute the model's sequences in this layout from now on."""
    setattr(model, _ATTRIBUTE, rows)


def rows_of(model: Any) -> Rows | None:
    """Return the value stored by `set_rows`. None: the model was not checked."""
    rows: Rows | None = vars(model).get(_ATTRIBUTE)
    return rows


def row_layout(model: Any) -> RowLayout:
    """Return the layout of a model. An unchecked model is packed, and its prompts are shared."""
    rows = rows_of(model)
    return RowLayout.SHARED_PROMPTS if rows is None else rows.layout


_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention", "sparse", "dense"})  # the last two are kinds of MLPs
_ALIBI = "adds a bias by position to its attention"
_BORDERS = "does not pass the borders of sequences to its attention"
_OWN_ATTENTION = "does not use transformers' attention functions"
_RECURRENT = "has recurrent layers"
_SINKS = "has attention sinks or a position bias"
_SPARSE = "chooses by itself which tokens a token sees"
_ONE_BY_ONE = {
    "bloom": _ALIBI,
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SINKS,
    "doge": _SPARSE,
    "falcon_mamba": _RECURRENT,
    "glm_moe_dsa": _SPARSE,
    "gpt_oss": _SINKS,
    "granite_swa": _SINKS,
    "granitemoe_swa": _SINKS,
    "hy_v4": _OWN_ATTENTION,
    "inkling_text": _SINKS,
    "llama4_text": "has chunked attention",
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "mimo_v2_flash": _SINKS,
    "mpt": _ALIBI,
    "nemotron": _BORDERS,
    "openai-gpt": _OWN_ATTENTION,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "stablelm": _BORDERS,
    "xglm": "counts positions by itself",
    "xlstm": _RECURRENT,
}
# Attention with recurrent layers or convolutions, unless `layer_types` names attention alone.
_HYBRID = frozenset(
    {
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp_text",
        "zamba",
        "zamba2",
        "zaya",
    }
)
_PACKED = frozenset({"codegen", "gpt_neo", "gpt_neox_japanese", "gptj"})  # positions mask their rows


def expected_layout(config: Mapping[str, Any]) -> tuple[RowLayout, str]:
    """Return the layout of a model and the reason for it, from the values of its config.json alone.

    Unknown kinds of models are expected to share prompts; the check of the loaded model decides.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    kind, layers = text.get("model_type", ""), set(text.get("layer_types") or ())
    if other_layers := sorted(layers - _PACKED_LAYERS):
        return RowLayout.ONE_BY_ONE, f"{kind} has layers of type {', '.join(other_layers)}"
    if kind in _HYBRID and not layers:
        return RowLayout.ONE_BY_ONE, f"{kind} {_RECURRENT} or convolutions"
    if kind in _ONE_BY_ONE:
        return RowLayout.ONE_BY_ONE, f"{kind} {_ONE_BY_ONE[kind]}"
    if text.get("alibi"):
        return RowLayout.ONE_BY_ONE, f"{kind} {_ALIBI}"
    if kind in _PACKED:
        return RowLayout.PACKED, f"{kind} is masked by positions, which the responses to a prompt have in common"
    return RowLayout.SHARED_PROMPTS, f"{kind} has attention layers alone"


def refuse_unpackable(config: Mapping[str, Any], sequence_parallel: int) -> None:
    """Raise UserError if ranks are to share rows of a model unfit for packing."""
    layout, reason = expected_layout(config)
    if sequence_parallel > 1 and layout is RowLayout.ONE_BY_ONE:
        raise UserError(
            f"sequence_parallel is {sequence_parallel}, which needs a model whose sequences can be packed into a row, "
            f"and {reason}. Set it to 1, or use another model."
        )
