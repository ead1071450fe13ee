"""A run reads its data sets before anything starts, and evaluations with an environment read the inputs of training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.run.evaluate import run_evaluation
from rlhf.config.files.load import load
from rlhf.config.schema.stages import run_folder
from rlhf.data.stream import MixtureShare
from rlhf.errors import UserError
from rlhf.evaluation.results import Marking, Marks, PromptResult
from rlhf.preflight.candidates import Candidate
from rlhf.preflight.eval_inputs import EvalInputs, inputs_of_run
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.start import Start
from rlhf.preflight.training_data import OfflineInputs, OnlineInputs
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.suites.spec import SuiteAnswers
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.types import GroupScores, RewardError, StepReward
from rlhf.workers.frozen.served_model import ServedModel
from tests.fakes.groups import group_request, rollout_info
from tests.fixtures.models import changed_copy

SFT = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:llama", dtype: float32}
algorithm: {name: sft}
data: {train: {a: {source: DIR/a.jsonl, weight: 3}, b: {source: DIR/b.jsonl}}, max_unusable_fraction: 0.5}
train: {steps: 1, lr: 1e-3, sequences_per_update: 2, max_tokens_per_microbatch: 64}
"""
GRPO = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:llama", dtype: float32}
algorithm: {name: grpo}
data: {train: {a: {source: DIR/a.jsonl}, b: {source: DIR/b.jsonl}}, max_prompt_tokens: 32}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 8}
rewards: {correct: {function: exact_match}}
train: {steps: 1, lr: 1e-3, sequences_per_update: 4, max_tokens_per_microbatch: 64}
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage(tmp_path: Path, text: str, *overrides: str, steps: str = "steps: 1") -> Any:
    (tmp_path / "run.yaml").write_text(text.replace("DIR", str(tmp_path)).replace("steps: 1", steps))
    (only,) = load_inputs(load(tmp_path / "run.yaml", overrides))
    return only


def inputs(tmp_path: Path, text: str, *overrides: str) -> Any:
    return stage(tmp_path, text, *overrides).inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"prompt": "a", "completion": "b", "answer": "b"}
    write(tmp_path / "a.jsonl", [row, row | {"completion": ""}, row | {"completion": "c"}])
    write(tmp_path / "b.jsonl", [row | {"completion": " "}, {"prompt": "x", "completion": "y", "answer": "y"}])
    return tmp_path


def test_epochs_count_the_rows_that_are_kept(folder: Path) -> None:
    run = stage(folder, SFT, steps="epochs: 3")
    assert (run.config.train.steps, run.config.train.epochs) == (5, None)  # 3 * 3 rows, 2 in each step
    assert (run.written.train.steps, run.written.train.epochs) == (None, 3.0)
    assert stage(folder, GRPO, steps="epochs: 1").config.train.steps == 3  # 5 prompts, 2 in each step
    with pytest.raises(UserError, match=r"train\.epochs is 1, which makes 2 steps: train\.warmup_steps: is 9"):
        stage(folder, SFT, steps="epochs: 1, warmup_steps: 9")


