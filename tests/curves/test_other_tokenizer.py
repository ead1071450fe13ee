"""A student learns from a teacher with another tokenizer beside one with the same tokenizer, in a run without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.files.load import load
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.in_process import run
from tests.curves.test_two_teachers import unigram_teacher
from tests.fixtures.other_tokenizer import merging_tokenizer

PROMPTS = {"same": "1+1", "other": "2+2"}  # of each teacher's rows


def written_by(folder: Path, tokenizer: Any) -> Path:
    """Let a teacher predict some tokens of text alone, the longest ones of its tokenizer among them."""
    unigram_teacher(folder, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.get_output_embeddings().weight
    words = tokenizer.get_vocab()
    kept = [words[word] for word in ("a", "d", "x", "the", "ab", "12", tokenizer.eos_token) if word in words]
    with torch.no_grad():
        direction = model.model(torch.tensor([[0]])).last_hidden_state[0, -1]
        head[kept] += 0.8 * direction / direction.norm()  # raises their logits by about 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
async def test_the_student_moves_to_both_teachers(tmp_path: Path, alone: None) -> None:
    rows = [{"prompt": prompt, "source": name} for name, prompt in PROMPTS.items()] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {
        "same": written_by(tmp_path / "same", byte_tokenizer()),
        "other": written_by(tmp_path / "other", merging_tokenizer()),
    }
    teachers = ", ".join(f"{name}: {{model: {path}, dtype: float32}}" for name, path in paths.items())
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {{name: t, dir: {tmp_path}/runs, seed: 0}}\n"
        "policy: {model: 'tiny:llama', dtype: float32}\n"
        f"teacher: {{{teachers}}}\n"
        "algorithm: {name: on_policy_distillation, teacher_column: source, divergence: forward_kl}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval: {tmp_path}/rows.jsonl, max_prompt_tokens: 16}}\n"
        "rollouts: {prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens: 6}\n"
        "eval: {every: 100, temperature: 1.0}\n"
        "train: {steps: 40, sequences_per_update: 32, max_tokens_per_microbatch: 1024, lr: 3.0e-3}\n"
    )
    metrics: Any = list(read_metrics(await run(load(config, []))))
    first, last = metrics[1], metrics[-1]
    for name in PROMPTS:
        before, after = (row[f"experience/kl_by_teacher/{name}/mean"] for row in (first, last))
        assert after < 0.5 * before, (name, before, after)
    fraction = "update/compared_by_teacher/other/fraction"
    assert first[fraction] < 0.5 < 0.9 < last[fraction], (first[fraction], last[fraction])
    assert last["update/compared_by_teacher/same/fraction"] == 1.0
