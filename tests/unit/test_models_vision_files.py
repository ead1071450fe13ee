"""Vision models load, get adapters, and are written with their processor, so that transformers loads them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlhf.engine.parameter_groups import parameter_groups
from rlhf.engine.training_engine import OptimizerSettings
from rlhf.errors import UserError
from rlhf.models.adapters.folder import load_trainable_adapter
from rlhf.models.adapters.lora import add_lora, model_of
from rlhf.models.files.export import export_adapter, export_model
from rlhf.models.files.loading import (
    load_causal_lm,
    load_critic,
    load_model_config,
    load_tokenizer,
    refuse_missing_weights,
    refuse_no_language_model,
)
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.models.files.weights import adapter_sources, published_names, sources_without_tower, weight_sources
from rlhf.models.packed.images import image_reader
from rlhf.models.packed.row_layout import refuse_unpackable
from rlhf.models.quantized import refuse_unquantizable
from rlhf.vision.kinds import is_vision_weight, reads_images
from rlhf.workers.trained_model import freeze_vision
from tests.fixtures.vision_models import picture

QUICK = ("qwen2_vl", "mistral3")  # the names of Qwen2-VL differ in files; towers of Mistral 3 share names of layers
CASES = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build_tiny_vision(tmp_path / "base", request.param, seed=0)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)


def written(sources: Any) -> list[tuple[str, torch.Tensor]]:
    return [named for source in sources for named in source.published()]


def test_an_exported_model_loads_with_its_processor_in_transformers(folder: Path, tmp_path: Path) -> None:
    model = load_causal_lm(str(folder), dtype=torch.float32)
    moved(model)
    export_model(
        tmp_path / "final",
        written(weight_sources(model)),
        model,
        load_tokenizer(str(folder)),
        dtype=torch.float32,
    )
    other = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    processors: list[Any] = [AutoProcessor.from_pretrained(place) for place in (folder, tmp_path / "final")]
    text = processors[0].tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], tokenize=False
    )
    first, second = (p(text=[text], images=[[picture("red")]], return_tensors="pt") for p in processors)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(model(**first).logits, other(**second).logits)
    names = {name for name, _ in written(weight_sources(model))}
    assert published_names(load_model_config(str(folder))) == names
    assert {name for name, _ in written(sources_without_tower(model))} == names  # the tower is trained
    freeze_vision(model)
    texts = {name for name, _ in written(sources_without_tower(model))}
    parts = ("visual.", "vision_", "multi_modal_", "connector", "image_newline")  # of the kinds' files
    assert texts == {name for name in names if not any(part in name for part in parts)}


def test_a_critic_of_a_vision_model_is_written_and_read(folder: Path, tmp_path: Path) -> None:
    critic = load_critic(str(folder), dtype=torch.float32)
    assert not critic.score.weight.any()
    moved(critic)
    tokenizer = load_tokenizer(str(folder))
    export_model(tmp_path / "v", written(weight_sources(critic)), critic, tokenizer, dtype=torch.float32)
    again = load_critic(str(tmp_path / "v"), dtype=torch.float32)
    weights, others = dict(critic.named_parameters()), dict(again.named_parameters())
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert image_reader(again) is not None


def test_an_adapter_leaves_the_tower_out_unless_asked(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.0}
    model = add_lora(load_causal_lm(str(folder), dtype=torch.float32), **options)
    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(adapted) >= 14
    assert not any(map(is_vision_weight, adapted))
    moved(model)
    export_adapter(tmp_path / "a", written(adapter_sources(model)), model, load_tokenizer(str(folder)))
    again = load_trainable_adapter(load_causal_lm(str(folder), dtype=torch.float32), tmp_path / "a", dropout=0.0)
    weights, others = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(weights[name], others[name]) for name in adapted)
    explicit = add_lora(load_causal_lm(str(folder), dtype=torch.float32), **options, target_modules=["q_proj"])
    adapted = [name for name, _ in explicit.named_modules() if name.endswith(".q_proj") and not is_vision_weight(name)]
    assert len(written(adapter_sources(explicit))) == 2 * len(adapted) > 0  # A and B of each layer with this module
    linear = {name for name, module in explicit.named_modules() if isinstance(module, nn.Linear)}
    last = {sees: {n.rpartition(".")[2] for n in linear if is_vision_weight(n) is sees} for sees in (True, False)}
    targets = ["q_proj", min(last[True] - last[False])]
    with pytest.raises(UserError, match=r"lora\.target_modules: .* exist only in the vision tower"):
        add_lora(load_causal_lm(str(folder), dtype=torch.float32), **options, target_modules=targets)
    seeing = add_lora(load_causal_lm(str(folder), dtype=torch.float32), **options, vision=True)
    assert any(is_vision_weight(name) for name, p in seeing.named_parameters() if p.requires_grad)
    with torch.device("meta"):
        model_of(load_model_config(str(folder)), scalar=True, trust_remote_code=False)


def test_a_frozen_tower_has_no_group_and_a_trained_one_its_own_rate(folder: Path) -> None:
    model = load_causal_lm(str(folder), dtype=torch.float32)
    groups = parameter_groups(model, OptimizerSettings(lr=1e-3, vision_ratio=0.1))
    assert {group.lr_ratio for group in groups} == {1.0, 0.1}
    tower = {p for name, p in model.named_parameters() if is_vision_weight(name)}
    assert {p for group in groups if group.lr_ratio == 0.1 for p in group.parameters} == tower
    freeze_vision(model)
    groups = parameter_groups(model, OptimizerSettings(lr=1e-3))
    assert tower.isdisjoint(p for group in groups for p in group.parameters)


def test_what_vision_models_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_model_config(str(build_tiny_vision(tmp_path / "m", "qwen3_vl", seed=0)))
    refuse_no_language_model(str(tmp_path / "m"))
    refuse_missing_weights(str(tmp_path / "m"))
    refuse_unpackable(config.to_dict(), 1)
    with pytest.raises(UserError, match="images of a row are not divided among ranks"):
        refuse_unpackable(config.to_dict(), 2)
    with pytest.raises(UserError, match="no test has run with a vision model in 4 bits"):
        refuse_unquantizable("policy.lora.quantize", config, device="cpu")
    for kind in ("owl", "qwen3_vl_moe", "gemma4"):
        config.model_type = kind
        with pytest.raises(UserError, match=rf"of type {kind} cannot be used here: no test.*gemma3, idefics3"):
            reads_images(config)