def test_sets_stand_one_behind_the_other_and_what_is_left_out_is_known(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = inputs(folder, SFT)
    assert isinstance(found, OfflineInputs)
    assert [example.example_id for example in found.rows] == [0, 1, 2]
    assert found.shares == (
        MixtureShare(name="data.train.a.source", weight=3.0, size=2),
        MixtureShare(name="data.train.b.source", weight=1.0, size=1),
    )
    assert [row.place for row in found.unusable] == [f"{folder}/a.jsonl:2", f"{folder}/b.jsonl:1"]
    assert "data.train.b.source: 1 of 2 rows cannot be used and are left out" in caplog.text
    with pytest.raises(UserError, match=r"data.train.b.source: .*b.jsonl:1: column `completion`"):
        inputs(folder, SFT, "data.max_unusable_fraction=0.4")  # a third of a, half of b
    prompts = inputs(folder, GRPO)
    assert isinstance(prompts, OnlineInputs)
    assert [prompt.prompt_id for prompt in prompts.prompts] == [0, 1, 2, 3, 4]
    assert [share.size for share in prompts.shares] == [3, 2]


def test_the_limit_of_tokens_is_the_micro_batch_unless_it_is_lower(folder: Path) -> None:
    write(folder / "b.jsonl", [{"prompt": "x" * 30, "completion": "y" * 30}])
    with pytest.raises(UserError, match=r"b.jsonl:1: the example has 64 tokens, more than .*: 63. Raise it"):
        inputs(folder, SFT, "data.max_sequence_tokens=63")
    assert len(inputs(folder, SFT).rows[-1].token_ids) == 64  # user, 30, eos, assistant, 30, eos
    cut = inputs(folder, SFT, "data.max_sequence_tokens=40", "data.too_long=cut").rows[-1]
    assert (len(cut.token_ids), sum(cut.loss_mask)) == (40, 7)


def test_a_curriculum_needs_prompts_that_come_up_twice(folder: Path) -> None:
    one = [f"data.train={folder}/a.jsonl", "data.curriculum={}"]
    accepted = ("train.steps=2", "rollouts.oversample=2", "rollouts.dynamic_sampling={}")
    # of mixed sets, a small one may come up twice
    for overrides in ([*one, accepted[0]], [*one, accepted[1]], [*one, accepted[2]], ["data.curriculum={}"]):
        assert isinstance(inputs(folder, GRPO, *overrides), OnlineInputs)
    with pytest.raises(
        UserError, match=r"data.train has 3 prompts, of which 1 steps need 2 at most, so no prompt comes up"
    ):
        inputs(folder, GRPO, *one)
    with pytest.raises(UserError, match="need 3 at most"):  # 2 * 1.1, rounded up
        inputs(folder, GRPO, *one, "reward_policy.on_error=drop")


SERVICE = "rewards={far: {url: 'http://127.0.0.1:9/'}}"


@pytest.mark.parametrize(
    ("metric", "keys", "message"),
    [
        ("/pass@4", [], None),
        ("/score", [], None),
        ("/correct", [], None),
        ("/pass@4", [SERVICE], r"'eval/heldout/pass@4', which no evaluation has: pass@k needs eval.pass_score"),
        ("/pass@4", [SERVICE, "eval.pass_score=1"], None),
        ("/maj@1", [], r"expected a metric of an evaluation.*eval/heldout/maj@2, eval/heldout/maj@4"),
        (".b/score", ["eval.by=answer"], None),
        (".c/score", ["eval.by=answer"], r"'eval/heldout.c/score', which no evaluation has. The metrics are: .*t.b/sc"),
    ],
)
def test_the_best_metric_is_one_that_the_evaluations_have(
    folder: Path, metric: str, keys: list[str], message: str | None
) -> None:
    best, held_out = f"train.best_metric=eval/heldout{metric}", f"data.eval={folder}/a.jsonl"
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        inputs(folder, GRPO, held_out, "eval.samples_per_prompt=4", "eval.temperature=1", *keys, best)


def test_a_teacher_is_not_asked_at_a_temperature_of_each_prompt(folder: Path) -> None:
    write(folder / "a.jsonl", [{"prompt": "a", "answer": "b", "temperature": 0.5}])
    assert inputs(folder, GRPO).prompts[0].temperature == 0.5
    taught = ["algorithm={name: on_policy_distillation}", "teacher={model: 'tiny:llama', dtype: float32}"]
    with pytest.raises(UserError, match="column `temperature` is not for algorithm on_policy_distillation"):
        inputs(folder, GRPO, *taught)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"source": "poems"},
            r"a.jsonl:2: column `source` is the string 'poems', expected the name of the row's teacher: math, c",
        ),
        ({"source": 7}, r"a.jsonl:2: column `source` is the number 7, expected the name of the row's teacher: math, c"),
        ({}, r"a.jsonl:2: has no column `source`, expected the name of the row's teacher: math, code"),
    ],
)
def test_each_row_names_its_teacher(folder: Path, row: dict[str, Any], says: str) -> None:
    rows = [{"prompt": "a", "answer": "b", "source": "math"}, {"prompt": "a", "answer": "b", **row}]
    write(folder / "a.jsonl", rows)
    write(folder / "b.jsonl", rows[:1])
    teachers = "teacher={math: {model: 'tiny:llama'}, code: {model: 'tiny:llama'}}"
    named = [teachers, "algorithm={name: on_policy_distillation, teacher_column: source}"]
    with pytest.raises(UserError, match=says):
        inputs(folder, GRPO, *named)
    write(folder / "a.jsonl", rows[:1])
    assert inputs(folder, GRPO, *named).prompts[0].columns["source"] == "math"


