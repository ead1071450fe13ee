"""Fix the frequencies of rotary embeddings (RoPE) that depend on the longest sequence of a forward pass.

With `longrope` and `dynamic`, transformers chooses the frequencies of a whole row by the largest position. vLLM chooses
once, by max_model_len. Workers therefore choose once too, by the longest sequence of the run.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf.errors import UserError

_log = logging.getLogger(__name__)


def fix_frequencies(model: Any, longest: int) -> None:
    """Give every sequence the frequencies of vLLM with `longest` as max_model_len.

    Raise UserError for a `dynamic` embedding if the run has sequences beyond the trained length. The configuration of
    the model stays unchanged, also in exports.
    """
    refuse_beyond_trained_length(model, trained_length(model), longest)
    for parent, name, embedding in list(_embeddings(model)):
        layer_types = [layer for layer, kind in _types(embedding).items() if kind == "longrope"]
        if not layer_types:
            continue
        config, trained = _with_one_factor(embedding.config, layer_types, longest)
        device = next(embedding.buffers()).device
        setattr(parent, name, type(embedding)(config).to(device))
        if longest > trained:
            _log.warning(
                f"{type(model).__name__}: every sequence has the long factors of its RoPE, because a sequence may have "
                f"{longest} tokens, more than its original_max_position_embeddings ({trained}). vLLM serves it so with "
                f"a max_model_len above {trained}."
            )


def trained_length(model: nn.Module) -> int | None:
    """Return the most tokens before `dynamic` embeddings change the frequencies. None: no embedding is dynamic."""
    embeddings = [part for *_, part in _embeddings(model) if any("dynamic" in kind for kind in _types(part).values())]
    return min((part.original_max_seq_len for part in embeddings), default=None)


def refuse_beyond_trained_length(model: Any, limit: int | None, longest: int) -> None:
    """Raise UserError if a sequence would change the frequencies of all later sequences."""
    if limit is not None and longest > limit:
        raise UserError(
            f"A sequence may have {longest} tokens, but the model {model.config._name_or_path} takes at most {limit}: "
            "its RoPE is of type dynamic, whose frequencies would then depend on the sequences computed before. "
            "Shorten the sequences, or use a model with a longer context."
        )


def _embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield each rotary embedding of transformers with the parent module and the name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if hasattr(child, "rope_type") and hasattr(child, "config"):
                yield parent, name, child


def _types(embedding: Any) -> dict[str | None, str]:
    """Return the type of RoPE by kind of layer. The only key is None if all layers have the same."""
    kinds: str | dict[str | None, str] = embedding.rope_type
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _with_one_factor(config: Any, layer_types: list[str | None], longest: int) -> tuple[Any, int]:
    """Return a copy with the factors for `longest` tokens, as both long and short, and the trained length."""
    fixed, trained = copy.deepcopy(config), sys.maxsize
    for layer_type in layer_types:
        nested = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        values = fixed.rope_parameters if layer_type is None else fixed.rope_parameters[layer_type]
        trained = min(trained, nested["original_max_position_embeddings"])
        which = "long" if longest > nested["original_max_position_embeddings"] else "short"
        _, values["attention_factor"] = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", layer_type=layer_type)
        for name in ("factor", "mscale"):  # only Phi-3.5-MoE has the second
            if f"{which}_{name}" in nested:
                values[f"short_{name}"] = values[f"long_{name}"] = nested[f"{which}_{name}"]
        values["original_max_position_embeddings"] = sys.maxsize  # no row is so long
    if hasattr(fixed, "original_max_position_embeddings"):
        fixed.original_max_position_embeddings = sys.maxsize  # has priority over the entry of rope_parameters
    return fixed, trained
