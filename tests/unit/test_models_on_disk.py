"""A name means a model folder, a run, an adapter or a model of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlhf.errors import UserError
from rlhf.models.adapters.settings import base_of
from rlhf.models.on_disk import ModelOnDisk, find_model, may_ask_the_hub, refuse_unservable
from rlhf.preflight.models import refuse_too_long
from tests.fixtures.models import changed_copy
from tests.merging_models import make_adapter
from tests.tiny_architectures import tiny_model as model_of


def find(path: Path) -> ModelOnDisk:
    return find_model(str(path), trust_remote_code=False, device="cpu")


def adapter(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    return folder


def test_a_model_folder(tiny_model: Path) -> None:
    found = find(tiny_model)
    assert found.base == found.tokenizer == str(tiny_model)
    assert (found.adapter, found.lora_rank) == (None, None)
    assert (found.dtype, found.max_length) == ("float32", 2048)


def test_a_reward_model_is_no_language_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed_copy(tiny_model, tmp_path / "reward", architectures=["LlamaForSequenceClassification"])
    lora = adapter(tmp_path / "lora", base_model_name_or_path=str(folder))
    shutil.copy(tiny_model / "model.safetensors", lora / "adapter_model.safetensors")
    for path in (folder, lora):
        with pytest.raises(UserError, match="is a LlamaForSequenceClassification, not a causal language model"):
            find(path)


def test_a_run_is_its_final_model_and_a_pipeline_names_its_runs(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.resolved.yaml").write_text("")
    with pytest.raises(UserError, match="is a run without final/, because the run has not ended"):
        find(tmp_path)
    for stage in ("sft", "ppo"):
        (tmp_path / stage / "final").mkdir(parents=True)
    with pytest.raises(UserError, match=f"name one of them: {tmp_path.name}/ppo, {tmp_path.name}/sft"):
        find(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "final")
    found = find(tmp_path)
    assert (found.name, found.base) == (str(tmp_path), str(tmp_path / "final"))


def test_an_adapter_names_its_base(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_model, seed=0, rank_pattern={"q_proj": 8})
    found = find(folder)
    assert (found.base, found.adapter, found.lora_rank) == (str(tiny_model), str(folder), 8)
    assert found.tokenizer == str(folder)
    (folder / "tokenizer_config.json").unlink()
    assert find(folder).tokenizer == str(tiny_model)
    weights = load_file(folder / "adapter_model.safetensors")
    some = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lacks 4 of its weights, .*layers\.1\.mlp\.down_proj\.lora_A\.weight"):
        find(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        find(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "base_model_name_or_path is None, so the base model is unknown"),
        ({"r": "x"}, "the rank r is 'x', expected an integer >= 1"),
        ({"r": None}, "the rank r is None, expected an integer >= 1"),
        ({"rank_pattern": {"q_proj": 0}}, "the rank q_proj is 0, expected an integer >= 1"),
        ({"rank_pattern": [8]}, r"the rank rank_pattern is \[8\], expected an integer >= 1"),
        ({"peft_type": None}, "is not the configuration of an adapter, because it names no peft_type"),
        ({"base_model_name_or_path": "x", "peft_type": "IA3"}, "is an adapter of type IA3"),
        ({"base_model_name_or_path": "/no/such/base"}, "The model folder /no/such/base does not exist"),
    ],
)
def test_a_wrong_adapter_says_why(tmp_path: Path, config: dict[str, object], message: str) -> None:
    folder = adapter(tmp_path / "a", **config)
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=message):
        find(folder)


@pytest.mark.parametrize(("text", "message"), [("[]", "holds a JSON list"), ("{", "cannot be read as JSON")])
def test_a_damaged_adapter_config_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    for look in (find, lambda path: may_ask_the_hub(str(path))):
        with pytest.raises(UserError, match=f"adapter_config.json.* {message}"):
            look(tmp_path)


def test_a_model_may_have_no_limit(tmp_path: Path) -> None:
    """BLOOM has no table of positions, so the config has no max_position_embeddings."""
    model_of("bloom").save_pretrained(tmp_path)
    found = find(tmp_path)
    assert found.max_length is None
    refuse_too_long([], [], found, max_new_tokens=10**9)


def test_adapters_that_engines_cannot_serve(tiny_model: Path, tmp_path: Path) -> None:
    refuse_unservable(find(tiny_model))
    make_adapter(tmp_path / "plain", tiny_model, seed=0)
    make_adapter(tmp_path / "wrong", tiny_model, seed=0, use_dora=True, modules_to_save=["lm_head"])
    refuse_unservable(find(tmp_path / "plain"))
    with pytest.raises(UserError, match="has use_dora, modules_to_save, which engines cannot serve"):
        refuse_unservable(find(tmp_path / "wrong"))


def test_a_name_that_is_no_folder_may_be_the_hubs_and_have_a_revision(tiny_model: Path, tmp_path: Path) -> None:
    for base, expected in (("owner/name", "owner/name@v1"), (str(tiny_model), None), ("/no/such/base", None)):
        folder = adapter(tmp_path / str(len(base)), base_model_name_or_path=base, revision="v1")
        assert base_of(folder)[0] == (expected or base)
        assert may_ask_the_hub(str(folder)) == (base != str(tiny_model))
    assert may_ask_the_hub("owner/name")
    assert not may_ask_the_hub(str(tiny_model))
