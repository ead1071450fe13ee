"""A merge writes a model or an adapter, and refuses wrong inputs before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlhf
from rlhf.cli import main
from rlhf.config.files.load import load_merge_file
from rlhf.config.schema.merge import MergeConfig, MergeRun
from rlhf.merging import merge as merging
from rlhf.merging.merge import merge_models
from rlhf.merging.sources import find_source
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.vision.kinds import is_vision_weight
from rlhf.vision.processor import ImageProcessing
from tests.fixtures.models import change_json, changed_copy
from tests.merging_models import make_adapter, make_models, make_reward_adapter, weights
from tests.tiny_architectures import tiny_model as tiny_architecture


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("merging"))
    make_adapter(folder / "lora_a", folder / "base", seed=1)
    make_adapter(folder / "lora_b", folder / "base", seed=2)
    make_adapter(folder / "lora_rank8", folder / "base", seed=3, rank=8)
    make_adapter(folder / "lora_of_a", folder / "a", seed=3)
    make_reward_adapter(folder / "reward", folder / "base", seed=1)
    (folder / "other").symlink_to(folder / "base")
    return folder


def merge(out: Path, models: Path, names: dict[str, dict[str, Any]] | list[str], **values: Any) -> Path:
    """Merge folders of `models`; `base` is a name too."""
    if isinstance(names, list):
        names = {name: {} for name in names}
    inputs = {name: {"model": str(models / name), **keys} for name, keys in names.items()}
    base = {"base": str(models / values.pop("base"))} if "base" in values else {}
    merge_models(MergeConfig.model_validate({"models": inputs, **base, **values}), out, quiet=True)
    return out


def update(adapter: Path, layer: str = "layers.1.mlp.down_proj") -> torch.Tensor:
    """The change of a layer's weight: alpha / rank * B A."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    found = weights(adapter)
    a, b = (found[f"base_model.model.model.{layer}.lora_{side}.weight"] for side in "AB")
    return settings["lora_alpha"] / settings["r"] * b @ a


@pytest.mark.parametrize("tied", ["", "tied_"])
def test_the_result_is_a_model_folder(tmp_path: Path, models: Path, tied: str) -> None:
    names = {f"{tied}a": {"density": 0.5}, f"{tied}b": {"density": 0.5}}
    out = merge(tmp_path / "merged" / "it", models, names, method="ties", base=f"{tied}base")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is bool(tied)
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out, models / "a")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert model.generation_config.eos_token_id == tokenizers[1].eos_token_id
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["it"]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3"])
def test_models_that_see_keep_towers_and_processors(tmp_path: Path, kind: str) -> None:
    for seed, name in enumerate("ab"):
        build_tiny_vision(tmp_path / name, kind, seed=seed)
    out = merge(tmp_path / "out", tmp_path, ["a", "b"], method="linear", dtype="float32")
    merged, *parts = (weights(tmp_path / name) for name in ("out", "a", "b"))
    assert merged.keys() == parts[0].keys()
    assert any(is_vision_weight(name) for name in merged)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, (parts[0][name] + parts[1][name]) / 2)
    before, after = (ImageProcessing.of_model(str(folder)) for folder in (tmp_path / "a", out))
    assert before is not None
    assert after is not None
    assert after.expansion(40, 24) == before.expansion(40, 24)


