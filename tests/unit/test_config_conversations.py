"""The inputs of an environment or an agent are loaded and tried before a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from rlhf.agents.sessions import AgentSpec
from rlhf.config.files.load import load
from rlhf.data.templates import UNCHANGED
from rlhf.errors import UserError
from rlhf.preflight.agents import preload_agent
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.training_data import OnlineInputs
from rlhf.rollouts.environments.conversations import EnvironmentSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
MOODY = f"{FIXTURES}/environments/moody.py:Moody"
MANY = f"{FIXTURES}/agents/many.py"
QUICK = f"{FIXTURES}/tools/quick_server.py"
SERVER = f"command: [{sys.executable}, '{QUICK}']"
GRADED = "{function: target_length, args: {target: 4}}"
GIVEN = "{environment: true}"


def inputs(folder: Path, rollouts: str, reward: str = GRADED, **row: object) -> OnlineInputs:
    """Return the inputs of a tiny run on one prompt, with a further key of `rollouts`."""
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "go", **row}) + "\n")
    (folder / "run.yaml").write_text(
        f"""\
run: {{name: demo, dir: {folder}}}
policy: {{model: "tiny:llama", dtype: float32}}
algorithm: {{name: grpo}}
data: {{train: {folder}/rows.jsonl, max_prompt_tokens: 64}}
rollouts:
  prompts_per_step: 1
  max_new_tokens: 8
  {rollouts}
rewards: {{won: {reward}}}
train: {{steps: 1, lr: 1e-3, sequences_per_update: 4, max_tokens_per_microbatch: 512}}
"""
    )
    (stage,) = load_inputs(load(folder / "run.yaml"))
    return stage.inputs


def environment(keys: str) -> str:
    return f"environment: {{max_tokens: 300, {keys}}}"


def agent(keys: str) -> str:
    return f"agent: {{max_tokens: 300, {keys}}}"


def test_an_environment_is_tried_out(tmp_path: Path) -> None:
    found = inputs(tmp_path, environment("name: guess_number, args: {high: 9}"), GIVEN)
    assert found.max_model_len == 300
    assert found.environment.source.args == {"high": 9}


def test_servers_are_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_TOOLS", "hunter2")
    server = f"{{{SERVER}, env: {{TOKEN: 'x${{TOKEN_OF_TOOLS}}'}}, only: [wait]}}"
    found = inputs(tmp_path, environment(f"tools: {{mcp: [{server}]}}"), prompt="wait")
    assert isinstance(found.environment, EnvironmentSpec)
    (server_spec,) = found.environment.servers
    assert server_spec.env == {"TOKEN": "xhunter2"}
    assert server_spec.command == (sys.executable, QUICK)


def test_an_agent_is_loaded_and_gets_the_prompt_as_it_is(tmp_path: Path) -> None:
    found = inputs(tmp_path, agent(f"function: '{MANY}:solve', columns: [mood]"), mood="text")
    assert found.max_model_len == 300
    assert isinstance(found.environment, AgentSpec)
    assert found.prompts[0].text == "go"  # no template and no token before the text
    (tmp_path / "agent.py").write_text("print(1)")
    found = inputs(tmp_path, agent("command: [python3, agent.py, plain]"))
    assert found.environment.source.args["command"] == ("python3", str(tmp_path / "agent.py"), "plain")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (f"{{{SERVER}, only: [wait, add]}}", "tools.mcp.0.only: names the tool `add`, .*it has: echo, wait, die"),
        (
            "{command: [no-such-program]}",
            "tools.mcp.0.command: there is no program no-such-program; install the program",
        ),
        ("{command: ['false']}", "tools.mcp.0: false failed to start and list its tools: Connection closed"),
        ("{url: 'http://127.0.0.1:1/mcp'}", "tools.mcp.0: http://127.0.0.1:1/mcp failed to start and list"),
        ("{url: 'http://a/mcp', headers: {A: 'Bearer ${NO_SUCH_TOKEN}'}}", "NO_SUCH_TOKEN is not set"),
        (f"{{{SERVER}, only: [echo]}}", "does not tell the model of tool `echo`"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(tmp_path: Path, server: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        inputs(tmp_path, environment(f"tools: {{mcp: [{server}]}}"))
    assert "rollouts.environment.name" not in str(error.value)


CALCULATOR, GUESS, SOLVE = "name: calculator", "name: guess_number", f"function: '{MANY}:solve'"
NO_FOLDER = "ls /no-folder failed to start and list its tools: Connection closed; last output: .ls: cannot access"
TOOLS = [{"function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("rollouts", "row", "message"),
    [
        (environment(CALCULATOR), {}, "`calculator.reset` needs the column `answer`, which .*rows.jsonl"),
        (environment(CALCULATOR), {"answer": "1"}, "does not tell the model of tool `calculate`"),
        (environment(f"{GUESS}, args: {{size: 1}}"), {}, "rollouts.environment.name: class"),
        (environment(f"{GUESS}, tool_parser: hermes"), {}, "has no effect here: `guess_number` offers"),
        (environment(f"name: '{MOODY}'"), {}, "row of data.train, reset returned 'game 1'"),
        (environment(f"name: '{MOODY}'"), {"mood": "bad_start"}, "reset: ValueError: no game today"),
        (environment(GUESS), {"tools": TOOLS}, "offers `f`, and .*no"),
        (agent("command: [no-such-program]"), {}, "rollouts.agent.command: there is no program no-such"),
        (agent("function: 'absent.py:solve'"), {}, "the file `absent.py` of the agent does not exist"),
        (agent(f"function: '{MANY}:plain'"), {}, "rollouts.agent.function: .*is a plain function"),
        (agent(f"{SOLVE}, columns: [mood]"), {}, "rollouts.agent.columns: names `mood`"),
        (agent(f"{SOLVE}, tools: {{mcp: [{{command: ['false']}}]}}"), {}, "^rollouts.agent.tools.mcp.0: false failed"),
        (agent(f"{SOLVE}, tools: {{mcp: [{{command: [ls, /no-folder]}}]}}"), {}, NO_FOLDER),
        (agent(SOLVE), {"result": 1}, "column `result` has the name under which"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, rollouts: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inputs(tmp_path, rollouts, GIVEN if rollouts.startswith("environment") else GRADED, **row)


def test_gpt_oss_is_refused(tmp_path: Path) -> None:
    source = load("recipe:agent_search").stages["grpo"].rollouts
    GptOssConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    reading: dict[str, Any] = {"tokenizer": "", "trust_remote_code": False, "template": UNCHANGED}
    with pytest.raises(UserError, match=r"rollouts\.agent: agents cannot call .*gpt_oss.* Use another model"):
        preload_agent(source.agent, beside=tmp_path, model=str(tmp_path), **reading, key="rollouts.agent")
