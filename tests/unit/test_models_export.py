"""Exported folders load in transformers, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.models.export import export_model
from rlhf.models.loading import load_causal_lm, load_critic, load_tokenizer
from rlhf.models.tiny import build_tiny_llama
from rlhf.models.weights import weight_sources


def streamed(model: Any) -> Iterator[tuple[str, Tensor]]:
    """One buffer for all weights, as a gathering engine may reuse its own."""
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
    export_model(folder, streamed(model), model.config, tokenizer, dtype=torch.float32, shard_bytes=shard_bytes)
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


def test_a_critic_comes_back_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    critic = load_critic(str(tiny_model), dtype=torch.float32)
    torch.nn.init.ones_(critic.score.weight)
    tokenizer = load_tokenizer(str(tiny_model))
    export_model(tmp_path / "critic", streamed(critic), critic.config, tokenizer, dtype=torch.float32)
    assert same_weights(critic, load_critic(str(tmp_path / "critic"), dtype=torch.float32))


def test_a_failure_leaves_the_old_folder_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_causal_lm(str(tiny_model), dtype=torch.float32), load_tokenizer(str(tiny_model))
    export_model(tmp_path / "final", streamed(model), model.config, tokenizer, dtype=torch.float32)
    before = (tmp_path / "final" / "model.safetensors").read_bytes()

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(streamed(model)))
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        export_model(tmp_path / "final", broken(), model.config, tokenizer, dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before
