"""Evaluations with an environment, of a run or of a stage, read the inputs of training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.run.evaluate import run_evaluation
from rlhf.config.files.load import load
from rlhf.config.schema.stages import run_folder
from rlhf.controller.rollout_scorer import request_for
from rlhf.errors import UserError
from rlhf.evaluation.results import Marking, Marks, PromptResult
from rlhf.preflight.candidates import Candidate
from rlhf.preflight.eval_inputs import EvalInputs, inputs_of_run
from rlhf.preflight.inputs import load_inputs
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.types import GroupScores, Prompt, RewardError, StepReward
from tests.fakes.groups import rollout_info
from tests.fixtures.models import changed_copy

RUN = """\
run: {name: demo, seed: 7}
policy: {model: MODEL, dtype: float32}
algorithm: {name: grpo}
data:
  train: {task: guessing_game, split: train, size: 8}
  eval: {games: {task: guessing_game, split: eval, size: 7}}
  max_prompt_tokens: 16
rollouts:
  max_new_tokens: 4
  environment: {name: guess_number, args: {high: 7}, max_turns: 3, max_tokens: 64}
rewards: {won: {environment: true}}
train: {steps: 1, lr: 1.0e-3, sequences_per_update: 8, max_tokens_per_microbatch: 64}
eval: {temperature: 1.0, samples_per_prompt: 4, by: secret}
"""
JUDGE = """\
run: {name: demo, seed: 7}
stages:
  judge:
    evaluate:
      model: MODEL
      dtype: float32
      data: {games: {task: guessing_game, split: eval, size: 7}}
      environment: {name: guess_number, args: {high: 7}, max_turns: 3, max_tokens: 64}
      rewards: {won: {environment: true}}
      temperature: 1.0
      samples_per_prompt: 4
      max_new_tokens: 4
      by: secret
