"""Incomplete, damaged and hostile model folders give a single error before the start, and again at load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config.schema.model import RewardModelConfig
from rlhf.errors import UserError
from rlhf.models.files.folder_check import refuse_broken_weights
from rlhf.models.files.loading import load_causal_lm, load_critic, load_model_config, refuse_missing_weights
from rlhf.models.on_disk import find_model
from rlhf.models.reward_models import load_reward_model
from rlhf.preflight.models import refuse_unusable_reward_model
from tests.fixtures.models import change_json
from tests.tiny_architectures import tiny_model as model_of


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **values: object) -> Path:
    change_json(folder / "config.json", **values)
    return folder


def without(folder: Path, *names: str) -> Path:
    """Remove the weights of these names from a folder."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not any(part in name for part in names)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LOADS: dict[str, Callable[[str], Any]] = {
    "before the start": refuse_missing_weights,
    "generate, serve, eval": lambda path: find_model(path, trust_remote_code=False, device="cpu"),
    "policy": lambda path: load_causal_lm(path, dtype=torch.float32),
    "critic": lambda path: load_critic(path, dtype=torch.float32),
    "before a critic": lambda path: refuse_missing_weights(path, scalar=True),
}


@pytest.mark.parametrize("load", LOADS)
def test_a_folder_that_lacks_weights_is_refused(folder: Path, load: str) -> None:
    LOADS[load](str(folder))
    without(folder, "layers.0.self_attn.q_proj", "layers.1.mlp")
    with pytest.raises(UserError, match=r"lacks 4 of its weights, .*model\.layers\.0\.self_attn\.q_proj\.weight"):
        LOADS[load](str(folder))


def test_a_head_that_is_not_tied_is_not_made_new(folder: Path) -> None:
    with pytest.raises(UserError, match=r"lacks 1 of its weights, which would be random: lm_head\.weight"):
        refuse_missing_weights(str(without(folder, "lm_head")))
    refuse_missing_weights(str(folder), scalar=True)  # a scalar model has no language model head
    refuse_missing_weights(str(change(folder, tie_word_embeddings=True)))


def test_a_reward_model_has_its_head(folder: Path, tmp_path: Path) -> None:
    model = load_critic(str(folder), dtype=torch.float32)
    model.save_pretrained(tmp_path / "reward")
    refuse_missing_weights(str(tmp_path / "reward"), scalar=True)
    without(tmp_path / "reward", "score")
    for load in (
        lambda path: refuse_missing_weights(path, scalar=True),
        lambda path: refuse_unusable_reward_model(RewardModelConfig(model=path), key="reward.model"),
        lambda path: load_reward_model(path, dtype=torch.float32),
    ):
        with pytest.raises(UserError, match=r"lacks 1 of its weights, which would be random: score\.weight"):
            load(str(tmp_path / "reward"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phimoe", "gpt2", "qwen3_5_text", "rwkv"])
def test_fused_and_renamed_weights_are_known(name: str, tmp_path: Path) -> None:
    model_of(name).save_pretrained(tmp_path)
    refuse_missing_weights(str(tmp_path))
    names = sorted(load_file(tmp_path / "model.safetensors"))
    without(tmp_path, next((name for name in names if "expert" in name), names[len(names) // 2]))
    with pytest.raises(UserError, match=r"lacks \d of its weights|cannot be loaded \(RuntimeError"):
        refuse_missing_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected an integer from 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected an integer from 1"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, expected an integer from 1 to 1,000"),
        ({"hidden_size": -1}, "hidden_size is -1, expected an integer from 1"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, expected"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "text_config.num_hidden_layers is 10000000, expected"),
        ({"intermediate_size": 128}, r"do not fit its config.json: .*down_proj.weight is \[96, 256\], expected"),
        ({"head_dim": 0}, "cannot be loaded|do not fit"),
        ({"num_attention_heads": 3}, "cannot be loaded|do not fit"),
        ({"vocab_size": "many"}, "cannot be loaded"),
    ],
)
def test_sizes_that_cannot_be_are_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_missing_weights(str(change(folder, **values)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_config_json_names_is_not_fetched(folder: Path, key: str) -> None:
    model = load_causal_lm(str(change(folder, **{key: "kernels-community/flash-attn2"})), dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("text", ["[]", "null", '{"weight_map": null}', '{"weight_map": {"a": 1}}', "{", "[" * 10**5])
def test_a_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model.safetensors.index.json"):
        refuse_broken_weights(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.timeout(20)
def test_a_pipe_in_a_folder_is_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for check in (refuse_broken_weights, lambda path: load_model_config(str(path))):
        with pytest.raises(UserError, match=rf"{name} is neither a file nor a folder"):
            check(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[1]", "holds a JSON list, expected an object"),
        ("chat_template.jinja", "x" * (2**20 + 1), r"template.jinja has 1,048,577 bytes, expected at most 1,048,576"),
    ],
    ids=["no object", "absurd size"],
)
def test_a_file_that_is_no_config_is_refused(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_model_config(str(folder))
