"""Convert a model's parameters into the weights of the files on the hub: different names, and separate experts.

On loading, transformers stacks the experts of a layer into one parameter. vLLM and most programs read the files' form,
so published and exported weights have this form. Dense models mostly need no conversion.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key


def missing_settings(config: Any) -> dict[str, Any]:
    """Return the settings missing in this config for vLLM, neither read nor written by transformers."""
    settings: Mapping[str, Any] = {}
    if config.model_type == "deepseek_v3":  # else vLLM gives the routers no bias of choice, and scores by a softmax
        settings = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    elif config.model_type in ("lfm2", "lfm2_moe"):
        settings = {"block_dim": config.hidden_size, "conv_dim": config.hidden_size}
    elif config.model_type == "afmoe":
        settings = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
    elif config.model_type == "glm4_moe_lite":
        settings = {"first_k_dense_replace": config.mlp_layer_types.count("dense")}
    elif config.model_type == "hy_v3":
        settings = {
            "first_k_dense_replace": config.mlp_layer_types.count("dense"),
            "expert_hidden_dim": config.moe_intermediate_size,
            "route_norm": True,
            "qk_norm": True,
        }
    elif config.model_type == "minimax_m2":
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        settings = {"scoring_func": "sigmoid", "use_routing_bias": True, "rotary_dim": rotary_dim}
    return {key: value for key, value in settings.items() if not hasattr(config, key)}


class HubNames:
    """Reverses the conversions of transformers' loading.

    A conversion of several parameters into one weight is left out: such parameters keep their names.
    """

    def __init__(self, model: Any) -> None:
        conversions = getattr(model, "_weight_conversions", None)  # those used by from_pretrained
        if conversions is None:
            mapping = get_model_conversion_mapping(model, add_legacy=False)
            conversions = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]
        reversed_ones = [conversion.reverse_transform() for conversion in reversed(conversions)]
        self._model = model
        self._renamings = [one for one in reversed_ones if isinstance(one, WeightRenaming)]
        self._converters = [
            one for one in reversed_ones if isinstance(one, WeightConverter) and len(one.source_patterns) == 1
        ]

    def convert(self, name: str, weight: Tensor) -> Mapping[str, Tensor]:
        """Return the weights of the files that make up this parameter, by name."""
        hub_name, pattern = rename_source_key(name, self._renamings, self._converters, reverse=True)
        if pattern is None:
            return {hub_name: weight}
        converter = copy.deepcopy(next(one for one in self._converters if pattern in one.source_patterns))
        converter.add_tensor(hub_name, name, pattern, weight)
        parts: Mapping[str, Tensor] = converter.convert(hub_name, model=self._model, config=self._model.config)
        return {part: value[0] if isinstance(value, list) else value for part, value in parts.items()}
