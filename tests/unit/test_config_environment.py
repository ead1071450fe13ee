"""What an environment's section must agree with, and what is read of it before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.preflight.inputs import OnlineInputs, StageInputs, load_inputs
from tests.unit.test_config_validation_run import ONLINE, PAIRS, refusal

GAME = "rollouts.environment={name: guess_number, max_tokens: 180}"
MOODY = Path(__file__).parents[1] / "fixtures" / "environments" / "moody.py"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rewards.correct={environment: true}"],
            "rewards.correct.environment: is true, but there is no environment; name one as rollouts.environment",
        ),
        (
            [GAME, "rollouts.environment.max_tokens=149"],
            "rollouts.environment.max_tokens: is 149 and must hold a prompt and one turn: data.max_prompt_tokens + "
            "rollouts.max_new_tokens = 100 + 50 = 150",
        ),
        (
            [GAME, "rollouts.environment.max_tokens=300"],
            "train.max_tokens_per_microbatch: is 200 and must hold the longest sequence: "
            "rollouts.environment.max_tokens = 300",
        ),
        (
            [GAME, *PAIRS],
            "train.max_tokens_per_microbatch: is 200 and must hold both responses of a pair: "
            "2 * rollouts.environment.max_tokens = 360",
        ),
        ([GAME, "rollouts.environment.args={api_key: x}"], "rollouts.environment.args.api_key: looks like a secret"),
        (
            [GAME, "rewards.correct={environment: true, args: {a: 1}}"],
            "rewards.correct: `args` has an effect with `function` alone",
        ),
    ],
)
def test_relations(tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, capsys, ONLINE, overrides)


RUN = """\
run: {{name: demo, dir: {folder}}}
policy: {{model: "tiny:llama", dtype: float32}}
algorithm: {{name: grpo}}
data: {{train: {folder}/rows.jsonl, max_prompt_tokens: 64}}
rollouts:
  prompts_per_step: 1
  max_new_tokens: 8
  environment: {environment}
rewards: {{won: {{environment: true}}}}
train: {{steps: 1, lr: 1e-3, sequences_per_update: 4, max_tokens_per_microbatch: 512}}
"""


def inputs(folder: Path, environment: str, **row: object) -> OnlineInputs:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "go", **row}) + "\n")
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, environment=environment))
    (stage,) = load_inputs(load(path))
    assert isinstance(stage, StageInputs)
    assert isinstance(stage.inputs, OnlineInputs)
    return stage.inputs


def test_an_environment_is_tried_out(tmp_path: Path) -> None:
    found = inputs(tmp_path, "{name: guess_number, max_tokens: 300, args: {high: 9}}")
    assert found.max_model_len == 300
    assert found.environment is not None
    assert found.environment.source.args == {"high": 9}


@pytest.mark.parametrize(
    ("environment", "row", "message"),
    [
        ("{name: calculator, max_tokens: 300}", {}, "`calculator.reset` needs the column `answer`, which .*rows.jsonl"),
        ("{name: calculator, max_tokens: 300}", {"answer": "1"}, "does not tell the model of tool `calculate`"),
        ("{name: guess_number, max_tokens: 300, args: {size: 1}}", {}, "rollouts.environment.name: class"),
        (
            "{name: guess_number, max_tokens: 300, tool_parser: hermes}",
            {},
            "rollouts.environment.tool_parser: has no effect here: `guess_number` offers no tools",
        ),
        (
            f"{{name: '{MOODY}:Moody', max_tokens: 300}}",
            {},
            "with the first row of data.train, reset returned 'game 1'",
        ),
        (
            f"{{name: '{MOODY}:Moody', max_tokens: 300}}",
            {"mood": "bad_start"},
            "with the first row of data.train, reset: ValueError: no game today",
        ),
        (
            "{name: guess_number, max_tokens: 300}",
            {"tools": [{"function": {"name": "f"}}]},
            "offers `f`, and .*no tools",
        ),
        ("{name: guess_number, max_tokens: 4000}", {}, "must hold"),
    ],
)
def test_what_cannot_be_played_is_refused(
    tmp_path: Path, environment: str, row: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        inputs(tmp_path, environment, **row)
