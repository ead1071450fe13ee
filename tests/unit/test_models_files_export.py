"""Exported folders load in transformers, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf.models.files.export import export_model, name_padding
from rlhf.models.files.loading import load_causal_lm, load_critic, load_tokenizer
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.weights import weight_sources
from rlhf.models.packed.heads import sequence_scores
from tests.fixtures.models import change_json, changed_copy

LOADS = (load_critic, load_causal_lm)


def streamed(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights in the same buffer, as a gathering engine may do."""
    buffer = torch.empty(max(p.numel() for p in model.parameters()))
    for source in weight_sources(model):
        weight = source.make()
        view = buffer[: weight.numel()].view_as(weight)
        view.copy_(weight)
        yield source.name, view


def same_weights(one: Any, other: Any) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_round_trip(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    source = str(build_tiny_llama(tmp_path / "source", seed=1, tied=tied))
    model, tokenizer = load_causal_lm(source, dtype=torch.float32), load_tokenizer(source)
    folder = tmp_path / "final"
    export_model(folder, streamed(model), model, tokenizer, dtype=torch.float32, shard_bytes=shard_bytes)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert same_weights(model, loaded)
    assert loaded.config.use_cache
    assert AutoTokenizer.from_pretrained(folder).vocab_size == tokenizer.vocab_size
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)


def test_a_generation_config_that_transformers_does_not_save_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    """Vicuna has a temperature without sampling. from_pretrained only warns."""
    model, tokenizer = load_causal_lm(str(tiny_model), dtype=torch.float32), load_tokenizer(str(tiny_model))
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, pad_token_id=-1)
    export_model(tmp_path / "final", streamed(model), model, tokenizer, dtype=torch.float32)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config
    assert (kept.temperature, kept.top_p, kept.pad_token_id) == (0.9, 0.6, -1)


def test_a_model_with_its_own_code_loads_without_the_folder_it_came_from(tiny_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    code = "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    (source / "modeling_own.py").write_text(code)
    own = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_json(source / "config.json", architectures=["OwnForCausalLM"], auto_map=own)
    model = load_causal_lm(str(source), dtype=torch.float32, trust_remote_code=True)
    export_model(tmp_path / "final", streamed(model), model, load_tokenizer(str(source)), dtype=torch.float32)
    shutil.rmtree(source)
    loaded = load_causal_lm(str(tmp_path / "final"), dtype=torch.float32, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert same_weights(model, loaded)


def test_files_have_the_mode_of_the_process_and_survive_a_failed_export(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_causal_lm(str(tiny_model), dtype=torch.float32), load_tokenizer(str(tiny_model))
    umask = os.umask(0o027)
    try:
        export_model(tmp_path / "final", streamed(model), model, tokenizer, dtype=torch.float32)
    finally:
        os.umask(umask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "final").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    assert ".mode" not in modes
    before = (tmp_path / "final" / "model.safetensors").read_bytes()

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(streamed(model)))
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        export_model(tmp_path / "final", broken(), model, tokenizer, dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pad_token": None},  # as in Llama 3, another token of the vocabulary serves
        {"pad_token": "<|eos|>"},
        {"pad_token": "<|assistant|>"},  # a token of the chat template
    ],
    ids=str,
)
def test_transformers_scores_a_padded_batch_as_it_was_trained(
    tiny_model: Path, tmp_path: Path, changes: dict[str, str | None]
) -> None:
    """Sequences of unequal lengths end in the end of sequence. The score is the head's value at that token."""
    changed_copy(tiny_model, tmp_path / "base", **({"pad_token_id": None} if changes else {}))
    change_json(tmp_path / "base" / "tokenizer_config.json", **changes)
    (tmp_path / "base" / "special_tokens_map.json").unlink(missing_ok=True)
    model = load_critic(str(tmp_path / "base"), dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    texts = ["1+2=3<|eos|>", "12+34+56=102<|eos|>", "7<|eos|>"]
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    ids = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    with torch.no_grad():
        trained = sequence_scores(model, torch.cat(ids), torch.tensor([len(one) for one in ids]))
    export_model(tmp_path / "final", streamed(model), model, tokenizer, dtype=torch.float32)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert same_weights(model, load_critic(str(tmp_path / "final"), dtype=torch.float32))
    for side in ("left", "right"):
        reader = AutoTokenizer.from_pretrained(tmp_path / "final", padding_side=side)
        assert reader.pad_token == "<|pad|>"
        assert loaded.config.pad_token_id == reader.pad_token_id != reader.eos_token_id
        with torch.no_grad():
            scores = loaded(**reader(texts, padding=True, return_tensors="pt")).logits[:, 0]
        torch.testing.assert_close(scores, trained, rtol=1e-5, atol=1e-5)


def test_without_a_token_to_pad_with_transformers_refuses_a_batch(tiny_model: Path) -> None:
    """A language model keeps its padding."""
    tokenizer, models = load_tokenizer(str(tiny_model)), [load(str(tiny_model), dtype=torch.float32) for load in LOADS]
    models[0].config.vocab_size = 256  # a vocabulary without the special tokens
    for model in models:
        model.config.pad_token_id = None
        name_padding(model.config, tokenizer)
        assert model.config.pad_token_id is None
