"""The tiny model's folder is an ordinary model, depends only on the seed, and is never half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.files import tiny
from rlhf.models.files.tiny import VOCAB_SIZE, build_tiny_llama


def test_the_model_has_the_promised_shape(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    # Embedding and head 2 * 320 * 96 = 61,440; a layer 2 * 96 * 128 (q, o) + 2 * 96 * 64 (k, v) + 3 * 96 * 256 (MLP)
    # + 2 * 96 (norms) = 110,784, three times; the last norm 96.
    assert sum(p.numel() for p in model.parameters()) == 61_440 + 3 * 110_784 + 96
    assert model.dtype == torch.float32
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim == 2])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert weights.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 257


def test_the_tokenizer_is_one_id_a_byte_and_reads_back(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "".join(map(chr, range(1, 0x250))) + "  8+3=\n\nなに "
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 257, None)
    assert tokenizer("a<|eos|>").input_ids == [97, 257]
    assert tokenizer.decode([97, 319, 257], skip_special_tokens=True) == "a"


def test_the_chat_template_ends_every_turn_and_refuses_other_roles(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    render: Callable[..., Any] = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == "<|user|>hi<|eos|><|assistant|>yes<|eos|>"
    assert render(messages[:1], tokenize=False, add_generation_prompt=True) == "<|user|>hi<|eos|><|assistant|>"
    assert render([{"role": "tool", "content": "x"}], tokenize=False) == "<|user|>x<|eos|>"
    with pytest.raises(Exception, match="not critic"):
        render([{"role": "critic", "content": "x"}], tokenize=False)


def test_the_seed_alone_decides_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = load_file(build_tiny_llama(tmp_path / "again", seed=0) / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's randomness was used up
    first = load_file(tiny_model / "model.safetensors")
    other = load_file(build_tiny_llama(tmp_path / "other", seed=1) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    tied = AutoModelForCausalLM.from_pretrained(build_tiny_llama(tmp_path / "tied", seed=0, tied=True))
    assert tied.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()


def test_an_existing_folder_is_kept_if_it_is_the_same_and_refused_if_not(tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path / "m", seed=0)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_llama(folder, seed=0) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r'"seed": 1.*"seed": 0'):
        build_tiny_llama(folder, seed=1)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="something else"):
        build_tiny_llama(tmp_path / "mine", seed=0)


def test_two_builders_at_once_leave_one_whole_folder_and_a_failed_build_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: build_tiny_llama(tmp_path / "m", seed=0), range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == VOCAB_SIZE

    def full(folder: Path, *, seed: int, tied: bool) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny, "_write", full)
    with pytest.raises(OSError, match="no space"):
        build_tiny_llama(tmp_path / "other", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
