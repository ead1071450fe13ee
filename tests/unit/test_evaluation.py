"""Estimates beside a count of all choices, metrics of a set by hand, forms of results, and which responses pass."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from rlhf.errors import UserError
from rlhf.evaluation.comparison import before_after
from rlhf.evaluation.passing import PassRule, judges
from rlhf.evaluation.results import (
    Evaluation,
    ExampleResult,
    Marking,
    PromptResult,
    SetReport,
    example_metrics,
    prompt_metrics,
    prompt_reports,
    prompt_rows,
)
from rlhf.evaluation.sources import MOST_SOURCES, source_names
from rlhf.evaluation.statistics import (
    Estimate,
    maj_at_k,
    mean_estimate,
    pass_at_k,
    powers_of_two,
    ratio_estimate,
    win_chance,
)
from rlhf.evaluation.voting import AnswerForm, answer_form, answer_of
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.records.texts import transcripts
from rlhf.tracking.metrics.declarations import declared
from rlhf.tracking.run_folder.folder import evaluation_path
from rlhf.types import Prompt, Rollouts


def test_pass_and_maj_at_k_are_means_over_all_choices() -> None:
    draw = random.Random(0)
    for _ in range(60):
        n = draw.randint(1, 7)
        answers = [draw.choice(["a", "b", "c", None]) for _ in range(n)]
        passed = [draw.random() < 0.5 for _ in range(n)]
        passes = {a: [p for b, p in zip(answers, passed, strict=True) if a == b] for a in answers if a is not None}
        value = {answer: np.mean(shares) for answer, shares in passes.items()}
        for k in range(1, n + 1):
            choices = list(itertools.combinations(range(n), k))
            won = 0.0
            for choice in choices:
                votes = Counter(answers[i] for i in choice if answers[i] is not None)
                best = [a for a, count in votes.items() if count == max(votes.values())]
                won += sum(value[a] for a in best) / len(best) if best else 0.0
            assert maj_at_k(answers, passed, k=k) == pytest.approx(won / len(choices))
            some = np.mean([any(passed[i] for i in choice) for choice in choices])
            assert pass_at_k(passed, k=k) == pytest.approx(some)


def test_many_samples_stay_finite_and_k_is_at_most_the_samples() -> None:
    """C(2000, 1000) is beyond a float."""
    assert pass_at_k([True] + [False] * 1999, k=1000) == pytest.approx(0.5)
    assert maj_at_k(["a"] * 40 + ["b"] * 24, [True] * 40 + [False] * 24, k=1) == pytest.approx(40 / 64)
    for k in (0, 3):
        with pytest.raises(ValueError, match="expected 1 to the number of samples, 2"):
            pass_at_k([True, False], k=k)
        with pytest.raises(ValueError, match="expected 1 to the number of samples, 2"):
            maj_at_k(["a", "b"], [True, False], k=k)


def test_win_chance_by_hand() -> None:
    """(1, 0) against (0, 0.5): 1 > 0, 1 > 0.5, 0 = 0 a half, 0 < 0.5: 2.5 of 4."""
    assert win_chance([1.0, 0.0], [0.0, 0.5]) == pytest.approx(0.625)
    assert win_chance([1.0], [1.0]) == 0.5
    with pytest.raises(ValueError, match="both sides"):
        win_chance([], [1.0])


def test_estimates_by_hand() -> None:
    """(3 + 1) / (2 + 6); resampled rows give 3/2, 1/6 or 4/8; the outer two, a quarter each, are the ends of 95 %."""
    found = ratio_estimate([3.0, 1.0], [2.0, 6.0], seed=0)
    assert (found.value, found.low, found.high) == (pytest.approx(0.5), pytest.approx(1 / 6), pytest.approx(1.5))
    assert mean_estimate([1.0], seed=0) == Estimate(value=1.0, low=None, high=None)
    assert mean_estimate([2.0] * 9, seed=0) == Estimate(value=2.0, low=2.0, high=2.0)
    with pytest.raises(ValueError, match="positive denominators"):
        ratio_estimate([1.0], [0.0], seed=0)


def test_the_interval_is_that_of_a_large_sample() -> None:
    """Mean of 400 with standard deviation 1: 1.96 / 20 on either side."""
    values = np.random.default_rng(3).standard_normal(400)
    values = (values - values.mean()) / values.std()
    found = mean_estimate(values.tolist(), seed=1)
    assert found.low == pytest.approx(-0.098, abs=0.008)
    assert found.high == pytest.approx(0.098, abs=0.008)
    assert found == mean_estimate(values.tolist(), seed=1)
    assert found != mean_estimate(values.tolist(), seed=2)

    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]


def result(prompt_id: int, responses: tuple[str, ...], scores: tuple[float, ...]) -> PromptResult:
    return PromptResult(
        prompt_id=prompt_id,
        prompt=f"p{prompt_id}",
        responses=responses,
        scores=scores,
        by_name={"right": scores},
        answers=tuple(answer_of(text, "last_number") for text in responses),
        truncated=(False,) * (len(scores) - 1) + (True,),
        response_tokens=tuple(range(1, len(scores) + 1)),
    )


RESULTS = [result(0, ("7", "so 7.0", "8", "9"), (1.0, 1.0, 0.0, 0.0)), result(2, ("1",) * 4, (0.0,) * 4)]
MARKING = Marking(ks=(1, 2), passing=PassRule(judges={"right": None}, pass_score=None), answers="last_number")


def test_prompt_metrics_by_hand() -> None:
    """pass@2 of prompt 0: 1 - C(2,2)/C(4,2) = 5/6. maj@2: 7 7 8 9 as in the statistics' test, 1/2. Prompt 2: 0."""
    found = prompt_metrics(RESULTS, None, MARKING, seed=0)
    assert {name: pytest.approx(one.value) for name, one in found.items()} == {
        "score": 0.25,
        "rewards/right": 0.25,
        "pass@1": 0.25,
        "pass@2": 5 / 12,
        "maj@2": 0.25,
        "truncated": 0.25,
        "response_tokens": 2.5,
    }
    assert (found["score"].low, found["score"].high) == (0.0, 0.5)
    # Compared on the prompts that both answered, prompt 0: 1 1 0 0 against 1 0, of 8 pairs 2 wins and 4 ties.
    theirs = [result(0, ("7", "8"), (1.0, 0.0)), result(5, ("7", "8"), (1.0, 0.0))]
    found = prompt_metrics(RESULTS, theirs, MARKING, seed=0)
    assert found["win_rate"] == Estimate(value=0.5, low=None, high=None)


