"""A run that loses a rank of its policy or critic in every stage repeats the unbroken run bit for bit.

The workers, the snapshots and the loop are a run's own; a loss is an exception, and a restart builds the model anew.
tests/integration/test_trainer_losses.py kills processes.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.files.load import load
from rlhf.controller.learning import OnlineRoles
from rlhf.errors import WorkerLost
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.in_process import run
from tests.integration.recipes import merge, without_clocks

CRITIC = ["values", "prepare", "update", "save", "take_snapshot"]
UPDATE = ["prepare", "set_advantages", "update", "token_signals"]
POLICY = [*UPDATE, "publish", "probe", "save", "newest_snapshot", "memory", "export"]
LOST = [("critic", method) for method in CRITIC] + [("policy", method) for method in POLICY]
STEPS = 5
REWARD = "def reward(prompt, response):\n    return float(len(response) % 3)\n"

PPO: dict[str, Any] = {
    "policy": {"dtype": "float32"},
    "algorithm": {"name": "ppo", "kl": {"coef": 0.1, "place": "reward", "adaptive": {"target": 0.01, "horizon": 100}}},
    "data": {
        "train": {"task": "running_totals", "split": "train", "size": 64},
        "eval": {"task": "running_totals", "split": "eval", "size": 4},
        "apply_chat_template": False,
        "max_prompt_tokens": 16,
    },
    "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
    "rewards": {"mine": {"function": "mine.py:reward"}},
    "train": {"steps": STEPS, "lr": 1e-3, "sequences_per_update": 4, "checkpoint_every": 3},
    "eval": {"every": STEPS},
    "cluster": {"restarts": {"gang": 100}},
}


def losing(roles: OnlineRoles, lost: Counter[tuple[str, str]]) -> OnlineRoles:
    """Lose each method of LOST once, at the end of a call."""

    def wrap(role: Any, name: str, method: str, number: int) -> None:
        original, calls = getattr(role, method), Counter[str]()

        async def call(*arguments: Any) -> Any:
            calls[method] += 1
            result = await original(*arguments)
            if calls[method] == number:
                lost[name, method] += 1
                raise WorkerLost("lost", role=name, rank=0, stage=method, kind="died")
            return result

        setattr(role, method, call)

    for place, (name, method) in enumerate(LOST):
        wrap(getattr(roles, name), name, method, 1 if method in ("save", "export") else 1 + place % STEPS)
    return roles


async def finished(folder: Path, model: Path, name: str, lost: Counter[tuple[str, str]] | None) -> tuple[Any, bytes]:
    """Return the rows of a run, and the bytes of the final weights."""
    own = {"run": {"name": name, "dir": str(folder), "seed": 0}, "policy": {"model": str(model)}}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(merge(PPO, own), sort_keys=False), encoding="utf-8")
    watched = (lambda roles: roles) if lost is None else partial(losing, lost=lost)
    path = await run(load(config, []), watch=watched)
    (weights,) = path.rglob("*final*/model.safetensors")
    return without_clocks(list(read_metrics(path))), weights.read_bytes()


async def test_a_rank_may_be_lost_in_every_stage(alone: None, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    model, lost = build_tiny_llama(tmp_path / "model", seed=0), Counter[tuple[str, str]]()
    rows, weights = await finished(tmp_path, model, "unbroken", None)
    broken_rows, broken_weights = await finished(tmp_path, model, "broken", lost)
    assert lost == Counter(LOST)
    assert all(row["advantages/std"] > 0.0 for row in rows[1:])
    assert broken_rows == rows
    assert broken_weights == weights