def test_the_record_repeats_the_merge(tmp_path: Path, models: Path) -> None:
    names = {"a": {"density": 0.5, "weight": 0.2}, "b": {}}
    torch.manual_seed(3)
    out = merge(tmp_path / "first", models, names, method="dare_linear", base="base", seed=5)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn)  # the merge has not changed the random state
    text = (out / "merge.yaml").read_text()
    assert text.startswith("# made by ray-rlhf ")
    assert "mergekit 0.1.5" in text
    assert load_merge_file(out / "merge.yaml").models["a"].weight == 0.2
    again = rlhf.merge(out / "merge.yaml", [f"merge.out={tmp_path / 'second'}"], quiet=True)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_changed_model_is_read_again(tmp_path: Path, models: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "a")
    shutil.copytree(models / "base", tmp_path / "b")
    first = weights(merge(tmp_path / "one", tmp_path, ["a", "b"], method="linear"))
    (tmp_path / "a" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(models / "b").save_pretrained(tmp_path / "a", max_shard_size="500KB")
    second = weights(merge(tmp_path / "two", tmp_path, ["a", "b"], method="linear"))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_fold(tmp_path: Path, models: Path) -> None:
    out = weights(merge(tmp_path / "out", models, ["lora_a"], method="fold", dtype="float32"))
    base = weights(models / "base")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(out[name], base[name] + update(models / "lora_a"))
    assert torch.equal(out["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    assert out.keys() == base.keys()


def test_fold_keeps_a_generation_config_that_transformers_would_not_save(tmp_path: Path, models: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    make_adapter(tmp_path / "lora", base, seed=1)
    (base / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    out = merge(tmp_path / "out", tmp_path, ["lora"], method="fold")
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").unlink()
    assert not (merge(tmp_path / "without", tmp_path, ["lora"], method="fold") / "generation_config.json").exists()


def test_fold_keeps_the_routing_biases_in_float32(tmp_path: Path, models: Path) -> None:
    model = tiny_architecture("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(models / "base").save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "lora", tmp_path / "base", seed=1, target_modules=["o_proj"])
    out = weights(merge(tmp_path / "out", tmp_path, ["lora"], method="fold"))
    bias = out["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert out["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16


def test_reward_models_and_their_adapters_give_models_that_score_a_batch(tmp_path: Path, models: Path) -> None:
    """Averaging reward models (arXiv:2401.12187) includes the heads."""
    base = changed_copy(models / "base", tmp_path / "base", pad_token_id=None)
    adapters = [make_reward_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate(("one", "two"))]
    heads = [weights(adapter)["base_model.model.score.weight"] for adapter in adapters]
    whole = merge(tmp_path / "whole", tmp_path, ["one"], method="fold", dtype="float32")
    for other, head in (("two", sum(heads) / 2), ("whole", heads[0])):
        out = merge(tmp_path / f"one and {other}", tmp_path, ["one", other], method="linear", dtype="float32")
        model = AutoModelForSequenceClassification.from_pretrained(out)
        torch.testing.assert_close(model.score.weight, head)
        assert model(torch.arange(10).view(2, 5)).logits.shape == (2, 1)
        assert AutoTokenizer.from_pretrained(out).pad_token_id == model.config.pad_token_id
    torch.testing.assert_close(weights(out), weights(whole))


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_exact_combinations_of_adapters(tmp_path: Path, models: Path, method: str) -> None:
    """cat and svd of full rank: the weighted sum of the updates. Ranks 4 + 8 = 12."""
    rank = {"rank": 12} if method == "svd" else {}
    inputs = {
        "v1.5": {"model": str(models / "lora_a"), "weight": 0.5},
        "combined": {"model": str(models / "lora_rank8"), "weight": -2.0},
    }
    values = {"method": method, "output": "adapter", "models": inputs, "dtype": "float32", **rank}
    out = tmp_path / "out"
    merge_models(MergeConfig.model_validate(values), out)
    expected = 0.5 * update(models / "lora_a") - 2.0 * update(models / "lora_rank8")
    torch.testing.assert_close(update(out), expected, rtol=1e-4, atol=1e-6)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (12, str(models / "base"))
    assert AutoTokenizer.from_pretrained(out).chat_template is not None


def test_svd_reduces_the_rank_of_a_single_adapter(tmp_path: Path, models: Path) -> None:
    names = {"lora_rank8": {"weight": 3.0}}
    out = merge(tmp_path / "out", models, names, method="svd", rank=2, output="adapter", dtype="float32")
    left, singular, right = torch.linalg.svd(3.0 * update(models / "lora_rank8"), full_matrices=False)
    expected = left[:, :2] * singular[:2] @ right[:2]
    torch.testing.assert_close(update(out), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2


def test_adapters_of_layers_by_name_by_pattern_and_by_number(tmp_path: Path, models: Path) -> None:
    base, layers = models / "base", ["layers.1.mlp.down_proj", "layers.2.self_attn.q_proj"]
    make_adapter(tmp_path / "number", base, seed=1, layers_to_transform=[0])
    make_adapter(tmp_path / "pattern", base, seed=2, target_modules=r".*\.[12]\.mlp\.down_proj")
    make_adapter(tmp_path / "name", base, seed=3, target_modules=["q_proj"])
    names = ["number", "pattern", "name"]
    out = merge(tmp_path / "out", tmp_path, names, method="cat", output="adapter", dtype="float32")
    for layer, name in zip(layers, names[1:], strict=True):
        torch.testing.assert_close(update(out, layer), update(tmp_path / name, layer), rtol=1e-4, atol=1e-6)
    assert weights(out).keys() == {weight for name in names for weight in weights(tmp_path / name)}


def test_linear_combination_adds_factors(tmp_path: Path, models: Path) -> None:
    """A = sum sqrt(w s) A_i, B likewise, with w = 1 and s = alpha / rank = 2: sqrt(2) each."""
    out = merge(tmp_path / "out", models, ["lora_a", "lora_b"], method="linear", output="adapter", dtype="float32")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    a, b = (weights(models / adapter)[name] for adapter in ("lora_a", "lora_b"))
    torch.testing.assert_close(weights(out)[name], 2**0.5 * (a + b))


@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"])
def test_other_combinations_of_adapters(tmp_path: Path, models: Path, method: str) -> None:
    names = {name: {"density": 0.5} for name in ("lora_a", "lora_b")}
    kept = update(merge(tmp_path / "out", models, names, method=method, output="adapter"))
    assert kept.dtype == torch.bfloat16
    assert torch.isfinite(kept).all()
    assert kept.any()
    again = update(merge(tmp_path / "again", models, names, method=method, output="adapter"))
    assert torch.equal(kept, again)


def test_the_base_of_an_adapter_is_downloaded_at_its_revision(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shutil.copytree(models / "lora_a", tmp_path / "lora")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="org/base", revision="v1")
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options.get("revision")))
        return str(models / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_source("merge.models.a", "a", str(adapter)).folder == models / "base"
    assert asked == [("org/base", "v1")]


def test_without_mergekit(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", None)
    with pytest.raises(rlhf.UserError, match=r"linear needs mergekit, .*: pip install 'ray-rlhf\[merging\]'"):
        merge(tmp_path / "out", models, ["a", "b"], method="linear")
    merge(tmp_path / "folded", models, ["lora_a"], method="fold")


def test_a_full_disk(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(rlhf.UserError, match=r"writes 0\.0 GB to .*, which has 0\.0 GB free"):
        merge(tmp_path / "deep" / "out", models, ["a", "b"], method="linear")
    assert not (tmp_path / "deep").exists()


def test_a_failure_leaves_nothing(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: MergeConfig, folders: dict[str, Path], out: Path, *, quiet: bool) -> None:
        (out / "model.safetensors").write_text("half")
        raise rlhf.RunError("broke")

    monkeypatch.setattr(merging, "run_mergekit", fail)
    with pytest.raises(rlhf.RunError, match="broke"):
        merge(tmp_path / "out", models, ["a", "lora_b"], method="linear")
    assert list(tmp_path.iterdir()) == []


KINDS = "architecture is LlamaForSequenceClassification in the first model and LlamaForCausalLM in the second"


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["a", "none"], {"method": "linear"}, r"merge\.models\.none: the folder .*none does not exist"),
        (["a", "tied_b"], {"method": "linear"}, r"models\.a .*models\.tied_b .* tie_word_embeddings"),
        (["a", "lora_a"], {"method": "fold"}, "takes one model"),
        (["a"], {"method": "fold"}, r"merge\.models\.a: .* is not an adapter"),
        (["other"], {"method": "slerp", "base": "base"}, r"merge\.base: is the same model as merge\.models\.other"),
        (["a"], {"method": "cat", "output": "adapter"}, "is a whole model, and merge.output is adapter"),
        (["lora_a", "lora_rank8"], {"method": "linear", "output": "adapter"}, "ranks 4 and 8, .* use cat or svd"),
        (["lora_a", "lora_of_a"], {"method": "cat", "output": "adapter"}, "adapters of different bases"),
        (["lora_a"], {"method": "svd", "output": "adapter", "rank": 97}, r"97 is more than 96"),
        (["a"], {"method": "passthrough", "slices": [{"model": "a", "layers": [0, 4]}]}, r"it has 3 layers"),
        (["reward", "lora_a"], {"method": "linear"}, rf"models\.reward .*models\.lora_a .*{KINDS}"),
        (["reward", "a"], {"method": "linear"}, rf"models\.reward .*models\.a .*{KINDS}"),
    ],
)
def test_refused(tmp_path: Path, models: Path, names: list[str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(rlhf.UserError, match=message):
        merge(tmp_path / "out", models, names, **values)
    assert not (tmp_path / "out").exists()


def add_token(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)


def add_rows(model: Path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(model)
    larger.resize_token_embeddings(352)
    larger.save_pretrained(model)


def lose_part(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="500KB")
    (model / "model-00002-of-00004.safetensors").unlink()


def narrow(adapter: Path) -> None:
    narrower = {name: weight[:, :-1].contiguous() for name, weight in weights(adapter).items()}
    save_file(narrower, adapter / "adapter_model.safetensors")


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / file).write_text(text)


FILE = "model.safetensors"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {  # of model b, or of an adapter; the message
    "vocabulary": (add_token, r"different vocabularies of 320 and 321 tokens: '<new>'"),
    "template": (written("chat_template.jinja", "{{ messages }}"), r"different chat templates; set merge\.tokenizer"),
    "size": (
        add_rows,
        r"differ in size: lm_head\.weight is \[320, 96\] in the first model and \[352, 96\] in " r"the second",
    ),
    "cut": (lambda b: os.truncate(b / FILE, 1000), r"model\.safetensors cannot be read \(.*\); copy or download it"),
    "widths": (
        lambda b: change_json(b / "config.json", intermediate_size=128),
        "intermediate_size is 256 in the first model and 128",
    ),
    "part": (lose_part, r"lacks model-00002-of-00004\.safetensors, which its index names"),
    "pickle": (lambda b: (b / FILE).rename(b / "pytorch_model.bin"), "has no safetensors file"),
    "architecture": (
        lambda b: change_json(b / "config.json", architectures=["MistralForCausalLM"]),
        "architecture is LlamaForCausalLM in the first model and MistralForCausalLM in the second",
    ),
    "adapter": (written("adapter_config.json", "[]"), "adapter_config.json holds a JSON list"),
    "rank": (
        written("adapter_config.json", '{"peft_type": "LORA", "r": "x"}'),
        "the rank r is 'x', expected an integer >= 1",
    ),
    "config": (written("config.json", "{"), "cannot be read as JSON"),
    "tokenizer": (written("tokenizer.json", "{}"), "a file of it is damaged"),
    "adapter's shapes": (narrow, "the adapter .*b cannot be put on its base model"),
    "stacked experts": (
        lambda b: change_json(b / "adapter_config.json", target_parameters=["gate_up_proj"]),
        "the adapter .* has target_parameters, and such",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_do_not_fit_or_are_damaged_are_named(tmp_path: Path, models: Path, change: str) -> None:
    of_adapters = change in ("adapter's shapes", "stacked experts")
    for name in ("a", "b"):
        shutil.copytree(models / (f"lora_{name}" if of_adapters else name), tmp_path / name)
    damage, message = CHANGES[change]
    damage(tmp_path / "b")
    values: dict[str, Any] = {"method": "cat", "output": "adapter"} if of_adapters else {"method": "linear"}
    if change == "widths":
        values = {"method": "passthrough", "slices": [{"model": name, "layers": [0, 1]} for name in ("a", "b")]}
    with pytest.raises(rlhf.UserError, match=rf"merge\.models\.b\b.*{message}"):
        merge(tmp_path / "out", tmp_path, ["a", "b"], **values)
    if change == "template":
        out = merge(tmp_path / "out", tmp_path, ["a", "b"], method="linear", tokenizer="b")
        assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"


def test_the_command_and_the_python_call(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "merge.yaml", tmp_path / "out"
    inputs = {name: {"model": str(models / name)} for name in ("a", "b")}
    file.write_text(json.dumps({"merge": {"method": "linear", "models": inputs, "out": str(out)}}))
    assert main(["merge", str(file), "merge.dtype=float32", "--quiet"]) == 0
    assert capsys.readouterr().out == f"done: {out}\n"
    assert weights(out)["lm_head.weight"].dtype == torch.float32
    below = file / "y" / "z"
    for argument, message in (
        ("merge.dtype=float32", f"merge.out: {out} exists; remove the folder or name another folder."),
        (f"merge.out={below}", f"merge.out: {below} cannot be made, since {file} is a file; name another folder."),
    ):
        assert main(["merge", str(file), argument]) == 2
        assert capsys.readouterr().err == f"rlhf: error: {message}\n"
    run = MergeRun.model_validate({"method": "linear", "models": inputs, "out": tmp_path / "called"})
    assert rlhf.merge(run, quiet=True) == tmp_path / "called"
    with pytest.raises(rlhf.UserError, match="overrides can change only a file"):
        rlhf.merge(run, ["merge.t=1"])