def test_checks_alone_ask_no_server_of_a_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ServedModel, "refuse_unfit", lambda self, tokenizer, **_: asked.append(self.name))
    write(folder / "b.jsonl", [{"prompt": "x", "answer": "y"}])
    tree = yaml.safe_load(GRPO.replace("DIR", str(folder)))
    shared = {name: tree.pop(name) for name in ("run", "policy")}
    taught = {"algorithm": {"name": "on_policy_distillation"}, "teacher": {"url": "http://h/v1", "model": "far"}}
    judged = {"model": "stage:learn", "data": f"{folder}/b.jsonl", "rewards": tree["rewards"]}
    stages = {"learn": {**tree, **taught}, "judge": {"evaluate": judged}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**shared, "stages": stages}, sort_keys=False))
    loaded = load(folder / "run.yaml")
    load_inputs(loaded, only_checks=True)
    assert asked == []
    load_inputs(loaded)
    assert asked == ["far"]


def test_a_row_limits_its_responses_within_the_runs_limit(folder: Path) -> None:
    write(folder / "a.jsonl", [{"prompt": "a", "answer": "b", "max_new_tokens": 8}])
    held_out = f"data.eval={folder / 'a.jsonl'}"
    found = inputs(folder, GRPO, held_out)
    (evaluated,) = found.eval_sets.values()
    assert (found.prompts[0].max_new_tokens, evaluated.prompts[0].max_new_tokens) == (8, 8)
    with pytest.raises(UserError, match=r"data.train.a.source: .*:1: column `max_new_tokens` is 8, .* 1 to .*, 7,"):
        inputs(folder, GRPO, "rollouts.max_new_tokens=7")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), None),
        (("policy.lora={}",), None),
        (("rollouts.max_new_tokens=2048", "train.max_tokens_per_microbatch=4096"), "takes at most 2048 tokens"),
        (("cluster.roles.policy={workers: 3, sequence_parallel: 3}",), "must divide the model's 4 attention heads"),
        (("policy.router_balance_coef=0.1",), "is no mixture of experts"),
        (("policy.lora={target_modules: [nothing]}",), "nothing"),
        (("policy.lora={quantize: nf4}",), "has linear layers 96 wide"),
    ],
)
def test_checks_alone_accept_and_refuse_what_a_run_does(
    folder: Path, overrides: tuple[str, ...], message: str | None
) -> None:
    write(folder / "b.jsonl", [{"prompt": "x", "answer": "y"}])
    (folder / "run.yaml").write_text(GRPO.replace("DIR", str(folder)))
    loaded, read = load(folder / "run.yaml", overrides), []
    for only_checks in (True, False):
        with nullcontext() if message is None else pytest.raises(UserError, match=message):
            (only,) = load_inputs(loaded, only_checks=only_checks)
            read.append(only.inputs)
    assert read[:1] == read[1:]
    assert {path.name for path in folder.glob("demo/models/*")} == {"tiny-llama", "tiny-llama-0"}


