"""Rewards are loaded by name, or refused with a message; weights, gates, normalisation and errors of a reward set."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.rewards.combining import GROUP_STD_EPS, RewardTerm, gated_steps, plain_sum, training_sum
from rlhf.rewards.failure_rule import ErrorRule
from rlhf.rewards.loading import LoadedReward, check_columns, load_reward
from rlhf.rewards.processes.program import Signature
from rlhf.rewards.scoring import RewardSet, RewardSpec, deadline_s, describe_errors, fingerprint
from rlhf.types import GroupScores, Prompt, RewardError, StepReward

FILES = Path(__file__).parent.parent / "fixtures" / "rewards"
PROMPT = Prompt(prompt_id=7, token_ids=(1,), text="p", columns={"answer": "ab", "unused": 1})


def spec(name: str, function: str | None, weight: float = 1.0) -> RewardSpec:
    none = RewardSpec(name=name, weight=weight, function=None)
    return none if function is None else loaded(name, function, weight=weight)


def loaded(name: str, function: str, args: dict[str, Any] | None = None, **settings: Any) -> RewardSpec:
    code = load_reward(function, args=args or {}, folders=[FILES], key=name)
    return RewardSpec(**{"name": name, "weight": 1.0, "function": code, **settings})


def scored(specs: list[RewardSpec], responses: list[str], *, timeout_s: float = 5.0, **columns: Any) -> GroupScores:
    columns = {"truncated": [False] * len(responses), **columns}
    with closing(RewardSet(specs, timeout_s=timeout_s)) as rewards:
        return rewards.score(PROMPT, responses, **columns)


def test_weighted_sum_by_hand() -> None:
    specs = [spec("length", "simple.py:length", 0.5), spec("taste", None, -2.0), spec("exact", "exact_match", 10.0)]
    scores = scored(specs, ["ab", "abcd"], model_scores={"taste": [0.25, 3.0]})
    # 0.5 * 2 - 2 * 0.25 + 10 * 1 = 10.5;   0.5 * 4 - 2 * 3 + 10 * 0 = -4
    assert scores.scores == (10.5, -4.0)
    assert scores.by_name == {"length": (2.0, 4.0), "taste": (0.25, 3.0), "exact": (1.0, 0.0)}
    assert scores.errors == ()
    assert scored([spec("taste", None, 2.0)], ["a"], model_scores={"taste": [1.5]}).scores == (3.0,)
    none = scored([], ["a", "b"], truncated=[False, True])
    assert (none.scores, none.by_name, none.errors) == ((), {}, ())
    # 2 functions, each twice 8 calls of 5 s and a start of 120 s
    assert deadline_s(specs, 8, timeout_s=5.0) == 2 * 2 * (8 * 5.0 + 120.0)


def test_rewards_are_the_same_until_configuration_or_code_changes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"

    def found(code: str = "return 1.0", weight: float = 1.0, model: str = "") -> str:
        file.write_text(f"def f(prompt, response):\n    {code}\n")
        return fingerprint([loaded("mine", f"{file}:f", weight=weight)], model=model)

    assert found() == found()
    assert len({found(), found("return 2.0"), found(weight=0.5), found(model="other")}) == 4


def test_errors_of_functions_and_models_leave_no_scores() -> None:
    specs = [spec("taste", None), spec("strict", "hostile.py:raises"), spec("length", "simple.py:length")]
    scores = scored(specs, ["a", "x"], model_scores={"taste": [float("nan"), 1.0]})
    assert scores.scores == ()
    assert scores.by_name == {}
    assert [(e.reward, e.kind, e.prompt_id, e.sample) for e in scores.errors] == [
        ("taste", "not_a_number", 7, 0),
        ("strict", "raised", 7, 1),
    ]


def test_an_ensemble_without_a_number_has_no_disagreement() -> None:
    taste = replace(spec("taste", None), on_error=-1.0)
    values = {"model_scores": {"taste": [float("nan"), 1.0]}, "disagreement": {"taste": [float("nan"), 0.5]}}
    scores = scored([taste], ["a", "b"], **values)
    assert (scores.scores, scores.parts) == ((-1.0, 1.0), {"taste/disagreement": (None, 0.5)})


def test_model_scores_must_fit_the_group_and_weights_that_overflow_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 reward model scores for 2 responses"):
        scored([spec("taste", None)], ["a", "b"], model_scores={"taste": [1.0]})
    (error,) = scored([spec("taste", None, 1e300)], ["a"], model_scores={"taste": [1e300]}).errors
    assert error.kind == "not_a_number"


def test_describe_says_each_cause_once() -> None:
    errors = [
        RewardError(reward="r", kind="raised", message="ValueError: no, at f.py:3 in r", prompt_id=7, sample=i)
        for i in (2, 4, 5)
    ]
    errors.append(RewardError(reward="q", kind="timeout", message="no answer within 10 s", prompt_id=8, sample=0))
    assert describe_errors(errors).splitlines() == [
        "reward `r` raised an exception on response 2 to prompt 7: ValueError: no, at f.py:3 in r (and 2 more like it)",
        "reward `q` did not answer in time on response 0 to prompt 8: no answer within 10 s",
    ]


def test_a_cut_response_gets_what_the_configuration_says() -> None:
    cut = RewardSpec(name="taste", weight=0.5, function=None, truncated_score=-2.0)
    model_scores = {"taste": [3.0, 4.0], "other": [1.0, 1.0]}
    scores = scored([cut, spec("other", None)], ["a", "b"], truncated=[True, False], model_scores=model_scores)
    assert scores.by_name == {"taste": (-2.0, 4.0), "other": (1.0, 1.0)}
    assert scores.scores == (0.0, 3.0)  # 0.5 * -2 + 1 and 0.5 * 4 + 1
    assert fingerprint([cut], model="") != fingerprint([spec("taste", None, 0.5)], model="")


def test_steps_stand_beside_their_sums_at_their_tokens() -> None:
    """`1x2` has the tokens 4 to 6 and an end at 7. The second response, `3`, was cut and is token 2 of its sequence."""
    digits = loaded("digits", "steps.py:digits", weight=2.0, by_step=True, truncated_score=-1.0)
    sound = RewardSpec(name="sound", weight=1.0, function=None, by_step=True)
    told = [(StepReward(end=5, value=0.5), StepReward(end=7, value=0.25)), ()]
    with closing(RewardSet([digits, sound, spec("taste", None)], timeout_s=5.0)) as rewards:
        columns = {"truncated": [False, True], "model_scores": {"taste": [1.0, 1.0]}, "model_steps": {"sound": told}}
        scores = rewards.score(PROMPT, ["1x2", "3"], places=[(4, 4, 5, 7), (2, 2)], **columns)  # type: ignore[arg-type]
        unplaced = rewards.score(PROMPT, ["1x2", "3"], **columns)  # type: ignore[arg-type]
        broken = {**columns, "model_steps": {"sound": [(StepReward(end=1, value=float("nan")),), ()]}}
        failed = rewards.score(PROMPT, ["1x2", "3"], places=[(4, 4, 5, 7), (2, 2)], **broken)  # type: ignore[arg-type]
    assert scores.by_name == {"digits": (3.0, -1.0), "sound": (0.75, 0.0), "taste": (1.0, 1.0)}
    assert scores.scores == (7.75, -1.0)
    assert scores.steps == {
        "digits": (
            (StepReward(end=4, value=1.0), StepReward(end=7, value=2.0)),
            (StepReward(end=2, value=-1.0),),  # as a whole
        ),
        "sound": tuple(told),
    }
    assert (unplaced.scores, unplaced.by_name, unplaced.steps) == (scores.scores, scores.by_name, {})
    assert (failed.scores, failed.steps, failed.errors[0].message) == ((), {}, "the reward model gave nan")
    plain = RewardSpec(name="sound", weight=1.0, function=None)
    assert fingerprint([sound], model="") != fingerprint([plain], model="")


@pytest.mark.parametrize(("name", "kind"), [("raises", "raised"), ("sleeps", "timeout"), ("dies", "died")])
def test_a_failed_call_gets_the_score_of_its_rule_and_is_an_error_all_the_same(name: str, kind: str) -> None:
    specs = [loaded(name, f"hostile.py:{name}", on_error=-0.5), spec("length", "simple.py:length")]
    scores = scored(specs, ["a", "x", "bc"], timeout_s=0.8)
    assert scores.by_name == {name: (1.0, -0.5, 1.0), "length": (1.0, 1.0, 2.0)}
    assert scores.scores == (2.0, 0.5, 3.0)
    assert scores.errors == ()
    assert [(error.reward, error.kind, error.sample) for error in scores.scored_errors] == [(name, kind, 1)]


@pytest.mark.parametrize("on_error", [None, "fail", "drop"])
def test_without_a_score_for_failures_the_group_has_no_scores(on_error: ErrorRule) -> None:
    scores = scored([loaded("sleeps", "hostile.py:sleeps", on_error=on_error)], ["x", "a"], timeout_s=0.5)
    assert (scores.scores, scores.scored_errors) == ((), ())
    assert [(error.kind, error.sample) for error in scores.errors] == [("timeout", 0)]


def test_a_built_in_finds_a_response_wrong_that_ends_its_process() -> None:
    """The built-in limit is above the limit of the pool, like a hang in C."""
    for rule, expected in ((None, (1.0, 0.0, 0.0)), ("drop", ())):
        form = loaded("form", "format_regex", {"pattern": "(a|a)+b", "limit_s": 60.0}, on_error=rule)
        scores = scored([form], ["aab", "a" * 100, "c"], timeout_s=0.8)
        assert scores.scores == expected
        assert [error.kind for error in (*scores.errors, *scores.scored_errors)] == ["timeout"]


def test_a_reward_without_an_opinion_is_left_out_of_that_sum() -> None:
    silent = loaded("silent", "hostile.py:returns", {"value": None}, weight=2.0)
    scores = scored([silent, spec("length", "simple.py:length")], ["ab", "x"])
    assert scores.by_name == {"silent": (1.0, None), "length": (2.0, 1.0)}
    assert scores.scores == (4.0, 1.0)
    scores = scored([silent, spec("length", "simple.py:length", 0.0)], ["ab", "x"])  # no reward with a weight applies
    assert scores.scores == ()
    assert [(error.reward, error.kind, error.sample) for error in scores.errors] == [("score", "no_opinion", 1)]


def test_by_steps_a_scored_failure_is_one_step() -> None:
    steps = loaded("steps", "steps.py:returns", {"value": "no steps"}, by_step=True, on_error=-1.0)
    scores = scored([steps], ["ab"], places=[(3, 4, 5)])
    assert scores.scores == (-1.0,)
    assert scores.steps == {"steps": ((StepReward(end=5, value=-1.0),),)}


def test_a_function_gets_the_result_of_each_session(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def one(prompt, response, result, answer):\n    return float(len(result['said'] + answer))\n"
        "def group(prompts, responses, result):\n    return [float(len(r['said'])) for r in result]\n"
    )
    specs = [loaded(name, f"{tmp_path}/mine.py:{name}") for name in ("one", "group")]
    scores = scored(specs, ["", ""], results=[{"said": "x"}, {"said": "xyz"}])
    assert scores.by_name == {"one": (3.0, 5.0), "group": (1.0, 3.0)}


RIGHT_OR_SHORT = {"right": RewardTerm(weight=10.0), "short": RewardTerm(weight=0.5, gate="right")}
CIRCLE = {"a": RewardTerm(weight=1.0, gate="b"), "b": RewardTerm(weight=1.0, gate="a")}
SAFE = {"safe": RewardTerm(weight=0.0), "good": RewardTerm(weight=1.0, gate="safe")}
BY_KIND = {"maths": RewardTerm(weight=1.0), "code": RewardTerm(weight=5.0)}
WATCHED = {"a": RewardTerm(weight=2.0), "b": RewardTerm(weight=1.0), "watched": RewardTerm(weight=0.0)}

NORMALISED = {"big": RewardTerm(weight=1.0, normalize="group"), "small": RewardTerm(weight=2.0)}


@pytest.mark.parametrize(
    ("terms", "values", "expected"),
    [
        # 10 * 1 + .5 * 4 * 1 = 12;   0 + .5 * 4 * 0 = 0;   10 * .5 + .5 * 2 * .5 = 5.5
        (RIGHT_OR_SHORT, {"right": [1.0, 0.0, 0.5], "short": [4.0, 4.0, 2.0]}, [12.0, 0.0, 5.5]),
        (SAFE, {"safe": [1.0, 0.0], "good": [3.0, 3.0]}, [3.0, 0.0]),  # a gate of weight 0 still gates
        (CIRCLE, {"a": [2.0], "b": [3.0]}, [12.0]),  # 2 * 3 + 3 * 2: plain values gate
        (BY_KIND, {"code": [2.0]}, [10.0]),  # a reward that does not apply adds nothing
        # a reward that returns None adds nothing
        (WATCHED, {"a": [1.0, None, None], "b": [3.0, 4.0, None], "watched": [9.0] * 3}, [5.0, 4.0, None]),
        (NORMALISED, {"big": [100.0, 300.0], "small": [0.0, 1.0]}, [100.0, 302.0]),  # normalised only for training
    ],
)
def test_a_sum_of_weighted_and_gated_rewards(
    terms: dict[str, RewardTerm], values: dict[str, list[float | None]], expected: list[float | None]
) -> None:
    assert plain_sum(values, terms) == expected


BEHIND_GATE = {"right": RewardTerm(weight=0.0), "taste": RewardTerm(weight=1.0, gate="right", normalize="group")}
# Mean 200 and unbiased std sqrt(2 * 100**2) = 141.42 of 100 and 300; mean 2.5 and std 3.5355 of 5 and 0.
BIG, TASTE = 100.0 / (math.sqrt(2 * 100**2) + GROUP_STD_EPS), 2.5 / (math.sqrt(2 * 2.5**2) + GROUP_STD_EPS)


@pytest.mark.parametrize(
    ("terms", "values", "expected"),
    [
        (RIGHT_OR_SHORT, {"right": [1.0, 0.0, 0.5], "short": [4.0, 4.0, 2.0]}, [12.0, 0.0, 5.5]),  # plain gates
        (NORMALISED, {"big": [100.0, 300.0], "small": [0.0, 1.0]}, [-BIG, 2.0 + BIG]),
        # mean and deviation of the responses with a value
        (NORMALISED, {"big": [100.0, None, 300.0], "small": [0.0, 1.0, 0.0]}, [-BIG, 2.0, BIG]),
        (NORMALISED, {"big": [7.0, None, None], "small": [0.0] * 3}, [0.0] * 3),
        (NORMALISED, {"big": [0.1] * 3}, [0.0] * 3),  # equal values normalise to nothing
        (BEHIND_GATE, {"right": [1.0, 0.0], "taste": [5.0, 9.0]}, [TASTE, -TASTE]),
    ],
)
def test_a_sum_for_training_is_normalised_behind_its_gates(
    terms: dict[str, RewardTerm], values: dict[str, list[float | None]], expected: list[float]
) -> None:
    assert training_sum(values, terms) == pytest.approx(expected, abs=1e-9)


def test_a_reward_whose_gate_has_no_opinion_is_left_out() -> None:
    shares = SAFE | {"short": RewardTerm(weight=0.5)}
    values = {"safe": [1.0, None], "good": [3.0, 3.0], "short": [1.0, 1.0]}
    assert plain_sum(values, shares) == [3.5, 0.5]
    steps = {"good": [[StepReward(end=1, value=3.0)]] * 2}
    assert gated_steps(steps, values, shares) == {"good": [[3.0], []]}


def load(function: str, *, folder: Path = FILES, timeout_s: float = 60.0, **args: object) -> LoadedReward:
    return load_reward(function, args=args, folders=(folder, FILES), key="rewards.r", timeout_s=timeout_s)


def refusal(function: str, **how: Any) -> str:
    with pytest.raises(UserError, match=r"^rewards\.r: ") as error:
        load(function, **how)
    return str(error.value)


def test_only_named_columns_are_passed_and_args_are_not_columns(tmp_path: Path) -> None:
    row = {"answer": "a", "start": 3, "prompt": "not this one"}
    right = load("simple.py:right")
    assert right.signature == Signature(batched=False, required=("answer",), optional=("tolerance",), takes_all=True)
    assert right.select(row) == {"answer": "a", "start": 3}
    batched = load("simple.py:batched")
    assert (batched.signature.batched, batched.select(row)) == (True, {"answer": "a"})
    fixed = load("simple.py:right", tolerance=0.5)
    assert fixed.signature.optional == ()
    assert fixed.select({"answer": "a", "tolerance": 9, "other": 1}) == {"answer": "a", "other": 1}
    length = load("simple.py:length", folder=tmp_path)  # the first folder that has the file
    assert (length.select(row), length.source.path) == ({}, str(FILES.resolve() / "simple.py"))
    assert pickle.loads(pickle.dumps(fixed)) == fixed


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("math_anwser", {}, "did you mean `math_answer`?"),
        ("simple.py", {}, "`simple.py:NAME`"),
        ("absent.py:reward", {}, str(FILES.resolve() / "absent.py")),
        ("~nosuchuser/x.py:reward", {}, "the file `~nosuchuser/x.py` of the reward does not exist"),
        ("simple.py:not_callable", {}, "is of type int, not a function or a class"),
        ("simple.py:wrong_names", {}, "must take `prompt, response`"),
        ("simple.py:by_position", {}, "arguments are passed by name"),
        ("simple.py:asynchronous", {}, "is async"),
        ("simple.py:NoCall", {}, "has no __call__"),
        ("simple.py:Counting", {"begin": 1}, "cannot be constructed"),
        ("simple.py:length", {"weight": 1}, "has no parameter weight"),
        ("format_regex", {"pattern": "("}, "unterminated"),
        ("length_penalty", {"limit": 400, "unit": "tokens"}, "unit is 'tokens'"),
        ("length_penalty", {"limit": "400"}, "TypeError"),
        ("target_length", {"unit": "tokens"}, "unit is 'tokens'"),
        ("overlong", {"limit": 10, "buffer": 11}, "at most limit"),
        ("repetition_penalty", {"ngram": 0}, "ngram must be 1 or more"),
        ("regex_match", {"pattern": "("}, "unterminated"),
        ("regex_match", {"limit_s": 0}, "limit_s must be positive, got 0"),
        ("simple.py:lenght", {}, "defines no `lenght`"),
        ("cosine_length", {"limit": 9, "verifier": "regex_match", "verifier_args": {"pattern": "("}}, "unterminated"),
    ],
)
def test_a_name_or_an_argument_that_is_wrong_is_refused(function: str, args: dict[str, Any], message: str) -> None:
    assert message in refusal(function, **args)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("TABLE = {'a': 1}\n\nWEIGHT = TABLE['b']\n", ("KeyError: 'b'", "mine.py:3")),
        ("x = 1\ndef reward(prompt, response)\n    return 1\n", ("SyntaxError", "line 2")),
        ("import sys\nsys.exit(4)\n", ("raised SystemExit: 4",)),
        ("import os\nos._exit(4)\n", ("exited with code 4",)),
        ("import time\ntime.sleep(600)\n", ("mine.py:2",)),
    ],
)
def test_an_import_that_fails_ends_or_hangs_is_named(code: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    message = refusal("mine.py:reward", folder=tmp_path, timeout_s=1.0 if "sleep" in code else 60.0)
    assert all(part in message for part in expected)


def test_a_file_named_like_a_module_does_not_replace_it(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("import json\n\ndef reward(prompt, response):\n    return json.loads(response)\n")
    assert load("json.py:reward", folder=tmp_path).function == "json.py:reward"


def test_columns_of_the_data_are_checked() -> None:
    assert load("overlong", buffer=5).signature.required == ("limit",)  # args may leave columns open
    reward = load("last_number")
    check_columns(reward, ["answer"], key="rewards.r", data="train.jsonl")
    with pytest.raises(UserError, match=r"needs the column `answer`, and train\.jsonl has text"):
        check_columns(reward, ["text"], key="rewards.r", data="train.jsonl")


def test_loading_leaves_user_code_and_torch_out_of_the_caller() -> None:
    code = (
        "import json, sys; from pathlib import Path; from rlhf.rewards.loading import load_reward\n"
        f"load_reward('simple.py:length', args={{}}, folders=[Path({str(FILES)!r})], key='k')\n"
        "print(json.dumps([n for n in ('torch', 'neighbour', 'transformers') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []
