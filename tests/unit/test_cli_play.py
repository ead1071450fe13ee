"""`rlhf play` shows a person the prompts that the policy gets."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import rlhf
from rlhf.cli import main
from rlhf.errors import RunError

MOODY = Path(__file__).parents[1] / "fixtures" / "environments" / "moody.py"
CONFIG = """\
run: {name: demo, dir: DIR}
policy: {model: MODEL, dtype: float32}
algorithm: {name: grpo}
data: {train: {task: guessing_game, split: train, size: 14}, max_prompt_tokens: 16}
rollouts:
  prompts_per_step: 2
  samples_per_prompt: 2
  max_new_tokens: 4
  environment: {name: guess_number, args: {low: 1, high: 7}, max_turns: 3, max_tokens: 64}
rewards: {won: {environment: true}}
train: {steps: 1, lr: 1e-6, sequences_per_update: 4, max_tokens_per_microbatch: 64}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("DIR", str(tmp_path)).replace("MODEL", str(tiny_model)))
    return str(path)


@pytest.mark.parametrize(
    ("typed", "end"),
    [
        ("4\n\n3\n", "over: rewards 0, 1; together 1\n"),
        ("4\n1\n2\n", "stopped at a limit: rewards 0, 0, 0; together 0\n"),
        ("4\n", "\nleft before the conversation was over\n"),
    ],
)
def test_a_conversation_is_shown_as_the_policy_is_given_it(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str, end: str
) -> None:
    """The third row's secret is 3."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["play", config, "--row", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("<|user|>1-7?<|eos|><|assistant|>\n<|user|>lower<|eos|><|assistant|>\n")
    assert out.endswith(end)


FUNCTION = "rewards.won.environment=false rewards.won.function=last_number"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--row 15", "--row: is 15, and the training data has the rows 1 to 14"),
        ("--row 0", "--row: is 0"),
        ("rollouts.environment=null", "rewards.won.environment"),
        ("rollouts.environment.name=nothing", "there is no environment `nothing`"),
        (f"rollouts.environment=null {FUNCTION}", "has no rollouts.environment to play"),
    ],
)
def test_what_cannot_be_played(config: str, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(["play", config, *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_an_environment_that_fails_is_an_error(config: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "{observation}", "mood": "raise"}\n')
    overrides = [f"data.train={tmp_path / 'rows.jsonl'}"]
    overrides += [f"rollouts.environment={{name: '{MOODY}:Moody', max_turns: 3, max_tokens: 64}}"]
    shown: list[str] = []
    with pytest.raises(RunError, match=r"rollouts.environment: raised: step: ValueError: out of order"):
        rlhf.play(config, ["4", "3"], shown.append, overrides)
    assert len(shown) == 2  # the environment fails in the second step
