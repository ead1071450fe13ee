"""A run that loses a rank or tokens in every stage, or is killed and resumed, repeats the unbroken run bit for bit.

The workers, the snapshots and the loop are a run's own; a loss is an exception, and a restart builds the model anew.
tests/integration/test_lost_workers.py kills processes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf.config.files.load import load
from rlhf.controller.learning import OnlineRoles
from rlhf.errors import ResultsLost, WorkerLost
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.metrics.histograms import FILE as HISTOGRAMS
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.in_process import run
from tests.fakes.calls import settle
from tests.integration.recipes import merge, without_clocks

CRITIC = ["values", "prepare", "forward_backward", "optim_step", "save", "take_snapshot"]
UPDATE = ["prepare", "set_advantages", "forward_backward", "optim_step", "token_signals"]
POLICY = [*UPDATE, "publish", "probe", "save", "newest_snapshot", "memory", "export"]
METHODS = [("critic", method) for method in CRITIC] + [("policy", method) for method in POLICY]
RANKS = {key: 1 if key[1] in ("save", "export") else 1 + place % 5 for place, key in enumerate(METHODS)}
RESULTS = {  # number of the call, in another step than a rank's loss in the same method
    **{("critic", "values"): 8, ("policy", "prepare"): 9, ("reference", "logprobs"): 2},
    **{("reward", "score"): 3, ("reward", "write_samples"): 2},
}
STEPS = 5
REWARD = "def reward(prompt, response):\n    return float(len(response) % 3)\n"

PPO: dict[str, Any] = {
    "policy": {"dtype": "float32"},
    "algorithm": {
        "name": "ppo",
        "reference_every": 2,
        "kl": {"coef": 0.1, "place": "reward", "adaptive": {"target": 0.01, "horizon": 100}},
        "entropy": {"adaptive": {"target": 6.0}},
    },
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
STREAMED = {"algorithm": None, "train": {"streamed": True, "eps": 1e-3}}
GRPO = {"algorithm": {"name": "grpo", "kl": {"coef": 0.05}}}


def after_call(roles: OnlineRoles, name: str, method: str, number: int, act: Any) -> None:
    """Act at the end of call `number` of a role's method."""
    role: Any = getattr(roles, name)
    original, numbers = getattr(role, method), count(1)

    async def call(*arguments: Any, **options: Any) -> Any:
        result = await original(*arguments, **options)
        if next(numbers) == number:
            act()
        return result

    setattr(role, method, call)


def losing(roles: OnlineRoles, lost: Counter[Any], ranks: Any = RANKS, results: Any = RESULTS) -> OnlineRoles:
    """Lose a rank in a call of each method of `ranks`, and tokens of responses in a call of each of `results`."""

    def lose(kind: type[WorkerLost], name: str, method: str) -> None:
        lost[kind, name, method] += 1
        raise kind(f"{name} {method} lost", role=name, rank=0, stage=method, kind="died")

    for (name, method), number in results.items():
        after_call(roles, name, method, number, partial(lose, ResultsLost, name, method))
    for (name, method), number in ranks.items():
        after_call(roles, name, method, number, partial(lose, WorkerLost, name, method))
    return roles


def one_by_one(roles: OnlineRoles) -> OnlineRoles:
    """Let the run score each group, and learn from it, before the engine answers the next group."""
    rollout: Any = roles.rollout
    generate = rollout.generate

    async def slowly(*arguments: Any, **options: Any) -> Any:
        async for group in generate(*arguments, **options):
            yield group
            await settle()

    rollout.generate = slowly
    return roles


async def finished(folder: Path, name: str, tree: Any = PPO, watch: Any = lambda roles: roles, **how: Any) -> Path:
    """Return the folder of a run with a tiny model."""
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    model = folder.parent / "model"
    if not model.exists():
        build_tiny_llama(model, seed=0)
    own = {"run": {"name": name, "dir": str(folder), "seed": 0}, "policy": {"model": str(model)}}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(merge(tree, own), sort_keys=False), encoding="utf-8")
    return await run(load(config, []), watch=watch, **how)


def rows(path: Path) -> list[dict[str, Any]]:
    return without_clocks(list(read_metrics(path)))


def weights(path: Path) -> Path:
    (found,) = path.rglob("*final*/model.safetensors")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


async def test_a_rank_or_tokens_may_be_lost_in_every_stage_and_the_driver_may_be_killed(
    alone: None, folder: Path
) -> None:
    """The folder of a killed run is a copy from the middle of step 5, with older checkpoints and references."""
    killed = folder.with_name("killed")

    def watch(roles: OnlineRoles) -> OnlineRoles:
        after_call(roles, "policy", "optim_step", STEPS, lambda: shutil.copytree(folder, killed, symlinks=True))
        return roles

    unbroken = await finished(folder, "run", watch=watch)
    assert all(row["advantages/std"] > 0.0 for row in rows(unbroken)[1:])
    is_reference = [abs(row["experience/kl_ref/mean"]) < 1e-9 for row in rows(unbroken)[1:]]  # before a step's updates
    assert is_reference == [True, False, True, False, True]
    assert rows(unbroken)[5]["experience/kl_coef"] != rows(unbroken)[1]["experience/kl_coef"]
    assert [row["update/entropy_coef"] for row in rows(unbroken)[1:]] == pytest.approx([0.0, 1e-3, 2e-3, 3e-3, 4e-3])
    lost = Counter[Any]()
    broken = await finished(folder, "broken", watch=partial(losing, lost=lost))
    assert set(lost.values()) == {1}
    assert len(lost) == len(RANKS) + len(RESULTS)
    assert not list(killed.rglob("*final*/model.safetensors"))
    resumed = await finished(killed, "run", resume=True)
    for path in (broken, resumed):
        assert rows(path) == rows(unbroken)
        assert weights(path).read_bytes() == weights(unbroken).read_bytes()
    for name in (HISTOGRAMS, f"samples/step_{STEPS:06d}.jsonl"):
        assert (resumed / name).read_text() == (unbroken / name).read_text()


async def test_a_streamed_step_begins_again_after_a_loss(alone: None, folder: Path) -> None:
    """Portions differ after a loss, so sums differ by rounding. A large epsilon stops Adam from amplifying it."""
    streamed = merge(merge(PPO, STREAMED), GRPO)
    ranks = {("policy", "prepare"): 1, ("policy", "forward_backward"): 2, ("policy", "optim_step"): 3}
    results, lost = {("policy", "prepare"): 6, ("reference", "logprobs"): 4}, Counter[Any]()
    unbroken = await finished(folder, "run", streamed, one_by_one)
    broken = await finished(
        folder, "broken", streamed, lambda roles: losing(one_by_one(roles), lost, ranks=ranks, results=results)
    )
    assert len(lost) == 5
    for expected, found in zip(rows(unbroken), rows(broken), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(load_file(weights(broken)), load_file(weights(unbroken)), rtol=1e-4, atol=1e-5)
