"""Whole runs with an agent: Ray, vLLM, DeepSpeed, the engines' fronts and the agents' processes, on the tiny model."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from tests.integration.games import samples
from tests.integration.recipes import ONLINE, merge, rows, start, train, write_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "agents"
SEARCH: dict[str, Any] = {
    "algorithm": {"name": "grpo"},
    "data": {
        "train": {"task": "guessing_game", "split": "train", "size": 64},
        "eval": {"task": "guessing_game", "split": "eval", "size": 8},
        "apply_chat_template": None,
        "max_prompt_tokens": 16,
    },
    "rollouts": {
        "max_new_tokens": 6,
        "agent": {
            "function": f"{EXAMPLES}/search.py:solve",
            "columns": ["secret"],
            "max_calls": 3,
            "max_tokens": 96,
            "timeout_s": 60.0,
        },
    },
    "rewards": {"found": {"function": f"{EXAMPLES}/search.py:found"}},
    "train": {"steps": 2},
}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def config(folder: Path, name: str, **changes: Any) -> Path:
    run = {"run": {"name": name, "dir": str(folder), "seed": 3}}
    return write_config(folder / f"{name}.yaml", {**changes, **run}, base=merge(ONLINE, SEARCH))


def long_results(folder: Path) -> dict[str, Any]:
    """Return rewards for the length of a result, in place of the example's reward."""
    (folder / "long.py").write_text("def long(prompt, response, result):\n    return float(len(result))\n")
    return {"found": None, "long": {"function": f"{folder}/long.py:long"}}


@pytest.mark.parametrize("name", ["grpo", "gigpo"])
def test_an_unmodified_client_is_trained(tmp_path: Path, name: str) -> None:
    train(config(tmp_path, "search", algorithm={"name": name}))
    for row in rows(tmp_path / "search")[1:]:
        # Trainer and sampler agree about every sampled token, so both saw the same tokens at the same places.
        assert row["experience/rollout_logprob_diff/max"] < 1e-4
        assert 1.0 <= row["agents/calls/mean"] <= row["agents/calls/max"] == 3.0
        assert row["agents/broken_prefixes/fraction"] == row["agents/errors/total"] == 0.0
        assert 0.0 <= row["rewards/found/mean"] <= 1.0
    for sample in samples(tmp_path / "search", 2):
        turns = sample["turns"]
        assert turns[0]["text"] == "<|user|>1-7?<|eos|><|assistant|>"
        assert sum(turn["tokens"] for turn in turns if turn["sampled"]) == sample["response_tokens"]


def test_branches_of_a_session_are_trained(tmp_path: Path) -> None:
    agent = {"function": f"{EXAMPLES}/sub_agents.py:solve", "columns": None, "max_calls": 8, "max_tokens": 128}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n};a;b"}) + "\n" for n in range(64)))
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": None}
    rewards = long_results(tmp_path)
    train(config(tmp_path, "branches", data=data, eval=None, rollouts={"agent": agent}, rewards=rewards))
    for row in rows(tmp_path / "branches"):
        assert row["experience/rollout_logprob_diff/max"] < 1e-4
        assert row["agents/calls/mean"] == 4.0


def test_an_update_comes_within_a_session(tmp_path: Path) -> None:
    """In flight, weights change during open sessions. Training uses, for each token, the version that sampled it."""
    agent = tmp_path / "resting.py"
    agent.write_text(
        "import asyncio\n"
        "async def solve(task, client):\n"
        "    messages = []\n"
        "    for word in ('a', 'b', 'c'):\n"
        "        messages.append({'role': 'user', 'content': word})\n"
        "        answer = await client.openai.chat.completions.create(model='m', messages=messages)\n"
        "        messages.append({'role': 'assistant', 'content': answer.choices[0].message.content})\n"
        "        await asyncio.sleep(1.0)\n"
        "    return messages[-1]['content']\n"
    )
    written = config(
        tmp_path,
        "in_flight",
        algorithm={"correction": {"preset": "token_tis"}},
        data={"eval": None},
        eval=None,
        rollouts={"agent": {"function": f"{agent}:solve"}, "max_staleness": 2, "weight_updates": "in_flight"},
        rewards=long_results(tmp_path),
        train={"steps": 4},
    )
    train(written)
    found = [sample for step in range(1, 5) for sample in samples(tmp_path / "in_flight", step)]
    assert any(sample["min_version"] < sample["max_version"] for sample in found)
    assert all(row["agents/broken_prefixes/fraction"] == 0.0 for row in rows(tmp_path / "in_flight"))


def test_a_killed_run_has_every_session_once(tmp_path: Path) -> None:
    """Sessions of groups finished before the kill are read from the store, and not run again."""
    ran = tmp_path / "ran"
    ran.mkdir()
    agent = tmp_path / "noting.py"
    agent.write_text(
        "import os, sys, time\n"
        f"sys.path.append({str(EXAMPLES)!r})\n"
        "from search import solve as search\n"
        "async def solve(task, client):\n"
        "    result = await search(task, client)\n"
        f"    open(os.path.join({str(ran)!r}, client.api_key), 'w').write('')\n"
        "    time.sleep(0.2)\n"
        "    return result\n"
    )
    written = config(
        tmp_path,
        "killed",
        data={"eval": None},
        eval=None,
        rollouts={"agent": {"function": f"{agent}:solve", "concurrency": 4}},
        train={"steps": 3, "checkpoint_every": 1},
    )
    process = start(written)
    until = time.monotonic() + 200.0
    stored = ".own-*/spool/group_*.safetensors"
    while len(list((tmp_path / "killed").glob(stored))) < 3 and time.monotonic() < until:
        assert process.poll() is None, written.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    finished = {path.name for path in (tmp_path / "killed").glob(stored)}
    assert finished
    train(written, "--resume", "auto")
    prompts = Counter(
        (step, row["prompt_id"], row["sample"]) for step in (1, 2, 3) for row in samples(tmp_path / "killed", step)
    )
    assert set(prompts.values()) == {1}
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3]
    sessions = 3 * 8 * 4
    again = len(list(ran.iterdir())) - sessions
    assert again <= sessions // 3 - 4 * len(finished), "sessions of stored groups ran again"


def test_an_evaluation_runs_the_sessions_of_the_run(
    tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The final model of a run has the weights of the last evaluation, so the sessions are the same."""
    sampling = {"at_start": False, "temperature": 1.0, "samples_per_prompt": 4, "pass_score": 1.0}
    written = config(tmp_path, "search", train={"steps": 1}, eval=sampling)
    train(written)
    out = tmp_path / "out"
    assert main(["eval", str(written), "--model", str(tmp_path / "search"), "--out", str(out), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    during = json.loads((tmp_path / "search" / "evals" / "step_000001.json").read_text(encoding="utf-8"))
    assert evaluated["sets"] == during["sets"]
    heldout = evaluated["sets"]["heldout"]
    assert heldout["num_failed"] == 0
    assert {"rewards/found", "pass@4"} <= set(heldout["metrics"])
