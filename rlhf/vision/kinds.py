"""The kinds of vision models that the trainer knows, by the `model_type` of config.json.

A kind is listed after its packed forward pass was measured on a tiny model of that kind (docs/models.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhf.errors import UserError

VISION_KINDS = frozenset(
    {
        *("gemma3", "idefics3", "internvl", "llava", "llava_onevision", "mistral3"),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm"),
    }
)
# The tokens of an image attend to each other, so a causal row would be wrong. The values are names for messages.
SEE_BOTH_WAYS: Mapping[str, str] = {"gemma3": "Gemma 3"}

# Modules and parameters outside the language model: towers, projectors between tower and language model.
_PARTS = frozenset({"visual", "vision_model", "connector", "vision_tower", "multi_modal_projector", "image_newline"})


def reads_images(config: Any) -> bool:
    """Return whether a model of this config reads images. Raise UserError for a vision model of an unknown kind."""
    if getattr(config, "vision_config", None) is None:
        return False
    if config.model_type in VISION_KINDS:
        return True
    raise UserError(
        f"Vision models of type {config.model_type} cannot be used here: no test has measured how they see images. Use "
        f"a model of type {', '.join(sorted(VISION_KINDS))}, or a language model without a vision tower "
        "(docs/models.md)."
    )


def is_vision_weight(name: str) -> bool:
    """Return whether a module or parameter belongs to a vision tower or to a projector, by the name in its model."""
    return not _PARTS.isdisjoint(name.split("."))


def is_never_computed(config: Any, name: str) -> bool:
    """Return whether a weight of a model's files is behind the layer of the tower that the model reads.

    LLaVA's kinds read the states behind layer `vision_feature_layer`, before the tower's last norm.
    """
    read = getattr(config, "vision_feature_layer", None)
    if read is None or not is_vision_weight(name):
        return False
    num_layers = config.vision_config.num_hidden_layers
    depth = max(layer % (num_layers + 1) for layer in (read if isinstance(read, list | tuple) else [read]))
    layer = re.search(r"\.layers?\.(\d+)\.", name)
    return ".post_layernorm." in name or (layer is not None and int(layer[1]) >= depth)