def test_marks_and_answers_decide_on_passes_and_votes() -> None:
    silent = [replace(result, answers=None) for result in RESULTS]
    for results, marking, names in (
        (RESULTS, Marking(ks=(1,), passing=None, answers="whole"), []),  # a score that is neither right nor wrong
        (silent, MARKING, ["pass@1", "pass@2"]),  # responses without answers do not vote
    ):
        assert [name for name in prompt_metrics(results, None, marking, seed=0) if "@" in name] == names


def test_a_set_and_each_of_its_sources_has_a_report() -> None:
    """Prompt 1 failed. The source of prompt 1 has no results, and the whole set counts the failure."""
    sources = {0: "easy", 1: "odd", 2: "hard"}
    reports = prompt_reports("heldout", RESULTS, MARKING, sources=sources, prompt_ids=[0, 1, 2], seed=0)
    assert [(report.name, report.num_rows, report.num_failed, report.metrics["score"].value) for report in reports] == [
        ("heldout", 2, 1, 0.25),
        ("heldout.easy", 1, 0, 0.5),
        ("heldout.hard", 1, 0, 0.0),
    ]


def test_example_metrics_by_hand() -> None:
    """Three tokens have log-probability -1.5, and the fourth token has -0.5: loss 2/4."""
    sums = ((3, -1.5, 2), (1, -0.5, 1))
    results = [ExampleResult(num_tokens=tokens, logprob=logprob, num_top1=top) for tokens, logprob, top in sums]
    values = {name: estimate.value for name, estimate in example_metrics(results, seed=0).items()}
    assert values == {"loss": 0.5, "perplexity": pytest.approx(math.exp(0.5)), "token_accuracy": 0.75}


@pytest.mark.parametrize(
    ("response", "form", "answer"),
    [
        ("it is 1,234.0.", "last_number", "1234"),
        ("from 3 to 2.50", "last_number", "2.5"),
        ("100", "last_number", "100"),
        ("it is .50", "last_number", "0.5"),
        ("1.5e3", "last_number", "1500"),
        ("none", "last_number", None),
        ("it is " + "1234567890" * 4, "last_number", "1234567890" * 4),
        ("0." + "1234567890" * 3 + "12", "last_number", "0." + "1234567890" * 3 + "12"),
        ("so 0.0000001", "last_number", "0.0000001"),
        ("<answer>a</answer> <answer> b </answer>", "answer_tag", "b"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "boxed", None),
        ("boxed", "boxed", None),
        ("  yes\n", "whole", "yes"),
        ("  ", "whole", None),
    ],
)
def test_answers(response: str, form: AnswerForm, answer: str | None) -> None:
    assert answer_of(response, form) == answer


