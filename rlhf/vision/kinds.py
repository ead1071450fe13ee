"""The kinds of vision models that the trainer knows, by the `model_type` of config.json.

A kind is listed after its packed forward pass was measured on a tiny model of that kind (docs/models.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionKind:
    """What differs between kinds."""

    name: str  # in messages and tables
    sees_both_ways: bool = False  # the tokens of an image attend to each other, so a causal row would be wrong


KINDS: Mapping[str, VisionKind] = {
    "gemma3": VisionKind(name="Gemma 3", sees_both_ways=True),
    "idefics3": VisionKind(name="Idefics3"),
    "internvl": VisionKind(name="InternVL"),
    "llava": VisionKind(name="LLaVA, Pixtral"),
    "llava_onevision": VisionKind(name="LLaVA-OneVision"),
    "mistral3": VisionKind(name="Mistral 3"),
    "qwen2_5_vl": VisionKind(name="Qwen2.5-VL"),
    "qwen2_vl": VisionKind(name="Qwen2-VL"),
    "qwen3_5": VisionKind(name="Qwen3.5"),
    "qwen3_vl": VisionKind(name="Qwen3-VL"),
    "smolvlm": VisionKind(name="SmolVLM"),
}

# Modules and parameters outside the language model: towers, projectors between tower and language model.
_PARTS = frozenset({"visual", "vision_model", "connector", "vision_tower", "multi_modal_projector", "image_newline"})


def vision_kind(config: Any) -> VisionKind | None:
    """Return the kind of a model of this config. None: the model reads text alone.

    Raise UserError for a vision model of any other kind.
    """
    if getattr(config, "vision_config", None) is None:
        return None
    if (kind := KINDS.get(config.model_type)) is not None:
        return kind
    raise UserError(
        f"Vision models of type {config.model_type} cannot be used here: no test has measured how they see images. Use "
        f"a model of type {', '.join(sorted(KINDS))}, or a language model without a vision tower (docs/models.md)."
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
