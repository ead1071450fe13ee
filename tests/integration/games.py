"""Runs on the guessing game, with the written records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.models.files.tiny import EOS
from tests.integration.recipes import ONLINE, merge, write_config

PPO = {"name": "ppo", "critic_lr": 1e-3, "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"}}

LOGIT = 40.0  # logit of the next token, so large that no other token is drawn

GAME: dict[str, Any] = {
    "data": {
        "train": {"task": "guessing_game", "split": "train", "size": 64},
        "eval": {"task": "guessing_game", "split": "eval", "size": 8},
        "max_prompt_tokens": 16,
    },
    "rollouts": {
        "max_new_tokens": 6,
        "environment": {"name": "guess_number", "args": {"low": 1, "high": 7}, "max_turns": 3, "max_tokens": 96},
    },
    "rewards": {
        "won": {"environment": True},
        "digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}},
    },
    "train": {"steps": 2},
}


def config(folder: Path, name: str, **changes: Any) -> Path:
    return write_config(
        folder / f"{name}.yaml",
        {"algorithm": PPO, **changes, "run": {"name": name, "dir": str(folder), "seed": 3}},
        base=merge(merge(ONLINE, {"data": {"apply_chat_template": None}}), GAME),
    )


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "samples" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def chain(tiny_model: Path, folder: Path, follows: Mapping[str, str], *, logit: float = LOGIT) -> Path:
    """Return the tiny model reduced to a table: after the left token comes the right token, or an equally likely
    character of the right text.

    Attention and MLP add nothing, so the head sees the last token's embedding, scaled by the norm to length sqrt(96).
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, after in follows.items():
            now, *then = tokenizer.convert_tokens_to_ids([token, *([EOS] if after == EOS else after)])
            state = model.model.norm(model.model.embed_tokens.weight[now])
            model.lm_head.weight[then] += logit * state / state.square().sum()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