@pytest.mark.parametrize(
    "equal",
    [
        ["7", "007", "7.0", "7.000"],
        ["1234.5", "1,234.50", "01234.500"],
        ["0", "-0", "-0.00", "0.0"],
        ["9" * 40, "9" * 40 + ".0", "0" + "9" * 40],
    ],
)
def test_equal_numbers_vote_together(equal: list[str]) -> None:
    assert {answer_of(text, "last_number") for text in equal} == {equal[0]}


def test_rewards_know_their_form_of_answer() -> None:
    assert answer_form("last_number", {}) == "last_number"
    assert answer_form("reasoning_gym", {"extract": "whole"}) == "whole"
    assert answer_form("contains", {}) is None


def report(name: str, num_rows: int, metrics: Mapping[str, Estimate]) -> Evaluation:
    sets = (SetReport(name=name, num_rows=num_rows, num_failed=0, metrics=metrics),)
    return Evaluation(model="m", against=None, seed=0, samples=4, passing=str(MARKING.passing), sets=sets)


def rendered(table: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return " ".join(text.getvalue().split())


def test_rows_and_report_are_plain_json() -> None:
    rows = prompt_rows("m", "heldout", RESULTS, MARKING)
    assert [(row["prompt_id"], row["sample"], row["answer"], row["passed"]) for row in rows[:3]] == [
        (0, 0, "7", True),
        (0, 1, "7", True),
        (0, 2, "8", False),
    ]
    whole = report("heldout", 2, prompt_metrics(RESULTS, None, MARKING, seed=0))
    written = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert written["sets"]["heldout"]["metrics"]["score"]["value"] == 0.25
    table = rendered(whole.to_table())
    for text in ("heldout (2)", "0.4167", "A response passes with a value of at least 1 of right."):
        assert text in table


def test_a_run_logs_rewards_by_name_alone() -> None:
    shares = {"rewards/correct": 0.25, "pass@8": 0.75}
    metrics = {name: Estimate(value=value, low=None, high=None) for name, value in shares.items()}
    logged = report("hard", 2, metrics | {"score": Estimate(value=0.5, low=0.0, high=1.0)}).to_metrics()
    values = {"score": 0.5, "score_low": 0.0, "score_high": 1.0, "correct": 0.25, "pass@8": 0.75}
    assert logged == {f"eval/hard/{name}": value for name, value in values.items()}
    assert all(declared(name).name == "eval/<set>/<metric>" for name in logged)


def test_a_reward_is_averaged_over_the_prompts_that_it_applies_to() -> None:
    plain = result(3, ("x",), (4.0,))
    other = replace(result(4, ("y",), (2.0,)), by_name={"style": (2.0,)}, answers=None, truncated=(False,))
    found = prompt_metrics([plain, other], None, Marking(ks=(1,), passing=None, answers=None), seed=0)
    values = [found[name].value for name in ("score", "rewards/right", "rewards/style")]
    assert values == [3.0, 4.0, 2.0]  # (4 + 2) / 2
    lines = prompt_rows("m", "s", [plain, other], MARKING)
    assert [line["scores"] for line in lines] == [{"right": 4.0}, {"style": 2.0}]


def test_a_run_shows_its_first_and_last_evaluation(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    assert before_after(tmp_path) is None
    for step, score in ((0, 0.25), (10, 0.5), (20, 0.75)):
        estimate = Estimate(value=score, low=score - 0.1, high=score + 0.1)
        text = json.dumps(report("heldout", 2, {"score": estimate}).to_json())
        evaluation_path(tmp_path, step).write_text(text, encoding="utf-8")
    table = rendered(before_after(tmp_path))
    for shown in ("0.25 (0.15 to 0.35)", "0.75 (0.65 to 0.85)", "step 20"):
        assert shown in table
    assert "0.5 (" not in table


def test_conversations_are_written_turn_by_turn_and_token_by_token() -> None:
    """The policy has two turns, `4` and `6`, around a turn of the environment. Only the policy's turns are sampled."""
    tokenizer = byte_tokenizer()
    prompt, told = list(b"1-7?"), list(b" up ")
    mask = [False] * 4 + [True] + [False] * 4 + [True]
    rollouts = Rollouts(
        sequence_ids=torch.tensor([0]),
        lengths=torch.tensor([10]),
        token_ids=torch.tensor([*prompt, *b"4", *told, *b"6"]),
        response_mask=torch.tensor(mask),
        rollout_logprobs=torch.tensor([0.0] * 4 + [-0.5] + [0.0] * 4 + [-0.25]),
        versions=torch.tensor([0 if sampled else -1 for sampled in mask]),
    )
    (conversation,) = transcripts(rollouts, [0], tokenizer, turn_end=None)
    assert conversation.response == "4\n6"
    (row,) = prompt_rows("m", "s", [replace(result(0, ("4\n6",), (1.0,)), transcripts=(conversation,))], MARKING)
    assert [(turn["role"], turn["text"], turn["sampled"]) for turn in row["turns"]] == [
        ("prompt", "1-7?", False),
        ("policy", "4", True),
        ("environment", " up ", False),
        ("policy", "6", True),
    ]
    tokens = row["tokens"]
    assert (tokens["texts"], tokens["sampled"]) == (tuple("4 up 6"), (True, False, False, False, False, True))
    assert tokens["rollout_logprobs"] == (-0.5, None, None, None, None, -0.25)
    assert "turns" not in prompt_rows("m", "s", RESULTS, MARKING)[0]


RIGHT_OR_CODE = PassRule(judges={"right": None, "code": "runs"}, pass_score=None)


def test_a_penalty_below_a_right_answer_does_not_fail_it() -> None:
    # right 1 and a length penalty of -0.4 * 0.1: the score is 0.96, and the response passes.
    names = judges([("brief", "length_penalty", 0.1), ("right", "rewards.py:right", 1.0)])
    rule = PassRule(judges=dict.fromkeys(names), pass_score=None)
    values = {"right": (1.0, 0.0, 0.5), "brief": (-0.4, 0.0, -1.0)}
    assert rule.passed((0.96, 0.0, 0.4), values) == [True, False, False]
    assert str(rule) == "a value of at least 1 of right"


@pytest.mark.parametrize(
    ("rewards", "names"),
    [
        ([("form", "format_regex", 0.2), ("right", "math_answer", 1.0)], ["right", "form"]),
        ([("right", "math_answer", 0.5), ("form", "format_regex", 0.5)], ["right", "form"]),  # as written
        ([("taste", None, 1.0), ("brief", "overlong", 1.0), ("right", "math_answer", 0.0)], []),
        ([("wrong", "rewards.py:wrong", -1.0), ("shaped", "cosine_length", 1.0)], []),
    ],
)
def test_the_function_of_the_largest_weight_judges(
    rewards: list[tuple[str, str | None, float]], names: list[str]
) -> None:
    assert judges(rewards) == names


def test_rows_of_several_kinds_are_judged_by_the_function_that_scores_them() -> None:
    assert RIGHT_OR_CODE.passed((2.0, 0.0), {"right": (1.0, None)}) == [True, False]
    gated = {"code": (1.0, 1.0, 1.0), "runs": (1.0, 0.0, None)}
    assert RIGHT_OR_CODE.passed((1.0, 0.0, 0.0), gated) == [True, False, False]
    assert str(RIGHT_OR_CODE) == "a value of at least 1 of right, or of code where right has no opinion"
    threshold = PassRule(judges={"right": None}, pass_score=0.9)
    assert threshold.passed((0.96, 0.5), {"right": (0.0, 1.0)}) == [True, False]
    assert str(threshold) == "a score of at least 0.9"


def prompts(*values: Any) -> list[Prompt]:
    return [Prompt(prompt_id=i, token_ids=(1,), text="", columns={"task": value}) for i, value in enumerate(values)]


def names(*values: Any) -> dict[int, str]:
    return source_names(prompts(*values), "task", key="eval.by", data="data.eval.heldout")


def test_values_become_names_that_a_metric_can_hold() -> None:
    assert names("gym/gcd", "a b", 3, "gym/gcd") == {0: "gym_gcd", 1: "a_b", 2: "3", 3: "gym_gcd"}


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        (("gcd", None), "task", "eval.by: row 1 of data.eval.heldout needs a string or a number"),
        (("gcd", ""), "task", "eval.by: row 1 of data.eval.heldout needs a string or a number"),
        (("gcd", ["gcd"]), "task", "eval.by: row 1 of data.eval.heldout needs a string or a number"),
        (("gcd",), "source", "column `source`; it has task"),
        (("a/b", "a b"), "task", "'a/b' and 'a b' .* one name, `a_b`"),
        (tuple(range(MOST_SOURCES + 1)), "task", f"{MOST_SOURCES + 1} different values"),
    ],
)
def test_a_column_that_names_no_sources_is_refused(values: tuple[Any, ...], column: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_names(prompts(*values), column, key="eval.by", data="data.eval.heldout")