"""
SECTION = {RUN: "rollouts", JUDGE: "evaluate"}
GAME = "{name: guess_number, args: {high: 7}, max_turns: 3, max_tokens: 64}"
GAMES = "{task: guessing_game, split: eval, size: 7}"


def written(text: str, path: Path, model: Path, *, game: str = GAME, games: str = GAMES) -> Path:
    path.write_text(text.replace("MODEL", str(model)).replace(GAME, game).replace(GAMES, games))
    return path


def read(
    text: str, folder: Path, model: Path, *changes: str, against: Path | None = None, **changed: str
) -> EvalInputs:
    loaded = load(written(text, folder / "run.yaml", model, **changed), changes)
    return inputs_of_run(loaded, model=None, against=None if against is None else str(against), marks=Marks())


@pytest.mark.parametrize("text", [RUN, JUDGE])
def test_the_games_are_those_of_training(tiny_model: Path, tmp_path: Path, text: str) -> None:
    found = read(text, tmp_path, tiny_model)
    (stage,) = load_inputs(load(written(RUN, tmp_path / "trained.yaml", tiny_model)))
    (candidate,) = found.candidates
    assert candidate.prompts["games"] == stage.inputs.eval_sets["games"].prompts
    assert candidate.sources["games"] == stage.inputs.eval_sets["games"].sources
    assert candidate.environment.fingerprint() == stage.inputs.environment.fingerprint()
    assert candidate.environment.key == f"{SECTION[text]}.environment"
    assert candidate.longest_sequence(found.decoding.max_new_tokens) == 64  # of a conversation
    assert found.marking == Marking(ks=(1, 2, 4), passing=None, answers=None)  # no function, so no mark


def test_each_model_plays_with_its_own_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    environments = [candidate.environment for candidate in read(RUN, tmp_path, tiny_model, against=other).candidates]
    assert [spec.tokenizer for spec in environments if spec is not None] == [str(tiny_model), str(other)]


@pytest.mark.parametrize("text", [RUN, JUDGE])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("{name: calculator, max_tokens: 64}", "does not tell the model of tool `calculate`"),
        ("{name: guess_nmber, max_tokens: 64}", "SECTION.environment.name: there is no environment"),
        ("{name: guess_number, max_tokens: 64, tool_parser: hermes}", "SECTION.environment.tool_parser: has no effect"),
        ("{name: guess_number, max_tokens: 64, args: {low: 9, high: 7}}", "SECTION.environment.name: constructing"),
        ("{name: guess_number, max_tokens: 64, args: {api_key: x}}", "SECTION.environment.args.api_key: looks like"),
    ],
)
def test_what_cannot_be_played_is_refused(
    tiny_model: Path, tmp_path: Path, text: str, environment: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message.replace("SECTION", SECTION[text]))):
        read(text, tmp_path, tiny_model, game=environment)


@pytest.mark.parametrize("text", [RUN, JUDGE])
def test_a_conversation_must_fit_the_model_and_hold_a_turn(tiny_model: Path, tmp_path: Path, text: str) -> None:
    short = changed_copy(tiny_model, tmp_path / "short", max_position_embeddings=48)
    with pytest.raises(UserError, match=f"{SECTION[text]}.environment.max_tokens: is 64, more than the 48 that"):
        read(text, tmp_path, short)
    data = tmp_path / "games.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 60, "secret": 1}) + "\n")
    with pytest.raises(UserError, match=r"games.jsonl:1: the prompt has 63 tokens, with 4 of a turn that is more than"):
        read(text, tmp_path, tiny_model, games=str(data))
    if text == JUDGE:
        message = r"evaluate.environment.name: `calculator.reset` needs the column `answer`.* with evaluate.columns."
        with pytest.raises(UserError, match=message):
            read(text, tmp_path, tiny_model, game="{name: calculator, max_tokens: 64}", games=str(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["environment=null"], "rewards.won.environment: is true, but there is no environment; name one as evaluate."),
        (["environment.max_tokens=4"], "environment.max_tokens: is 4 and must hold a prompt and one turn of"),
        (["rewards={}"], "has no effect here: evaluate.rewards is empty"),
    ],
)
def test_a_stage_says_what_its_environment_lacks(
    tiny_model: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(JUDGE, tmp_path, tiny_model, *(f"stages.judge.evaluate.{change}" for change in changes))


def test_a_stage_counts_what_failed_as_a_run_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation about the first prompt hung. The second prompt has a score."""
    hung = RewardError(reward="environment", kind="timeout", message="step: late", prompt_id=0, sample=1)

    def group(prompt_id: int, errors: tuple[RewardError | None, ...]) -> ScoredGroup:
        won = (StepReward(end=1, value=1.0),)
        infos = tuple(
            rollout_info(sample, environment_rewards=won if error is None else None, environment_error=error)
            for sample, error in enumerate(errors)
        )
        prompt = Prompt(prompt_id=prompt_id, token_ids=(1,), text="go", columns={})
        request = request_for(prompt, group_id=prompt_id, first_sequence_id=0, samples=2, run_seed=0)
        failed = tuple(error for error in errors if error is not None)
        scores = GroupScores(scores=(1.0, 0.0), by_name={"won": (1.0, 0.0)}, errors=())
        if failed:
            scores = GroupScores(scores=(), by_name={}, errors=failed)
        return ScoredGroup(group=CompletedGroup(request=request, rollouts=None, infos=infos), scores=scores)

    async def answers(
        candidate: Candidate, inputs: EvalInputs, note: Callable[[str, str, ScoredGroup], None]
    ) -> dict[str, list[PromptResult]]:
        for scored in (group(0, (None, hung)), group(1, (None, None))):
            note(candidate.model.name, "games", scored)
        answered: dict[str, Any] = {"answers": None, "truncated": (False, False), "response_tokens": (1, 1)}
        scores = {"scores": (1.0, 0.0), "by_name": {"won": (1.0, 0.0)}}
        return {"games": [PromptResult(prompt_id=1, prompt="go", responses=("4", "5"), **scores, **answered)]}

    monkeypatch.setattr("actors.run.evaluate._answers", answers)
    text = JUDGE.replace("seed: 7}", f"seed: 7, dir: {tmp_path}}}").replace("size: 7", "size: 2")
    loaded = load(written(text, tmp_path / "run.yaml", tiny_model))
    (stage,) = loaded.stages.values()
    run_evaluation(stage, loaded, resume=False)
    folder = run_folder(stage)
    (row,) = read_metrics(folder)
    assert row["rollouts/environment_errors/total"] == row["rollouts/environment_timeouts/total"] == 1.0
    assert row["rewards/errors/total"] == 1.0
    assert row["eval/games/won"] == 0.5
    (error,) = (folder / "errors.jsonl").read_text().splitlines()
    assert {"kind": "timeout", "split": "games", "model": str(tiny_model)}.items() <= json.loads(error).items()
    assert json.loads((folder / "eval.json").read_text())["sets"]["games"]["num_failed"] == 1
