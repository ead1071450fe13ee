"""Correct some of vLLM's models, which are wrong on every device. Each model is corrected right after creation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


def correct_models() -> None:
    """Have vLLM's workers correct the models of `CORRECTIONS` before loading weights."""
    create = BaseModelLoader.create_model

    def create_corrected(loader: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create(loader, *args, **kwargs)
        if (correct := CORRECTIONS.get(type(model).__name__)) is not None:
            correct(model)
        return model

    BaseModelLoader.create_model = create_corrected


def spare_unused_norms(model: Any) -> None:
    """Let files lack the norms behind A.X-K1's dense layers: vLLM creates these norms, but never computes with them."""
    load = model.load_weights
    unused = {
        f"model.layers.{index}.post_mlp_layernorm.weight"
        for index, layer in enumerate(model.model.layers)
        if not getattr(layer, "is_layer_sparse", True)
    }
    model.load_weights = lambda weights: load(weights) | unused


def embed_for_layers(model: Any) -> None:
    """Compute the embeddings that Gemma 3n adds to each layer, as vLLM does only in the model for images."""
    forward = model.forward

    def forward_with_embeddings(
        input_ids: Tensor | None, positions: Tensor, *, per_layer_inputs: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if per_layer_inputs is None and input_ids is not None:
            per_layer = model.model.get_per_layer_input_embeddings(input_ids)
            per_layer_inputs = per_layer.unflatten(-1, (model.config.num_hidden_layers, -1))
        result: Tensor = forward(input_ids, positions, per_layer_inputs=per_layer_inputs, **kwargs)
        return result

    model.forward = forward_with_embeddings


def nest_vision_model(model: Any) -> None:
    """Let the tower's weights have the names that transformers writes since 5.0, without `vision_model`."""
    load, old, new = model.load_weights, "vision_tower.", "vision_tower.vision_model."

    def nested(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            yield (name if new in name else name.replace(old, new, 1)), weight

    model.load_weights = lambda weights: load(nested(weights))


CORRECTIONS: dict[str, Callable[[Any], None]] = {
    "AXK1ForCausalLM": spare_unused_norms,
    "Gemma3ForConditionalGeneration": nest_vision_model,
    "Gemma3nForCausalLM": embed_for_layers,
    "LlavaOnevisionForConditionalGeneration": nest_vision_model,
}
