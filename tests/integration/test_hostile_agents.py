"""Hostile agents run beside honest agents: real front and runners without a model, and a whole run."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.serving.front import FrontSpec
from rlhf.agents.limits import ProcessLimits
from rlhf.agents.runners import HostedRunner
from rlhf.agents.sessions import FUNCTION, AgentSessions, AgentSpec
from rlhf.controller.rollout_scorer import request_for
from rlhf.extensions import CodeSource
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.types import Prompt, RolloutInfo, Sampling
from tests.dummy_engine import DummyLoop, dummy_parts, open_front
from tests.integration.recipes import rows, train, write_config

pytestmark = pytest.mark.slow

HOSTILE = Path(__file__).parents[1] / "fixtures" / "agents" / "hostile.py"
TOKENIZER = byte_tokenizer()
TEMPLATE = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
ATTACKS = {  # attacks, and the errors of their sessions; None: with or without an error
    "calls": "over rollouts.agent.max_calls: 10",
    "guessed keys": None,
    "open connections": None,
    "slow bodies": None,
    "large bodies": None,
    "heads": None,
    "bombs": None,
    "never ends": "did not answer within rollouts.agent.timeout_s: 20",
    "processes": "more threads than rollouts.agent.max_threads: 100",
    "output": "did not answer within rollouts.agent.timeout_s: 20",
}
GROWTH_MIB = 600.0


@pytest.mark.timeout(400)
async def test_hostile_agents_harm_only_their_sessions(tiny_model: Path) -> None:
    loop = DummyLoop(TOKENIZER, lambda prompt, params: [65, 66, TOKENIZER.eos_token_id])
    front = await open_front(loop, dummy_parts(tiny_model), FrontSpec(name="tiny", template=TEMPLATE))
    limits: Any = {"max_calls": 10, "max_tokens": 512, "timeout_s": 20.0, "processes": 64}
    spec = AgentSpec(
        source=CodeSource(path=str(HOSTILE), name="solve"),
        program=FUNCTION,
        columns=("attack",),
        process_limits=ProcessLimits(memory_gib=2.0, max_threads=100, disk_gib=0.1),
        tokenizer="",
        trust_remote_code=False,
        **limits,
    )
    sessions = AgentSessions(spec, front.sessions, front.base_url)
    await sessions.start()
    runner = sessions.runner
    assert isinstance(runner, HostedRunner)
    assert runner._folder is not None

    async def group(attack: str, samples: int) -> list[RolloutInfo]:
        prompt = Prompt(prompt_id=3, token_ids=(63,), text="?", columns={"attack": attack})
        asked = request_for(prompt, group_id=0, first_sequence_id=0, samples=samples, run_seed=0)
        _, infos = await sessions.group(asked, Sampling(max_new_tokens=8))
        return list(infos)

    try:
        alone = await group("none", 4)
        memory = psutil.Process().memory_info().rss
        for attack, end in ATTACKS.items():
            harmed = asyncio.create_task(group(attack, 2))
            beside = await group("none", 4)
            assert [info.environment_error for info in [*alone, *beside]] == [None] * 8, attack
            for info in await harmed:
                error = info.environment_error
                assert end is None or (error is not None and end in error.message), (attack, error)
            assert (psutil.Process().memory_info().rss - memory) / 2**20 < GROWTH_MIB, attack
            assert not psutil.Process(runner.host.pid).children(recursive=True), attack
            assert os.listdir(runner._folder.path) == [".lock"], attack
            assert not front.sessions._open, attack
    finally:
        await sessions.stop()
        await front.close()


@pytest.mark.timeout(400)
def test_a_run_survives_hostile_agents(tmp_path: Path) -> None:
    """Every fourth prompt goes to a hostile agent. New prompts take the place of the failed groups."""
    attacks = ["calls", "bombs", "large bodies", "processes"]
    prompts = [{"prompt": f"{n}", "attack": "none" if n % 4 else attacks[n // 4 % 4]} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    (tmp_path / "long.py").write_text("def long(prompt, response, result):\n    return float(len(response))\n")
    limits = {"max_calls": 10, "max_tokens": 128, "timeout_s": 60.0, "max_threads": 100, "disk_gib": 0.1}
    changes = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "algorithm": {"name": "grpo"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": None, "apply_chat_template": None},
        "rollouts": {"agent": {"function": f"{HOSTILE}:solve", "columns": ["attack"], **limits}},
        "rewards": {"long": {"function": f"{tmp_path}/long.py:long"}},
        "reward_policy": {"on_error": "drop", "max_dropped_fraction": 0.9},
        "train": {"steps": 2},
        "eval": None,
    }
    train(write_config(tmp_path / "run.yaml", changes))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    errors = [json.loads(line) for line in (tmp_path / "run" / "errors.jsonl").read_text().splitlines()]
    assert errors
    assert {error["source"] for error in errors} == {"agent"}
    assert all(prompts[error["prompt_id"] % 64]["attack"] != "none" for error in errors)
