"""A configuration, groups of responses, and comparisons of metrics for tests of workers on gangs of ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.files.load import checked
from rlhf.config.schema.root import Config
from rlhf.models.files.tiny import VOCAB_SIZE, build_tiny_llama, byte_tokenizer
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import Rollouts
from tests.integration.recipes import merge

GROUPS, SAMPLES, PROMPT, MOST_NEW = 6, 3, 5, 9
Metrics = list[dict[str, float]]


def worker_config(
    algorithm: Mapping[str, Any],
    model: str,
    folder: str,
    *,
    tokens: int,
    workers: int = 1,
    is_online: bool = True,
    **sections: Any,
) -> Config:
    """Return the configuration of a float32 policy with two minibatches a step. `sections` change keys."""
    online = {
        "data": {"max_prompt_tokens": PROMPT},
        "rollouts": {"prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_new_tokens": MOST_NEW},
        "rewards": {"r": {"function": "f"}},
    }
    base = {
        "run": {"name": "workers", "dir": folder},
        "policy": {"model": model, "dtype": "float32"},
        "algorithm": algorithm,
        "data": {"train": "x.jsonl", "apply_chat_template": False},
        "train": {
            "steps": 2,
            "lr": 1e-2,
            "sequences_per_update": GROUPS * SAMPLES // 2,
            "max_tokens_per_microbatch": tokens,
            "grad_clip": 100.0,
        },
        "cluster": {"roles": {"policy": {"workers": workers}}},
    }
    tree = merge(merge(base, online if is_online else {}), sections)
    return next(iter(checked(Config.model_validate(tree)).stages.values()))


def rollouts_of(group: int) -> Rollouts:
    """Return a group's responses, of 1 to 9 tokens."""
    random = torch.Generator().manual_seed(group)
    prompt = torch.randint(3, 300, (PROMPT,), generator=random)
    sizes = [int(torch.randint(1, MOST_NEW + 1, (), generator=random)) for _ in range(SAMPLES)]
    responses = [torch.randint(3, 300, (size,), generator=random) for size in sizes]
    mask = torch.cat([torch.arange(PROMPT + size) >= PROMPT for size in sizes])
    return Rollouts(
        sequence_ids=torch.arange(group * SAMPLES, (group + 1) * SAMPLES),
        lengths=torch.tensor([PROMPT + size for size in sizes]),
        token_ids=torch.cat([part for response in responses for part in (prompt, response)]),
        response_mask=mask,
        rollout_logprobs=torch.where(mask, -5.0, 0.0),
        versions=torch.where(mask, 0, -1),
    )


def merged(found: Sequence[Sequence[Any]]) -> Metrics:
    """Return the metrics of each part, over all ranks."""
    return [results(merge_metrics(parts)) for parts in zip(*found, strict=True)]


def assert_equal(one: Metrics, two: Metrics, *, keys: Collection[str] = (), rel: float = 2e-4) -> None:
    """Compare all metrics, or only `keys`, up to rounding.

    The number of tokens differs: a prompt may be computed for fewer responses, and a rank without rows computes a row.
    """
    for first, second in zip(one, two, strict=True):
        assert keys or first.keys() == second.keys()
        for key in keys or first.keys() - {"update/tokens/total"}:
            assert first[key] == pytest.approx(second[key], rel=rel, abs=rel / 100), key


class PlainTraining:
    """A model of transformers, trained by plain AdamW."""

    def __init__(self, model: Any, *, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def step(self, loss: Tensor) -> float:
        """Make an optimizer step on a loss. Return the norm of the gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 100.0)
        self.optimizer.step()
        return norm.item()


BETA = 0.3


def build_models(folder: Path) -> Path:
    """Write the models `student` and `teacher`, and return their folder."""
    build_tiny_llama(folder / "student", seed=3)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + 16,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(config)
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.2)  # without large weights all tokens would be equally likely
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def divergence(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL by torch's own function: kl_div(b, a) is KL(a || b)."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if kind == "jsd":
        mixture = (BETA * teacher.exp() + (1 - BETA) * student.exp()).log()
        return BETA * kl(teacher, mixture) + (1 - BETA) * kl(student, mixture)
    return kl(teacher, student) if kind == "forward_kl" else kl(student, teacher)
