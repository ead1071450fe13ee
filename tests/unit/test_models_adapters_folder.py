"""Trained adapters are continued or merged, and refused for a model of another shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.adapters.folder import (
    load_trainable_adapter,
    read_adapter_config,
    read_adapter_shape,
    refuse_misfit_adapter,
)
from rlhf.models.adapters.lora import adapter_disabled, add_lora, with_adapter
from rlhf.models.adapters.settings import base_of
from rlhf.models.files.loading import load_causal_lm, load_critic
from rlhf.models.files.tiny import build_tiny_llama
from tests.fixtures.models import change_json, changed_copy, logits, moved, save_adapter

TOKENS = torch.arange(9)[None]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "dora with embedding": {"dora": True, "modules_to_save": ["embed_tokens"]},
}


def made(base: Path, folder: Path, **options: Any) -> tuple[Any, Path]:
    torch.manual_seed(5)
    model = load_causal_lm(str(base), dtype=torch.float32)
    model = moved(add_lora(model, **({"rank": 4, "alpha": 8.0, "dropout": 0.0} | options)))
    return model, save_adapter(model, folder, base)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_an_adapter_which_is_then_the_reference(tmp_path: Path, kind: str, tied: bool) -> None:
    base = build_tiny_llama(tmp_path / "base", seed=0, tied=tied)
    first, folder = made(base, tmp_path / "first", **KINDS[kind])
    model = load_trainable_adapter(load_causal_lm(str(base), dtype=torch.float32), folder, dropout=0.0)
    start = logits(model, TOKENS)
    torch.testing.assert_close(start, logits(first, TOKENS), rtol=0, atol=2e-6 if kind == "pissa" else 0.0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(".initial." in name for name in trainable)
    assert len(trainable) == sum(p.requires_grad for p in first.parameters())
    after = logits(moved(model), TOKENS)
    assert not torch.allclose(after, start, atol=1e-2)
    with adapter_disabled(model):
        assert torch.equal(logits(model, TOKENS), start)
    assert torch.equal(logits(model, TOKENS), after)
    second = save_adapter(model, tmp_path / "second", base)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), second)
    assert torch.equal(logits(plain, TOKENS), after)


@pytest.mark.parametrize("continued", [False, True])
def test_an_adapter_names_the_model_and_the_revision_that_it_is_trained_on(
    tiny_model: Path, tmp_path: Path, continued: bool
) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    model.config.name_or_path = "org/name@v1"  # as a model of the hub is loaded
    if continued:
        model = load_trainable_adapter(model, made(tiny_model, tmp_path / "first")[1])
    else:
        model = add_lora(model, rank=4, alpha=8.0, dropout=0.0)
    folder = save_adapter(model, tmp_path / "adapter", tiny_model)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "v1")
    assert base_of(folder) == ("org/name@v1", 4)


def test_a_critic_takes_what_it_has_modules_for_from_the_policys_adapter(tiny_model: Path, tmp_path: Path) -> None:
    policy, folder = made(tiny_model, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    critic = load_trainable_adapter(load_critic(str(tiny_model), dtype=torch.float32), folder)
    with torch.no_grad():
        assert torch.equal(critic.model(TOKENS).last_hidden_state, policy.model(TOKENS).last_hidden_state)
    assert not critic.score.weight.any()


def test_an_adapter_of_another_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    _, folder = made(tiny_model, tmp_path / "adapter", init="pissa", rslora=True, modules_to_save=["lm_head"])
    shape = read_adapter_shape(folder)
    assert shape | {"rank": 8, "rslora": True, "dora": False, "modules_to_save": ("lm_head",)} == shape
    refuse_misfit_adapter(folder, str(tiny_model))
    wider = changed_copy(tiny_model, tmp_path / "wider", intermediate_size=512)
    with pytest.raises(UserError, match=r"was trained on .*, a model of another architecture than"):
        refuse_misfit_adapter(folder, str(wider))
    change_json(folder / "adapter_config.json", base_model_name_or_path="some/model")
    with pytest.raises(UserError, match=r"does not fit .*: .*(down|gate|up)_proj.lora_. has shape|has shape"):
        refuse_misfit_adapter(folder, str(wider))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "fits a base that this init has changed. Convert it"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern, which is not supported"),
        ({"bias": "all"}, "uses bias, which is not supported"),
        ({"peft_type": "IA3"}, "only LoRA and its variants"),
        ({"peft_type": "NONE_SUCH"}, "adapter_config.json cannot be read"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a number > 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number > 0"),
        ({"layers_pattern": "((a|.)+)+$"}, "layers_pattern has .*, expected names of modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the head cannot have LoRA"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, folder = made(tiny_model, tmp_path / "adapter")
    change_json(folder / "adapter_config.json", **change)
    with pytest.raises(UserError, match=message):
        refuse_misfit_adapter(folder, str(tiny_model))


@pytest.mark.timeout(60)
def test_a_regular_expression_of_a_folder_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    """peft would match the expression against the name of every module, here for hours."""
    _, folder = made(tiny_model, tmp_path / "adapter")
    named = read_adapter_config(folder).target_modules
    change_json(folder / "adapter_config.json", target_modules=r".*model.*((((a|.)+)+)+)+$Z")
    refuse_misfit_adapter(folder, str(tiny_model))
    found = read_adapter_config(folder).target_modules
    assert {name.rpartition(".")[2] for name in found} == set(named)
    assert all(name.startswith("model.layers.") for name in found)
    with_adapter(load_causal_lm(str(tiny_model), dtype=torch.float32), str(folder))


def test_a_folder_that_is_none_damaged_or_without_a_weight_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an adapter folder"):
        refuse_misfit_adapter(tiny_model, str(tiny_model))
    _, folder = made(tiny_model, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: value for key, value in whole.items() if key != name}, weights)
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight: it is not in the file"):
        refuse_misfit_adapter(folder, str(tiny_model))
    for changes, message in (
        ({name.replace("q_proj", "r_proj"): torch.zeros(1)}, r"r_proj\.lora_A\.weight: the model has no such weight"),
        ({name: torch.full_like(whole[name], float("nan"))}, "holds NaN or infinite values in base_model"),
    ):
        save_file(whole | changes, weights)
        with pytest.raises(UserError, match=message):
            load_trainable_adapter(load_causal_lm(str(tiny_model), dtype=torch.float32), folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged or incomplete"):
        refuse_misfit_adapter(folder, str(tiny_model))
    weights.unlink()
    with pytest.raises(UserError, match="only adapters in the safetensors format are loaded"):
        refuse_misfit_adapter(folder, str(tiny_model))
    weights.touch()
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list, expected an object"):
        read_adapter_shape(folder)
