"""LoRA+: B in a group of its own, and nothing lost or twice."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf.engine.parameter_groups import parameter_groups
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import add_lora


def test_b_has_its_own_rate(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model = add_lora(model, rank=2, alpha=4.0, dropout=0.0, dora=True, modules_to_save=["lm_head"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slow, fast = parameter_groups(model, lora_plus_ratio=16.0)
    assert (slow.lr_ratio, fast.lr_ratio) == (1.0, 16.0)
    assert all(".lora_B." in names[id(p)] for p in fast.parameters)
    kinds = {names[id(p)].split(".default")[0].rpartition(".")[2] for p in slow.parameters}
    assert kinds == {"lora_A", "lora_magnitude_vector", "modules_to_save"}
    together = [*slow.parameters, *fast.parameters]
    assert len({id(p) for p in together}) == len(together) == sum(p.requires_grad for p in model.parameters())


def test_one_group_without_a_ratio(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    (group,) = parameter_groups(add_lora(model, rank=2, alpha=4.0, dropout=0.0), lora_plus_ratio=1.0)
    assert group.lr_ratio == 1.0
    assert len(group.parameters) == sum(p.requires_grad for p in model.parameters())
