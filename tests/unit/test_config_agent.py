"""An agent's section agrees with other sections, and the inputs of an agent are loaded before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from rlhf.agents.sessions import AgentSpec
from rlhf.config.files.load import load
from rlhf.data.templates import UNCHANGED
from rlhf.errors import UserError
from rlhf.preflight.agents import preload_agent
from rlhf.preflight.training_data import OnlineInputs
from tests.fixtures.configs import ONLINE, PAIRS, online_inputs, refusal

CONFIGS = Path(__file__).parents[2] / "configs"
MANY = Path(__file__).parents[1] / "fixtures" / "agents" / "many.py"
AGENT = f"rollouts.agent={{function: '{MANY}:solve', max_tokens: 180}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollouts.agent={max_tokens: 180}"], "give exactly one of `function`, `command` and `url`"),
        (["rollouts.agent={url: 'http://a', command: [b], max_tokens: 180}"], "give exactly one of `function`"),
        (["rollouts.agent={url: 'http://me:secret@host/', max_tokens: 180}"], "`url` holds a secret"),
        ([AGENT, "rollouts.agent.max_calls=0"], "rollouts.agent.max_calls"),
        (["rollouts.agent={url: 'http://a', max_tokens: 180, memory_gib: 2}"], "has no effect here"),
        ([AGENT, "rollouts.agent.sandbox=true"], "rollouts.agent.sandbox: has no effect here: rollouts.agent.command"),
        ([AGENT, "rollouts.environment={name: guess_number, max_tokens: 180}"], "give one of `environment` and"),
        (
            ["rollouts.agent={url: 'http://a', max_tokens: 180, tools: {mcp: [{url: 'http://b/mcp'}]}}"],
            "rollouts.agent.tools: has no effect here: rollouts.agent.function is null",
        ),
        ([AGENT, "rollouts.agent.max_tokens=149"], "rollouts.agent.max_tokens: is 149 and must hold a prompt and one"),
        ([AGENT, "rollouts.agent.max_tokens=300"], "must hold the longest sequence: rollouts.agent.max_tokens = 300"),
        ([AGENT, *PAIRS, "train.max_tokens_per_microbatch=400"], "algorithm.name: is online_dpo, which compares or"),
        (
            ["rollouts.agent={command: [a, --api-key, sk-proj-abcdefghijklmnopqrstuvwx], max_tokens: 180}"],
            "rollouts.agent.command: looks like a secret",
        ),
        ([AGENT, "rewards.correct={environment: true}"], "is true, but there is no environment"),
        ([AGENT, "cluster.call_timeout_s=600"], "rollouts.agent.timeout_s: is 600, but an engine that finishes"),
        ([AGENT, "data.system_prompt=hello"], "data.system_prompt: has no effect here: an agent gets the prompt as it"),
        (
            [AGENT, "rollouts.oversample=2", "rollouts.carry_over=true", "algorithm.correction=none"],
            "rollouts.agent is given: a conversation cannot be continued",
        ),
    ],
)
def test_an_impossible_relation_is_refused(overrides: list[str], message: str) -> None:
    assert message in refusal(ONLINE, overrides)


def inputs(folder: Path, agent: str, **row: object) -> OnlineInputs:
    (folder / "right.py").write_text("def right(prompt, response, result):\n    return 1.0\n")
    return online_inputs(folder, f"agent: {agent}", f"{{function: '{folder}/right.py:right'}}", row)


def test_an_agent_is_loaded_and_gets_the_prompt_as_it_is(tmp_path: Path) -> None:
    found = inputs(tmp_path, f"{{function: '{MANY}:solve', columns: [mood], max_tokens: 300}}", mood="text")
    assert found.max_model_len == 300
    assert isinstance(found.environment, AgentSpec)
    assert found.prompts[0].text == "go"  # neither the template nor a token stands before it


def test_files_of_a_command_are_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("print(1)")
    found = inputs(tmp_path, "{command: [python3, agent.py, plain], max_tokens: 300}")
    assert found.environment.source.args["command"] == ("python3", str(tmp_path / "agent.py"), "plain")


@pytest.mark.parametrize(
    ("agent", "row", "message"),
    [
        ("{command: [no-such-program], max_tokens: 300}", {}, "rollouts.agent.command: there is no program no-such"),
        ("{function: 'absent.py:solve', max_tokens: 300}", {}, "the file `absent.py` of the agent does not exist"),
        (f"{{function: '{MANY}:plain', max_tokens: 300}}", {}, "rollouts.agent.function: .*is a plain function"),
        (f"{{function: '{MANY}:solve', columns: [mood], max_tokens: 300}}", {}, "rollouts.agent.columns: names `mood`"),
        (
            f"{{function: '{MANY}:solve', max_tokens: 300, tools: {{mcp: [{{command: ['false']}}]}}}}",
            {},
            "^rollouts.agent.tools.mcp.0: false failed to start",
        ),
        (
            f"{{function: '{MANY}:solve', max_tokens: 300, tools: {{mcp: [{{command: [ls, /no-folder]}}]}}}}",
            {},
            "ls /no-folder failed to start and list its tools: Connection closed; last output: .ls: cannot access",
        ),
        (f"{{function: '{MANY}:solve', max_tokens: 300}}", {"result": 1}, "column `result` has the name under which"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, agent: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inputs(tmp_path, agent, **row)


def test_gpt_oss_is_refused(tmp_path: Path) -> None:
    source = load(CONFIGS / "agent_search.yaml").stages["grpo"].rollouts
    GptOssConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    reading: dict[str, Any] = {"tokenizer": "", "trust_remote_code": False, "template": UNCHANGED}
    with pytest.raises(UserError, match=r"rollouts\.agent: agents cannot call .*gpt_oss.* Use another model"):
        preload_agent(source.agent, beside=tmp_path, model=str(tmp_path), **reading, key="rollouts.agent")
