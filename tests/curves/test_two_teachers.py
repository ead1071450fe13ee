"""Two teachers by column each move only their own rows, in a run without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.files.load import load
from rlhf.controller.learning import OnlineRoles
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.objectives.distillation import forward_kl
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.in_process import run

SOURCES = {"math": "1+1", "code": "def"}  # the prompt of each teacher's rows


def unigram_teacher(folder: Path, *, seed: int) -> Path:
    """Write a teacher with the same distribution over the tokens after any text."""
    build_tiny_llama(folder, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = model.get_input_embeddings().weight[0].clone()
        model.get_output_embeddings().weight.mul_(12.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        "divergence: forward_kl, top_k: 64",
        "divergence: sampled_reverse_kl",
        pytest.param("divergence: jsd, on_policy_share: 0.5", marks=pytest.mark.slow),
    ],
)
async def test_each_teacher_moves_its_own_rows(tmp_path: Path, alone: None, settings: str) -> None:
    rows = [{"prompt": prompt, "source": name, "completion": "abc"} for name, prompt in SOURCES.items()] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {name: unigram_teacher(tmp_path / name, seed=seed) for seed, name in enumerate(SOURCES, 1)}
    config = tmp_path / "run.yaml"
    teachers = ", ".join(f"{name}: {{model: {path}, dtype: float32}}" for name, path in paths.items())
    config.write_text(
        f"run: {{name: t, dir: {tmp_path}/runs, seed: 0}}\n"
        "policy: {model: 'tiny:llama', dtype: float32}\n"
        f"teacher: {{{teachers}}}\n"
        f"algorithm: {{name: on_policy_distillation, teacher_column: source, {settings}}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval: {tmp_path}/rows.jsonl, apply_chat_template: false,\n"
        "  max_prompt_tokens: 16}\n"
        "rollouts: {prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens: 4}\n"
        "eval: {every: 100, temperature: 1.0}\n"
        "train: {steps: 30, sequences_per_update: 32, max_tokens_per_microbatch: 1024, lr: 3.0e-3}\n"
    )
    held: dict[str, Any] = {}

    def watch(roles: OnlineRoles) -> OnlineRoles:
        held["student"] = roles.policy
        return roles

    metrics: Any = list(read_metrics(await run(load(config, []), watch=watch)))
    student = held["student"].worker.engine.module
    student.set_attn_implementation("eager")
    models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in paths.items()}
    tokenizer = AutoTokenizer.from_pretrained(paths["math"])
    for name, prompt in SOURCES.items():
        before, after = (row[f"eval/heldout/kl_teacher/{name}"] for row in (metrics[0], metrics[-1]))
        assert after < 0.5 * before, (name, before, after)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            ours = student(ids).logits[0, -1].log_softmax(-1)
            theirs = {other: model(ids).logits[0, -1].log_softmax(-1) for other, model in models.items()}
        distances = {other: float(forward_kl(ours, taught)) for other, taught in theirs.items()}
        (other,) = set(SOURCES) - {name}
        assert distances[name] < 0.75 * distances[other], (name, distances)
