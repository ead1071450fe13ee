"""Published weights have the names and shapes of the model's files, with every expert of a mixture by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.adapters.folder import load_trainable_adapter
from rlhf.models.adapters.lora import adapter_disabled, add_lora
from rlhf.models.files.export import export_model
from rlhf.models.files.hub_names import missing_settings
from rlhf.models.files.loading import load_causal_lm, load_critic, load_tokenizer
from rlhf.models.files.tiny import VOCAB_SIZE, byte_tokenizer
from rlhf.models.files.weights import adapter_sources, published_names, weight_sources
from tests.fixtures.models import logits, moved, save_adapter
from tests.tiny_architectures import ALL, tiny_config
from tests.tiny_architectures import tiny_model as model_of

MIXTURES = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss"]


def mixture(folder: Path, kind: str) -> str:
    """Write a model folder as transformers does. Biases of the routers differ from zero."""
    model = model_of(kind, vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(0.0, 0.3, len(buffer)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def exported(model: Any, folder: Path, source: str) -> str:
    """Export the model's published weights with the tokenizer of `source`."""
    weights = ((name, weight.clone()) for name, weight in published(model).items())
    export_model(folder, weights, model, load_tokenizer(source), dtype=torch.float32)
    return str(folder)


def some_logits(model: Any) -> Tensor:
    return logits(model, torch.randint(VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(0)))


def published(model: Any) -> dict[str, Tensor]:
    return {name: weight for source in weight_sources(model) for name, weight in source.published()}


@pytest.mark.parametrize(
    "name", [name if name in MIXTURES else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_every_architecture_is_published_as_transformers_saves_it(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours = published(model)
    assert ours.keys() == saved.keys() == published_names(model.config)
    for key, weight in ours.items():
        assert torch.equal(weight, saved[key]), key


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_survives_loading_and_export(kind: str, tmp_path: Path) -> None:
    source = mixture(tmp_path / "source", kind)
    model = load_causal_lm(source, dtype=torch.float32)
    final = exported(model, tmp_path / "final", source)
    files = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("final", "source")]
    assert files[0] == files[1]
    settings = json.loads((tmp_path / "final" / "config.json").read_text(encoding="utf-8"))
    assert settings.get("topk_method") == ("noaux_tc" if kind == "deepseek_v3" else None)  # vLLM needs the key
    loaded, report = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(some_logits(loaded.eval()), some_logits(model))
    assert published(load_causal_lm(final, dtype=torch.float32)).keys() == published(model).keys()


def test_settings_that_transformers_does_not_write_are_those_of_the_model() -> None:
    config = tiny_config("minimax_m2", head_dim=32, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert missing_settings(config) == {"scoring_func": "sigmoid", "use_routing_bias": True, "rotary_dim": 16}
    config.scoring_func = "softmax"  # a folder may set another value
    assert "scoring_func" not in missing_settings(config)
    layers = ["dense", "dense", "sparse"]
    lite = tiny_config("glm4_moe_lite", num_hidden_layers=3, mlp_layer_types=layers)
    assert missing_settings(lite) == {"first_k_dense_replace": 2}


def test_routing_biases_keep_float32_in_bfloat16(tmp_path: Path) -> None:
    model = load_causal_lm(mixture(tmp_path, "deepseek_v3"), dtype=torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in published(model).items()}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert biases
    assert {dtypes[name] for name in biases} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {torch.bfloat16}


def test_adapters_of_a_mixture_are_on_its_linear_layers_and_merge_into_the_files_names(tmp_path: Path) -> None:
    source = mixture(tmp_path / "source", "qwen3_moe")
    model = add_lora(load_causal_lm(source, dtype=torch.float32), rank=2, alpha=4.0, dropout=0.0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in (s.name for s in adapter_sources(model))}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}  # experts are stacked parameters, not linear layers
    merged = load_causal_lm(exported(moved(model, by=0.1), tmp_path / "merged", source), dtype=torch.float32)
    torch.testing.assert_close(some_logits(merged), some_logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="no stacked experts named up_proj; they are down_proj, gate_up_proj"):
        add_lora(merged, rank=2, alpha=4.0, dropout=0.0, target_parameters=["up_proj"])


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])  # the last one's stacks are transposed
def test_adapters_of_stacked_experts_merge_and_come_back(kind: str, tmp_path: Path) -> None:
    source, stacks = mixture(tmp_path / "source", kind), ("gate_up_proj", "down_proj")
    base = load_causal_lm(source, dtype=torch.float32)
    model = load_causal_lm(source, dtype=torch.float32)
    model = add_lora(model, rank=2, alpha=4.0, dropout=0.0, target_parameters=stacks)
    wanted = some_logits(moved(model, by=0.1))
    assert (wanted - some_logits(base)).abs().max() > 0.01
    with adapter_disabled(model):
        torch.testing.assert_close(some_logits(model), some_logits(base))
    save_adapter(model, tmp_path / "adapter", source)
    merged = load_causal_lm(exported(model, tmp_path / "merged", source), dtype=torch.float32)
    continued = load_trainable_adapter(load_causal_lm(source, dtype=torch.float32), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter")
    for other in (merged, continued, theirs.eval()):
        torch.testing.assert_close(some_logits(other), wanted, rtol=1e-4, atol=1e-5)
    trained = [name for name, parameter in continued.named_parameters() if parameter.requires_grad]
    model(torch.arange(12)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert sum(".experts." in name for name in trained) == 2 * 2 * model.config.num_hidden_layers


def test_a_critic_of_a_mixture_comes_back_with_its_head(tmp_path: Path) -> None:
    source = mixture(tmp_path / "source", "qwen3_moe")
    critic = load_critic(source, dtype=torch.float32)
    torch.nn.init.ones_(critic.score.weight)
    loaded = load_critic(exported(critic, tmp_path / "critic", source), dtype=torch.float32)
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in critic.named_parameters())


def test_a_dense_model_is_published_without_copies(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    parameters = dict(model.named_parameters())
    ours = published(model)
    assert ours.keys() == parameters.keys()
    assert all(weight.data_ptr() == parameters[name].data_ptr() for name, weight in ours.items())
