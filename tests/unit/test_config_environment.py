"""An environment's section agrees with other sections, and the environment is tried before a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.preflight.training_data import OnlineInputs
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from tests.fixtures.configs import ONLINE, PAIRS, online_inputs, refusal

GAME = "rollouts.environment={name: guess_number, max_tokens: 180}"
MOODY = Path(__file__).parents[1] / "fixtures" / "environments" / "moody.py"
QUICK = Path(__file__).parents[1] / "fixtures" / "tools" / "quick_server.py"
SERVER = f"command: [{sys.executable}, '{QUICK}']"


def with_servers(servers: str, key: str = "rollouts.environment") -> str:
    return f"{key}={{max_tokens: 180, tools: {{mcp: [{servers}]}}}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.correct={environment: true}"], "rewards.correct.environment: is true, but there is no environment"),
        ([GAME, "rollouts.environment.max_tokens=149"], "rollouts.environment.max_tokens: is 149 and must hold a"),
        ([GAME, "rollouts.environment.max_tokens=300"], "train.max_tokens_per_microbatch: is 200 and must hold the"),
        ([GAME, *PAIRS], "train.max_tokens_per_microbatch: is 200 and must hold both responses of a pair: 2 *"),
        (["rollouts.environment={max_tokens: 180}"], "rollouts.environment: give `name`, `tools` or both"),
        ([with_servers("")], "rollouts.environment.tools: `mcp` is empty; name a server, or leave `tools` out"),
        ([with_servers("{only: [a]}")], "rollouts.environment.tools.mcp.0: give exactly one of `command` and `url`"),
        ([with_servers("{url: 'http://me:secret@a/mcp'}")], "mcp.0.url: `url` holds a secret"),
        ([with_servers("{url: 'http://a/mcp', env: {A: b}}")], "rollouts.environment.tools.mcp.0: `env` has no effect"),
        (
            [with_servers("{url: 'http://a/mcp', headers: {Authorization: 'Bearer sk-proj-abcdefghijklmnopqrst'}}")],
            "rollouts.environment.tools.mcp.0.headers.Authorization: looks like a secret",
        ),
        ([with_servers("{url: 'http://a/mcp'}"), "rewards.correct={environment: true}"], "is true, but the"),
        ([GAME, "rollouts.environment.args={api_key: x}"], "rollouts.environment.args.api_key: looks like a secret"),
        ([GAME, "rewards.correct={environment: true, args: {a: 1}}"], "rewards.correct: `args` has an effect with"),
    ],
)
def test_an_impossible_relation_is_refused(overrides: list[str], message: str) -> None:
    assert message in refusal(ONLINE, overrides)


GRADED = "{function: target_length, args: {target: 4}}"


def inputs(folder: Path, environment: str, reward: str = "{environment: true}", **row: object) -> OnlineInputs:
    return online_inputs(folder, f"environment: {environment}", reward, row)


def test_an_environment_is_tried_out(tmp_path: Path) -> None:
    found = inputs(tmp_path, "{name: guess_number, max_tokens: 300, args: {high: 9}}")
    assert found.max_model_len == 300
    assert found.environment.source.args == {"high": 9}


def test_servers_are_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_TOOLS", "hunter2")
    server = f"{{{SERVER}, env: {{TOKEN: 'x${{TOKEN_OF_TOOLS}}'}}, only: [wait]}}"
    found = inputs(tmp_path, f"{{max_tokens: 300, tools: {{mcp: [{server}]}}}}", reward=GRADED, prompt="wait")
    assert isinstance(found.environment, EnvironmentSpec)
    (server_spec,) = found.environment.servers
    assert server_spec.env == {"TOKEN": "xhunter2"}
    assert server_spec.command == (sys.executable, str(QUICK))


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (f"{{{SERVER}, only: [wait, add]}}", "tools.mcp.0.only: names the tool `add`, .*it has: echo, wait, die"),
        ("{command: [no-such-program]}", "tools.mcp.0.command: there is no program no-such-program; install it"),
        ("{command: ['false']}", "tools.mcp.0: false failed to start and list its tools: Connection closed"),
        ("{url: 'http://127.0.0.1:1/mcp'}", "tools.mcp.0: http://127.0.0.1:1/mcp failed to start and list"),
        (
            "{url: 'http://a/mcp', headers: {Authorization: 'Bearer ${NO_SUCH_TOKEN}'}}",
            "NO_SUCH_TOKEN is not set",
        ),
        (f"{{{SERVER}, only: [echo]}}", "does not tell the model of tool `echo`"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(tmp_path: Path, server: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        inputs(tmp_path, f"{{max_tokens: 300, tools: {{mcp: [{server}]}}}}", reward=GRADED)
    assert "rollouts.environment.name" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "row", "message"),
    [
        ("{name: calculator, max_tokens: 300}", {}, "`calculator.reset` needs the column `answer`, which .*rows.jsonl"),
        ("{name: calculator, max_tokens: 300}", {"answer": "1"}, "does not tell the model of tool `calculate`"),
        ("{name: guess_number, max_tokens: 300, args: {size: 1}}", {}, "rollouts.environment.name: class"),
        ("{name: guess_number, max_tokens: 300, tool_parser: hermes}", {}, "has no effect here: `guess_number` offers"),
        (f"{{name: '{MOODY}:Moody', max_tokens: 300}}", {}, "row of data.train, reset returned 'game 1'"),
        (f"{{name: '{MOODY}:Moody', max_tokens: 300}}", {"mood": "bad_start"}, "reset: ValueError: no game today"),
        ("{name: guess_number, max_tokens: 300}", {"tools": [{"function": {"name": "f"}}]}, "offers `f`, and .*no"),
        ("{name: guess_number, max_tokens: 4000}", {}, "must hold"),
    ],
)
def test_what_cannot_be_played_is_refused(
    tmp_path: Path, environment: str, row: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        inputs(tmp_path, environment, **row)
