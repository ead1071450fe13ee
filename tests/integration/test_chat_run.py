"""A run has unusual text: a custom chat template, stops by id, a penalty, and a too long row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.integration.recipes import one_thread, rows, train_here, write_config

TEMPLATE = (
    "{%- for m in messages -%}{{- m.role + ':' + m.content + '<|reserved_5|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:' if not brief else 'a:' -}}{%- endif -%}"
)


@pytest.mark.timeout(300)
def test_a_run_with_a_chat_template_of_its_own(ray_local: None, tmp_path: Path) -> None:
    """The untrained model is near uniform over 320 tokens, so stops by id end some responses."""
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    data = [{"prompt": f"{i}+1="} for i in range(7)] + [{"prompt": "x" * 40}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    changes: dict[str, Any] = {
        "run": {"name": "chat", "dir": str(tmp_path)},
        "algorithm": {"name": "grpo", "correction": {"preset": "token_tis"}},
        "data": {
            "train": str(tmp_path / "prompts.jsonl"),
            "eval": None,
            "apply_chat_template": True,
            "chat_template": str(tmp_path / "mine.jinja"),
            "chat_template_kwargs": {"brief": True},
            "max_prompt_tokens": 20,
            "too_long": "skip",
            "max_unusable_fraction": 0.2,
        },
        "rollouts": {"max_new_tokens": 24, "min_p": 0.01, "repetition_penalty": 1.3, "stop_token_ids": [*range(20)]},
        "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
        "train": {"steps": 1},
        "eval": None,
        "tracking": {"samples_per_step": 32},
        "cluster": {"roles": one_thread("policy", "rollout")},
    }
    train_here(write_config(tmp_path / "run.yaml", changes))
    run = tmp_path / "chat"
    (row,) = rows(run)
    assert row["experience/rollout_logprob_diff/max"] > 0.01  # the trainer does not apply the penalty
    (left_out,) = [json.loads(line) for line in (run / "errors.jsonl").read_text().splitlines()]
    assert left_out["source"].endswith("prompts.jsonl:8")
    exported = AutoTokenizer.from_pretrained(run / "final")
    end = exported.convert_tokens_to_ids("<|reserved_5|>")
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    ends = {sample["tokens"]["ids"][-1] for sample in samples if len(sample["tokens"]["ids"]) < 24}
    assert ends <= {*range(20), 257, end}
    assert ends & {*range(20)}
    assert all(sample["prompt"].endswith("<|reserved_5|>a:") for sample in samples)
    conversation = [{"role": "user", "content": "hi"}]
    text = exported.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == "user:hi<|reserved_5|>a:"
