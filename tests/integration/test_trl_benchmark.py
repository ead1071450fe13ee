"""TRL's side of the benchmarks runs on the installed TRL. Skipped without TRL, which `make benchmarks` installs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.online import PROMPTS, read_trl, train_trl

pytest.importorskip("trl")


def test_trl_trains_the_tiny_model_for_a_step(tiny_model: Path, tmp_path: Path) -> None:
    model, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    rows = [json.dumps({"prompt": f"{index % 10}+2="}) for index in range(2 * PROMPTS)]
    prompts.write_text("\n".join(rows), encoding="utf-8")
    train_trl("trl", model, prompts, 1, tmp_path)
    assert read_trl("trl", tmp_path, 1, 0.0).response_tokens > 0
