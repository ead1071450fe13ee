"""What a trained worker writes: a model, an adapter, or a model with the adapter in its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.schema.model import LoraConfig, PolicyConfig
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.lora import add_lora
from rlhf.models.weights import adapter_sources, weight_sources
from rlhf.workers.trained import TrainedWorker


class Worker(TrainedWorker):
    """A worker whose engine holds whole weights."""

    def __init__(self, model: Any, source: Path) -> None:
        self.model_config = PolicyConfig(model=str(source), dtype="float32", lora=LoraConfig(rank=4))
        self.place: Any = SimpleNamespace(rank=0)
        self.tokenizer = load_tokenizer(str(source))
        self.engine: Any = SimpleNamespace(
            module=model,
            named_weights=lambda dtype: ((s.name, s.make().to(dtype)) for s in weight_sources(model)),
            named_adapter_weights=lambda dtype: ((s.name, s.make().to(dtype)) for s in adapter_sources(model)),
        )


def test_a_merged_export_is_the_base_with_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = add_lora(load_causal_lm(str(tiny_model), dtype=torch.float32), rank=4, alpha=8.0, dropout=0.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    worker = Worker(model, tiny_model)
    worker.export(tmp_path / "adapter")
    worker.export(tmp_path / "whole", merged=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, plain = adapted(tokens).logits, AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits
        torch.testing.assert_close(whole(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=0.1)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
