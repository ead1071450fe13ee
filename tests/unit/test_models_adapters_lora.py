"""Adapters of every kind are exact when off, and merge and load as in plain peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.adapters.lora import adapter_disabled, add_lora
from rlhf.models.files.loading import load_causal_lm, load_critic
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.weights import adapter_sources, weight_sources
from rlhf.models.packed.forward import policy_logprobs_only
from tests.fixtures.models import logits, moved, save_adapter, save_model
from tests.tiny_architectures import tiny_model as tiny_architecture

TOKENS, LENGTHS = torch.arange(7), torch.tensor([3, 4])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa with rslora": {"init": "pissa", "rslora": True},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "dora of one layer, and the head": {"dora": True, "layers": [1], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / request.param
    return build_tiny_llama(folder, seed=0, tied=request.param == "tied")


def adapted(path: Path, **options: Any) -> Any:
    model = load_causal_lm(str(path), dtype=torch.float32)
    return add_lora(model, **({"rank": 4, "alpha": 8.0, "dropout": 0.0} | options))


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_the_model_is_exact_when_off_and_comes_back_from_its_files(
    base: Path, kind: str, tmp_path: Path
) -> None:
    rounding = 2e-6 if "pissa" in kind else 0.0  # the principal part is added and subtracted in a different order
    plain = load_causal_lm(str(base), dtype=torch.float32)
    before, model = logits(plain, TOKENS), adapted(base, **KINDS[kind])
    assert (logits(model, TOKENS) - before).abs().max() <= rounding
    after = logits(moved(model), TOKENS)
    trainable = [p.requires_grad for p in model.parameters()]
    assert not torch.allclose(after, before, atol=1e-2)
    with adapter_disabled(model):
        assert torch.equal(logits(model, TOKENS), before)
        assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(logits(model, TOKENS), after)
    folder = save_adapter(model, tmp_path / "adapter", base)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    assert (logits(loaded, TOKENS) - after).abs().max() <= rounding  # pissa: one product, not two
    merged = load_causal_lm(str(save_model(model, tmp_path / "merged", base)), dtype=torch.float32)
    torch.testing.assert_close(logits(merged, TOKENS), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(base: Path, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = moved(adapted(base, **KINDS[kind])).to(dtype)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(plain, save_adapter(model, tmp_path, base), autocast_adapter_dtype=False)
    expected = loaded.merge_and_unload().state_dict()
    ours = {source.name: source.make() for source in weight_sources(model)}
    assert set(expected) - set(ours) <= {"lm_head.weight"}  # tied
    for name, weight in ours.items():
        assert torch.equal(weight, expected[name]), name


def test_a_trained_head_enters_the_logprobs(base: Path) -> None:
    mask = torch.tensor([False, True, True, False, True, True, True])
    model = adapted(base, modules_to_save=["lm_head"], target_modules=["q_proj"])

    def column() -> Tensor:
        with torch.no_grad():
            return policy_logprobs_only(model, TOKENS, LENGTHS, mask=mask)

    before = column()
    moved(model)
    assert not torch.allclose(column(), before, atol=1e-2)
    with adapter_disabled(model):
        assert torch.equal(column(), before)


def test_only_chosen_layers_or_a_critics_head_are_trained_and_b_starts_at_zero(tiny_model: Path) -> None:
    model = adapted(tiny_model, target_modules=["q_proj", "v_proj"], layers=[1])
    names = {name.rpartition(".default.")[0] for name, p in model.named_parameters() if p.requires_grad}
    at = "model.layers.1.self_attn"
    assert names == {f"{at}.{part}.lora_{letter}" for part in ("q_proj", "v_proj") for letter in "AB"}
    assert not any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
    critic = add_lora(load_critic(str(tiny_model), dtype=torch.float32), rank=2, alpha=4.0, dropout=0.0)
    assert critic.score.weight.requires_grad
    assert "base_model.model.score.weight" in {source.name for source in adapter_sources(critic)}
    assert critic.peft_config["default"].modules_to_save == ["score"]


def test_pissa_trains_what_peft_trains(tiny_model: Path) -> None:
    ours = adapted(tiny_model, init="pissa", target_modules=["q_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    plain = load_causal_lm(str(tiny_model), dtype=torch.float32)
    theirs = peft.inject_adapter_in_model(config, plain)

    def trained_layers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        model(TOKENS[None]).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.grad

    expected = dict(trained_layers(theirs))
    for name, gradient in trained_layers(ours):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["w_proj"]}, "lora.target_modules: the model has no linear layers named w_proj"),
        ({"target_modules": ["q_proj", "w_proj"]}, "no linear layers named w_proj"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "the head cannot have LoRA matrices. .* name it in lora.modules_to_save",
        ),
        ({"modules_to_save": ["wte"]}, "lora.modules_to_save: the model has no modules named wte"),
        ({"modules_to_save": ["q_proj"]}, "q_proj cannot be adapted and trained whole"),
        ({"layers": [0, 99]}, r"lora.layers: the model has layers 0 to \d, not 99"),
        ({"rank": 10_000, "init": "pissa"}, r"lora\.rank: is 10000, but a \d+ x \d+ weight has only"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(tiny_model, **options)


@pytest.mark.parametrize("name", ["word_embeddings", "lm_head"])
def test_a_tied_head_follows_an_embedding_of_any_name(name: str) -> None:
    model = add_lora(tiny_architecture("bloom"), rank=2, alpha=4.0, dropout=0.0, modules_to_save=[name])
    embedding = model.get_input_embeddings().weight
    assert embedding.requires_grad
    assert model.get_output_embeddings().weight is embedding
    moved(model)
    exported = {source.name: source.make() for source in weight_sources(model)}
    assert torch.equal(exported["transformer.word_embeddings.weight"], embedding)


def test_a_tied_head_that_peft_would_untie_is_refused() -> None:
    model = tiny_architecture("gpt_neox_japanese")
    with pytest.raises(UserError, match=r"lora\.modules_to_save: the model ties embed_in and embed_out, and peft"):
        add_lora(model, rank=2, alpha=4.0, dropout=0.0, modules_to_save=["embed_in"])


def test_no_adapter_no_adapter_weights(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA adapter"):
        adapter_sources(load_causal_lm(str(tiny_model), dtype=torch.float32))


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        ("falcon_mamba", {"dt_proj", "out_proj"}),  # the kernels read these weights themselves
        ("llama4_text", {"router"}),
        ("gemma3n_text", {"0", "1", "2"}),  # other blocks also have layers with these names
    ],
)
def test_layers_that_an_adapter_does_not_fit_stay_frozen(kind: str, frozen: set[str]) -> None:
    model = tiny_architecture(kind)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert frozen <= linear
    model = add_lora(model, rank=2, alpha=4.0, dropout=0.0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted
    assert not adapted & frozen
