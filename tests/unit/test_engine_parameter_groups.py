"""Groups of parameters for LoRA+, weight decay and Muon, with nothing lost or twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf.engine.parameter_groups import ParameterGroup, parameter_groups
from rlhf.engine.training_engine import OptimizerSettings
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.loading import load_causal_lm


def groups_of(model: Any, **settings: Any) -> tuple[list[ParameterGroup], dict[int, str]]:
    """Return the groups, and the parameters' names by id."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return parameter_groups(model, OptimizerSettings(lr=1.0, **settings)), names


def test_b_has_its_own_rate(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=2, alpha=4.0, dropout=0.0, dora=True, modules_to_save=["lm_head"])
    (slow, fast), names = groups_of(model, lora_plus_ratio=16.0)
    assert (slow.lr_ratio, fast.lr_ratio) == (1.0, 16.0)
    assert all(".lora_B." in names[id(p)] for p in fast.parameters)
    kinds = {names[id(p)].split(".default")[0].rpartition(".")[2] for p in slow.parameters}
    assert kinds == {"lora_A", "lora_magnitude_vector", "modules_to_save"}
    together = [*slow.parameters, *fast.parameters]
    assert len({id(p) for p in together}) == len(together) == sum(p.requires_grad for p in model.parameters())
    (group,), _ = groups_of(model)  # without a ratio or decay
    assert (group.lr_ratio, group.decays, group.is_matrix) == (1.0, False, False)
    assert len(group.parameters) == len(together)


def test_norms_and_biases_do_not_decay() -> None:
    values = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**values, num_attention_heads=4, num_key_value_heads=2))
    groups, names = groups_of(model, weight_decay=0.1)
    still = {names[id(p)] for group in groups if not group.decays for p in group.parameters}
    assert still == {name for name in names.values() if "norm" in name or name.endswith(".bias")}
    assert any(name.endswith(".bias") for name in still)
    assert sum(len(group.parameters) for group in groups) == len(names)


def test_muon_has_the_matrices_of_the_blocks_alone(tiny_model: Path) -> None:
    groups, names = groups_of(load_causal_lm(str(tiny_model), dtype=torch.float32), name="muon")
    matrices = {names[id(p)] for group in groups if group.is_matrix for p in group.parameters}
    assert matrices == {name for name in names.values() if name.endswith("_proj.weight")}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(names.values()) - matrices
