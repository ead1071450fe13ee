"""Before a run with a vision model: what the model cannot do, and models of other roles that would see otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.planning.memory import tower_bytes
from rlhf.planning.shapes import find_shape
from rlhf.preflight.models import StageResults, check_models
from rlhf.vision.processor import ImageProcessing
from tests.integration.gang_workers import worker_config
from tests.vision_models import drawn


def load_model(folder: Path, kind: str) -> Any:
    path = folder / kind
    if not path.exists():
        build_tiny_vision(path, kind, seed=0)
    return AutoModelForImageTextToText.from_pretrained(path)


def check(model: Path, algorithm: dict[str, Any], **sections: Any) -> None:
    is_online = algorithm["name"] != "sft"
    config = worker_config(algorithm, str(model), str(model.parent), tokens=64, is_online=is_online, **sections)
    check_models(config, StageResults(), vocabulary_of=str(model))


def test_the_models_of_a_run_see_an_image_as_the_same_tokens(tmp_path: Path) -> None:
    policy = build_tiny_vision(tmp_path / "policy", "mistral3", seed=0)
    critic = {"model": str(build_tiny_vision(tmp_path / "same", "mistral3", seed=1)), "dtype": "float32"}
    check(policy, {"name": "ppo"}, critic=critic)
    other = {"model": str(build_tiny_vision(tmp_path / "other", "pixtral", seed=0)), "dtype": "float32"}
    with pytest.raises(UserError, match=r"critic\.model: .*sees an image as other tokens than policy\.model"):
        check(policy, {"name": "ppo"}, critic=other)
    blind = build_tiny_llama(tmp_path / "blind", seed=0)
    with pytest.raises(UserError, match=r"another vocabulary|reads text alone, but policy\.model"):
        check(policy, {"name": "ppo"}, critic={"model": str(blind), "dtype": "float32"})
    check(blind, {"name": "sft"})


def test_keys_without_a_meaning_for_a_model_are_refused(tmp_path: Path) -> None:
    policy = build_tiny_vision(tmp_path / "policy", "qwen3_vl", seed=0)
    check(policy, {"name": "sft"}, policy={"vision_lr": 1e-4})
    with pytest.raises(UserError, match=r"algorithm\.neftune_alpha: is 5, but .*sees images.*Set it to null"):
        check(policy, {"name": "sft", "neftune_alpha": 5.0})
    with pytest.raises(UserError, match=r"policy\.vision_lr: is 0\.0001, but .*has no vision tower\. Remove it"):
        check(build_tiny_llama(tmp_path / "blind", seed=0), {"name": "sft"}, policy={"vision_lr": 1e-4})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3"])
def test_the_plan_counts_the_weights_of_the_tower(kind: str) -> None:
    shape = find_shape(f"tiny:{kind}", shapes=None, made={})
    model = AutoModelForImageTextToText.from_config(KINDS[kind]()[0])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tower.parameters == sum(
        p.numel() for name, p in model.named_parameters() if ".vis" in name or ".conn" in name
    )


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3", "pixtral"])
def test_the_plan_counts_an_adapter_of_the_tower(kind: str, tmp_path: Path) -> None:
    shape, model = find_shape(f"tiny:{kind}", shapes=None, made={}), load_model(tmp_path, kind)
    for vision in (False, True):
        adapted = add_lora(load_model(tmp_path, kind), rank=4, alpha=4.0, dropout=0.0, vision=vision)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert shape.lora_parameters(4, vision=vision) == trained
    assert model.num_parameters() == shape.parameters


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "idefics3", "pixtral"])
def test_the_plan_counts_what_a_trained_tower_keeps(kind: str, tmp_path: Path) -> None:
    """Compare with the bytes that PyTorch saves for the backward pass of the tower, without the weights."""
    shape, model = find_shape(f"tiny:{kind}", shapes=None, made={}), load_model(tmp_path, kind)
    processing = ImageProcessing.of_model(str(tmp_path / kind))
    assert processing is not None
    inputs = processing.model_inputs([drawn(size=(64, 64))])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            saved[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.get_image_features(**inputs)
    (embedded,) = {sum(token == processing.image_token_id for token in processing.expansion(64, 64))}
    expected = embedded * tower_bytes(shape, itemsize=4, checkpointing=False, trained=True)
    assert features is not None
    assert 0.5 < expected / sum(saved.values()) < 2.0, (expected, sum(saved.values()))


def test_the_plan_refuses_a_decoder_without_a_model_of_its_memory() -> None:
    with pytest.raises(UserError, match="decoder of type gemma3_text, whose memory is not modelled; known are llama"):
        find_shape("tiny:gemma3", shapes=None, made={})