RUN = """\
run: {name: demo, seed: 7}
policy: {model: MODEL, dtype: float32}
algorithm: {name: grpo}
data:
  {train: {task: guessing_game, split: train, size: 8}, eval: {games: {task: guessing_game, split: eval, size: 7}},
   max_prompt_tokens: 16}
rollouts: {max_new_tokens: 4, environment: {name: guess_number, args: {high: 7}, max_turns: 3, max_tokens: 64}}
rewards: {won: {environment: true}}
train: {steps: 1, lr: 1.0e-3, sequences_per_update: 8, max_tokens_per_microbatch: 64}
eval: {temperature: 1.0, samples_per_prompt: 4, by: secret}
"""
JUDGE = """\
run: {name: demo, seed: 7}
stages:
  judge:
    evaluate:
      {model: MODEL, dtype: float32, data: {games: {task: guessing_game, split: eval, size: 7}}, by: secret,
       environment: {name: guess_number, args: {high: 7}, max_turns: 3, max_tokens: 64},
       rewards: {won: {environment: true}}, temperature: 1.0, samples_per_prompt: 4, max_new_tokens: 4}
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
    with pytest.raises(
        UserError, match=r"games.jsonl:1: the prompt has 63 tokens. With the 4 tokens of a turn, this " r"is more than"
    ):
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

    won: dict[str, Any] = {"scores": (1.0, 0.0), "by_name": {"won": (1.0, 0.0)}}

    def group(prompt_id: int, *errors: RewardError) -> ScoredGroup:
        played = {"environment_rewards": (StepReward(end=1, value=1.0),)}
        second = {"environment_error": errors[0]} if errors else played
        infos = (rollout_info(0, **played), rollout_info(1, **second))
        scores = GroupScores(**({"scores": (), "by_name": {}} if errors else won), errors=errors)
        request = group_request(prompt_id, samples=2)
        return ScoredGroup(group=CompletedGroup(request=request, rollouts=None, infos=infos), scores=scores)

    async def answers(
        candidate: Candidate, inputs: EvalInputs, note: Callable[[str, str, ScoredGroup], None], folder: Path
    ) -> tuple[dict[str, list[PromptResult]], list[SuiteAnswers]]:
        for scored in (group(0, hung), group(1)):
            note(candidate.model.name, "games", scored)
        answered: dict[str, Any] = {"answers": None, "truncated": (False, False), "response_tokens": (1, 1)}
        return {"games": [PromptResult(prompt_id=1, prompt="go", responses=("4", "5"), **won, **answered)]}, []

    monkeypatch.setattr("actors.run.evaluate._answers", answers)
    text = JUDGE.replace("seed: 7}", f"seed: 7, dir: {tmp_path}}}").replace("size: 7", "size: 2")
    loaded = load(written(text, tmp_path / "run.yaml", tiny_model))
    (stage,) = loaded.stages.values()
    run_evaluation(stage, loaded, Start())
    folder = run_folder(stage)
    (row,) = read_metrics(folder)
    assert row["rollouts/environment_errors/total"] == row["rollouts/environment_timeouts/total"] == 1.0
    assert row["rewards/errors/total"] == 1.0
    assert row["eval/games/won"] == 0.5
    (error,) = (folder / "errors.jsonl").read_text().splitlines()
    assert {"kind": "timeout", "split": "games", "model": str(tiny_model)}.items() <= json.loads(error).items()
    assert json.loads((folder / "eval.json").read_text())["sets"]["games"]["num_failed"] == 1


def test_an_algorithm_of_given_responses_needs_one_in_the_data(tmp_path: Path) -> None:
    prompts = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(4)]
    write(tmp_path / "a.jsonl", prompts)
    write(tmp_path / "b.jsonl", prompts)
    chord = "algorithm={name: chord}"
    with pytest.raises(UserError, match="no row has a given response, from which algorithm chord learns: column"):
        stage(tmp_path, GRPO, chord)
    write(tmp_path / "b.jsonl", [{**row, "completion": row["answer"]} for row in prompts])
    inputs = stage(tmp_path, GRPO, chord).inputs
    assert isinstance(inputs, OnlineInputs)
    assert [prompt.given is not None for prompt in inputs.prompts] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("prompt", "model", "tokens", "says"),
    [
        ("go", "tiny:qwen3_vl", 128, "rollouts.environment: may show images to a vision policy, but the teacher of"),
        ("go go go go", "tiny:llama", 64, "tokens, more than 14: train.max_tokens_per_microbatch"),  # 64 - 50
    ],
)
def test_a_policy_that_teaches_itself_in_an_environment_refuses(
    tmp_path: Path, prompt: str, model: str, tokens: int, says: str
) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "secret": 3, "answer": "3"}])
    changes = [
        "algorithm={name: sdft, privileged: {template: '{prompt} {secret}'}}",
        "rollouts.environment={name: guess_number, args: {low: 1, high: 7}, max_tokens: 50}",
        f"policy.model={model}",
        f"train.max_tokens_per_microbatch={tokens}",
        "rewards={won: {environment: true}}",
    ]
    with pytest.raises(UserError, match=re.escape(says)):
        inputs(tmp_path, GRPO, *changes)


def test_a_mixture_with_given_responses_needs_one_in_each_training_row(tmp_path: Path) -> None:
    prompts = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(4)]
    answered = [{**row, "completion": row["answer"]} for row in prompts]
    write(tmp_path / "b.jsonl", prompts)
    taught = [
        "algorithm={name: on_policy_distillation, divergence: jsd, on_policy_share: 0.5}",
        "teacher={model: 'tiny:llama', dtype: float32}",
        f"data={{train: {tmp_path}/a.jsonl, eval: {tmp_path}/b.jsonl, max_prompt_tokens: 32}}",
    ]
    write(tmp_path / "a.jsonl", [*answered[:2], prompts[2]])
    with pytest.raises(UserError, match=r"a.jsonl:3: the row has no given response, but algorithm.on_policy_share"):
        stage(tmp_path, GRPO, *taught)
    write(tmp_path / "a.jsonl", answered)
    inputs = stage(tmp_path, GRPO, *taught).inputs
    assert isinstance(inputs, OnlineInputs)
    assert all(prompt.given is not None for prompt in inputs.prompts)
    assert [prompt.given for prompt in inputs.eval_sets["heldout"].prompts] == [None] * 4
