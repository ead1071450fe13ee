"""Groups of parameters for LoRA+, weight decay and Muon, with nothing lost or twice."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf.engine.parameter_groups import parameter_groups
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.loading import load_causal_lm


def test_b_has_its_own_rate(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=2, alpha=4.0, dropout=0.0, dora=True, modules_to_save=["lm_head"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slow, fast = parameter_groups(model, lora_plus_ratio=16.0, weight_decay=0.0, splits_matrices=False)
    assert (slow.lr_ratio, fast.lr_ratio) == (1.0, 16.0)
    assert all(".lora_B." in names[id(p)] for p in fast.parameters)
    kinds = {names[id(p)].split(".default")[0].rpartition(".")[2] for p in slow.parameters}
    assert kinds == {"lora_A", "lora_magnitude_vector", "modules_to_save"}
    together = [*slow.parameters, *fast.parameters]
    assert len({id(p) for p in together}) == len(together) == sum(p.requires_grad for p in model.parameters())


def test_one_group_without_a_ratio(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=2, alpha=4.0, dropout=0.0)
    (group,) = parameter_groups(model, lora_plus_ratio=1.0, weight_decay=0.1, splits_matrices=False)
    assert (group.lr_ratio, group.decays, group.is_matrix) == (1.0, True, False)
    assert len(group.parameters) == sum(p.requires_grad for p in model.parameters())


def test_norms_and_biases_do_not_decay() -> None:
    values = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**values, num_attention_heads=4, num_key_value_heads=2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, lora_plus_ratio=1.0, weight_decay=0.1, splits_matrices=False)
    still = {names[id(p)] for group in groups if not group.decays for p in group.parameters}
    assert still == {name for name in names.values() if "norm" in name or name.endswith(".bias")}
    assert any(name.endswith(".bias") for name in still)
    assert sum(len(group.parameters) for group in groups) == len(names)


def test_muon_has_the_matrices_of_the_blocks_alone(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, lora_plus_ratio=1.0, weight_decay=0.0, splits_matrices=True)
    matrices = {names[id(p)] for group in groups if group.is_matrix for p in group.parameters}
    assert matrices == {name for name in names.values() if name.endswith("_proj.weight")}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(names.values()) - matrices
