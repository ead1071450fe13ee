"""Tiny models and adapters for the tests of merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.models.files.tiny import build_tiny_llama


def make_models(folder: Path) -> Path:
    """Write models: `base`, `a`, `b` with a separate head, and `tied_base`, `tied_a`, `tied_b`."""
    for seed, name in enumerate(("base", "a", "b")):
        build_tiny_llama(folder / name, seed=seed)
        build_tiny_llama(folder / f"tied_{name}", seed=seed, tied=True)
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int, rank: int = 4, **settings: Any) -> Path:
    """Write a LoRA adapter on two layers of each block, with weights as after training."""
    return _trained(AutoModelForCausalLM.from_pretrained(base), folder, base, seed, r=rank, **settings)


def make_reward_adapter(folder: Path, base: Path, *, seed: int, num_labels: int = 1) -> Path:
    """Write an adapter of a sequence classifier, with a trained head."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    return _trained(model, folder, base, seed, r=4, task_type="SEQ_CLS")


def _trained(model: Any, folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    values = {"lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(values | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.05, generator=generator)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of all files of a folder."""
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}
