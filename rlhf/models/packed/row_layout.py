"""How a model computes the sequences of a micro-batch: in one packed row, or singly.

A packed row is right for models with transformers' attention functions. Biases by position and sparse attention are
right for single sequences only. `rlhf.models.packed.row_check` measures the right layout for a loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rlhf.errors import UserError
from rlhf.vision.kinds import SEE_BOTH_WAYS


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
    trained_length: int | None = None  # most tokens of a sequence, if longer sequences would change the model


def set_rows(model: Any, rows: Rows) -> None:
    """Compute the model's sequences in this layout from now on."""
    model.rlhf_rows = rows


def rows_of(model: Any) -> Rows | None:
    """Return the value stored by `set_rows`. None: the model was not checked."""
    rows: Rows | None = vars(model).get("rlhf_rows")
    return rows


def row_layout(model: Any) -> RowLayout:
    """Return the layout of a model. An unchecked model is packed, with shared prompts."""
    rows = rows_of(model)
    return RowLayout.SHARED_PROMPTS if rows is None else rows.layout


_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "sparse", "dense"})  # the last two: kinds of MLPs
# Layers that compute each sequence of a row separately, or share a block with such a layer, and other kinds of MLPs.
_MIXING_LAYERS = frozenset({"linear_attention", "conv", "chunked_attention", "hybrid", "moe", "mlp"})
_ALIBI = "adds a bias by position to its attention"
_OWN_ATTENTION = "does not use transformers' attention functions"
_MIXES = "has layers other than attention that need whole sequences"
_RECURRENT = "has recurrent layers"
_SPARSE = "chooses which tokens a token sees"
_ONE_BY_ONE = {
    "bloom": _ALIBI,
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SPARSE,
    "doge": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "hy_v4": _OWN_ATTENTION,
    "inkling_text": _ALIBI,
    "mpt": _ALIBI,
    "openai-gpt": _OWN_ATTENTION,
    "rwkv": _RECURRENT,
    "xglm": "counts positions without position ids",
    "xlstm": _RECURRENT,
}
_MAMBA = {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h"}
_LINEAR = {"kimi_linear", "minimax", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"}
_OTHERS = {"lfm2", "lfm2_moe", "llama4_text", "recurrent_gemma", "zamba", "zamba2", "zaya"}
_HYBRID = _MAMBA | _LINEAR | _OTHERS  # with such layers, unless `layer_types` names attention alone
_SINKS = frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})
_PACKED = frozenset({"codegen", "gpt_neo", "gpt_neox_japanese", "gptj"})  # positions mask their rows


def expected_layout(config: Mapping[str, Any]) -> tuple[RowLayout, str]:
    """Return the layout of a model and the reason, only from the values of config.json.

    Unknown kinds of models are expected to share prompts; the check of the loaded model decides.
    """
    text, kind, layers = _parts_of(config)
    if (name := SEE_BOTH_WAYS.get(config.get("model_type", ""))) is not None:
        return RowLayout.ONE_BY_ONE, f"the tokens of an image of {name} see each other in both directions"
    if other_layers := sorted(layers - _ATTENTION_LAYERS - _MIXING_LAYERS):
        return RowLayout.ONE_BY_ONE, f"{kind} has layers of type {', '.join(other_layers)}"
    if kind in _ONE_BY_ONE:
        return RowLayout.ONE_BY_ONE, f"{kind} {_ONE_BY_ONE[kind]}"
    if text.get("alibi"):
        return RowLayout.ONE_BY_ONE, f"{kind} {_ALIBI}"
    if kind in _PACKED:
        return RowLayout.PACKED, f"{kind} is masked by positions, which the responses to a prompt have in common"
    return RowLayout.SHARED_PROMPTS, f"{kind} has only attention layers"


def _parts_of(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, set[str]]:
    """Return the values of the language model in a config.json, its type, and its types of layers."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return text, text.get("model_type", ""), set(text.get("layer_types") or ())


def keeps_states(config: Mapping[str, Any]) -> bool:
    """Return whether a model's layers keep a state beside keys and values, from the values of config.json."""
    _, kind, layers = _parts_of(config)
    return bool(layers & {"linear_attention", "conv", "hybrid"}) or (kind in _HYBRID - {"llama4_text"} and not layers)


def refuse_uneven_heads(config: Any, size: int) -> None:
    """Raise UserError if a model's attention heads cannot be divided among `size` ranks."""
    heads: int = config.get_text_config().num_attention_heads
    if heads % size:
        raise UserError(f"sequence_parallel is {size} and must divide the model's {heads} attention heads.")


def refuse_unpackable(config: Mapping[str, Any], sequence_parallel: int) -> None:
    """Raise UserError if ranks are to share rows of a model unfit for packing."""
    layout, reason = expected_layout(config)
    _, kind, layers = _parts_of(config)
    if config.get("vision_config"):
        layout, reason = RowLayout.ONE_BY_ONE, "the images of a row are not divided among ranks"
    elif layers - _ATTENTION_LAYERS or (kind in _HYBRID and not layers):
        layout, reason = RowLayout.ONE_BY_ONE, f"{kind} {_MIXES}"
    elif kind in _SINKS:
        layout, reason = RowLayout.ONE_BY_ONE, f"{kind} has attention sinks"
    if sequence_parallel > 1 and layout is RowLayout.ONE_BY_ONE:
        raise UserError(
            f"sequence_parallel is {sequence_parallel}, which needs a model whose sequences can be packed into a row, "
            f"but {reason}. Set it to 1, or use another model."
        )
