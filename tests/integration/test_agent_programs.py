"""Agents of packages from the index train a chat model. Each package has a separate environment.

The first step of a run may have only wrong answers: the test is that every token is captured and trained.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from actors.serving.front import FrontSpec
from actors.serving.front_engine import EngineParts
from rlhf.agents.limits import SessionLimits
from rlhf.agents.runners import AgentTask
from rlhf.agents.trees import training_sequences
from rlhf.types import Sampling
from tests.agent_programs import command
from tests.dummy_engine import DummyLoop, dummy_parts, open_front
from tests.integration.recipes import ONLINE, merge, rows, train, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "examples" / "agents" / "programs"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
INDEX_WITHIN_S = 60.0
INSTALL_WITHIN_S = 300.0
HERMES = PROGRAMS / "hermes.jinja"
LIMITS = {"max_calls": 8, "max_tokens": 3584, "timeout_s": 240.0}
RUN: Mapping[str, Any] = {
    "policy": {"model": str(MODEL), "dtype": "float32"},
    "algorithm": {"name": "grpo"},
    "data": {"eval": None, "apply_chat_template": None, "chat_template": str(HERMES), "max_prompt_tokens": 64},
    "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 32, "agent": LIMITS},
    "train": {"steps": 1, "sequences_per_update": 4, "max_tokens_per_microbatch": 3584, "checkpoint_every": None},
    "eval": None,
    "cluster": {"call_timeout_s": 300.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An example, the needed package, and the expected sessions."""

    name: str
    package: str
    turns: tuple[str, ...]  # turns of a model that solves the task
    result: str | Mapping[str, Any]
    broken: int = 0  # calls of the turns above whose prefix is broken, because the package changes its history
    fewest_calls: int  # number of calls in a session whose model calls no tool
    sandbox: bool = False


def tool_call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


MULTIPLY = tool_call("multiply", a=2, b=3)
PRODUCT = f"I multiply.\n{MULTIPLY}", "It is 6.", "6"
EXAMPLES = [
    Program(
        name="with_mini_swe_agent",
        package="mini-swe-agent==2.4.6",
        turns=(
            "I write the product.\n" + tool_call("bash", command="echo $((2 * 3)) > product"),
            tool_call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat product"),
        ),
        result={"status": "Submitted", "answer": "6\n"},
        fewest_calls=3,
        sandbox=True,
    ),
    Program(
        name="with_smolagents",
        package="smolagents[openai]==1.26.0",
        turns=(MULTIPLY, tool_call("final_answer", answer="It is 6.")),
        result="It is 6.\n",
        broken=1,  # the package sends the model's call back as a text in other words
        fewest_calls=2,
    ),
    # A call that is cut ends the session.
    Program(name="with_openai_agents", package="openai-agents==0.24.0", turns=PRODUCT, result="6\n", fewest_calls=1),
    Program(
        name="with_pydantic_ai",
        package="pydantic-ai-slim[anthropic]==2.68.0",
        turns=PRODUCT,
        result="6\n",
        fewest_calls=2,
    ),
]


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the Python of an environment with a package, made once."""
    return cache(lambda package: python_with(package, tmp_path_factory.mktemp("environments") / "environment"))


def python_with(package: str, folder: Path) -> Path:
    """Return the Python of a new environment with a package. Skip the test if there is no index of packages here."""
    uv = str(Path(sys.executable).with_name("uv"))
    install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, timeout=60.0)
    reached = subprocess.run([*install, "--dry-run", "wheel"], capture_output=True, text=True, timeout=INDEX_WITHIN_S)
    if reached.returncode != 0:
        pytest.skip(f"the index of packages is not reachable: {reached.stderr[-300:]}")
    subprocess.run([*install, package], check=True, timeout=INSTALL_WITHIN_S)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def parts() -> EngineParts:
    if not MODEL.exists():
        pytest.skip("needs the model of `rlhf models fetch smollm2`")
    return dummy_parts(MODEL, max_model_len=4096)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("program", EXAMPLES, ids=lambda program: program.name)
async def test_a_program_of_a_package_calls_its_tools(
    parts: EngineParts, pythons: Callable[[str], Path], program: Program
) -> None:
    """The front is a run's, over an engine with scripted turns."""
    tokenizer, turns = parts.renderer.get_tokenizer(), list(program.turns)
    loop = DummyLoop(tokenizer, lambda prompt, params: tokenizer.encode(f"{turns.pop(0)}<|im_end|>"))
    front = await open_front(loop, parts, FrontSpec(name="policy", template=HERMES.read_text()))
    words = str(pythons(program.package)), str(PROGRAMS / f"{program.name}.py")
    runner = command(*words, timeout_s=200.0, sandbox=program.sandbox)
    await runner.start()
    try:
        session = SessionLimits(max_calls=8, max_tokens=4096, seed=1)
        front.sessions.open("sk-1", Sampling(max_new_tokens=200), session)
        task = {"prompt": "What is 2 times 3?"}
        result = await runner.solve(AgentTask(task=task, address=front.base_url, api_key="sk-1", seed=1))
        calls = front.sessions.close("sk-1")
    finally:
        await runner.stop()
        await front.close()
    assert result == program.result
    assert len(calls) == len(program.turns)
    assert sum(call.broke is not None for call in calls) == program.broken, [call.broke for call in calls]
    assert len(training_sequences(calls)) == 1 + program.broken


@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", EXAMPLES, ids=lambda program: program.name)
def test_a_program_of_a_package_is_trained(tmp_path: Path, pythons: Callable[[str], Path], program: Program) -> None:
    if not MODEL.exists():
        pytest.skip("needs the model of `rlhf models fetch smollm2`")
    python = pythons(program.package)
    questions = [{"prompt": f"What is {n} times {n + 1}?"} for n in range(2, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "size.py").write_text("def size(prompt, response, result):\n    return len(response) / 100\n")
    changes: dict[str, Any] = {
        "run": {"name": program.name, "dir": str(tmp_path), "seed": 3},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "rollouts": {
            "agent": {"command": [str(python), str(PROGRAMS / f"{program.name}.py")], "sandbox": program.sandbox}
        },
        "rewards": {"size": {"function": f"{tmp_path}/size.py:size"}},
    }
    train(write_config(tmp_path / "run.yaml", changes, base=merge(ONLINE, RUN)), timeout_s=600.0)
    (row,) = [row for row in rows(tmp_path / program.name) if row["step"] == 1]
    assert row["agents/errors/total"] == 0.0
    assert row["agents/calls/mean"] >= program.fewest_calls
    assert row["agents/broken_prefixes/fraction"] == 0.0 or program.broken
    # Trainer and sampler agree about every sampled token, so both saw the same tokens at the same places.
    assert row["experience/rollout_logprob_diff/max"] < 1e-3
    assert row["rollouts/response_tokens/mean"] > 2.0
