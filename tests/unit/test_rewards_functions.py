"""The built-in rewards score alone, and the slow built-in rewards, also on every gym task, in a pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import jsonschema
import pytest
import reasoning_gym
import referencing.exceptions

from rlhf.data.tasks import TaskSource, make_rows
from rlhf.extensions import CodeSource
from rlhf.rewards.functions.length_shaping import cosine, length_penalty, overlong, repetition_penalty, target_length
from rlhf.rewards.functions.matching import (
    EXTRACTORS,
    FormatRegex,
    JsonSchema,
    ReasoningGym,
    contains,
    exact_match,
    last_number,
    multiple_choice,
    regex_match,
)
from rlhf.rewards.functions.table import BUILT_INS, CosineLength, own_limit_s
from rlhf.rewards.loading import load_reward
from rlhf.rewards.processes.pool import RewardPool

RIGHT_NUMBERS = (
    ("11,19,23", "11,19,23"), ("11,19,23", 23), ("so it is 1,234.", "1234"), ("#### 42", "work ... #### 42"),
    ("42.0", 42), ("0.1", 0.1), ("10-3", 3), ("x = -3", -3), ("x = \N{MINUS SIGN}3", -3), ("The answer is .5", 0.5),
    ("-.5", -0.5), ("1.5e3", 1500), ("about 1e-3.", 0.001), ("2E+2", "200"), ("1,234.5", 1234.5),
    ("1,234.5e1", 12345), ("version 1.2.3", 3), ("see no.5", 5), ("3e5f", 5),  # no exponent: a letter follows
)  # fmt: skip
WRONG_NUMBERS = (
    ("11,19,24", 23), ("23, then 11", 23), ("3", -3), ("none", 3), ("", 0), ("The answer is .5", 5),
    ("it is -.5.", 0.5), ("1.5e3", 3), ("1e" + "9" * 5000, 1), (str(2**60 + 1), 2**60),  # exact beyond floats
)  # fmt: skip


def test_last_number() -> None:
    assert [pair for pair in RIGHT_NUMBERS if last_number("p", *pair) != 1.0] == []
    assert [pair for pair in WRONG_NUMBERS if last_number("p", *pair) != 0.0] == []


def test_an_answer_that_cannot_be_read_is_an_error_and_not_a_wrong_response() -> None:
    with pytest.raises(ValueError, match="no number in the answer"):
        last_number("p", "3", "three")
    with pytest.raises(ValueError, match="empty"):
        contains("p", "anything", " ")
    for answer in ("Paris", 2, ""):
        with pytest.raises(ValueError, match="not the letter of a choice"):
            multiple_choice("p", "A", answer)


def test_string_rules() -> None:
    assert exact_match("p", " Paris\n", "Paris") == 1.0
    assert exact_match("p", "Paris.", "Paris") == 0.0
    assert contains("p", "It is Paris.", "Paris") == 1.0
    assert contains("p", "It is Rome.", "Paris") == 0.0
    tags = FormatRegex(pattern=r"<think>.+</think>\s*<answer>.+</answer>")
    assert tags("p", "<think>a\nb</think>\n<answer>3</answer>") == 1.0
    assert tags("p", "<think>a</think><answer>3</answer> and more") == 0.0


RIGHT_CHOICES = (
    ("The answer is C.", "C"), ("C", "(c)"), (" **(c)**. ", "C"), ("so \\boxed{B}", "B"), ("\\boxed{\\text{B}}", "B"),
    ("<answer> d </answer>", "D"), ("**Answer:** (D) because", "D"), ("The answer is (a), since B is wrong", "A"),
    ("First the answer is A. No, the answer is B.", "B"), ("The correct answer is option B", "B"),
)  # fmt: skip
WRONG_CHOICES = (
    ("The answer is C.", "D"),
    ("A dog", "A"),
    ("The answer is a dog", "A"),
    ("Answer: Both", "B"),
    ("", "A"),
)


def test_multiple_choice() -> None:
    assert [pair for pair in RIGHT_CHOICES if multiple_choice("p", *pair) != 1.0] == []
    assert [pair for pair in WRONG_CHOICES if multiple_choice("p", *pair) != 0.0] == []


def test_regex_match() -> None:
    pattern = r"SQL: (.*?);"
    assert regex_match("p", "SQL: select 1; SQL: select\n2;", pattern, "select\n2") == 1.0
    assert regex_match("p", "SQL: select 2; SQL: select 1;", pattern, "select 2") == 0.0
    assert regex_match("p", "none", pattern, "select 2") == 0.0
    assert regex_match("p", "it is 17 or 18", "[0-9]+", 18) == 1.0
    assert regex_match("p", "x", "(a)|x", "x") == 0.0  # the match does not use the group
    with pytest.raises(ValueError, match="limit_s must be positive, got 0"):
        regex_match("p", "x", "x", "x", limit_s=0)


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


def test_json_schema() -> None:
    fixed = JsonSchema(schema=SCHEMA)
    assert fixed("p", '{"age": 3}') == 1.0
    assert fixed("p", 'Here:\n```json\n{"age": 3}\n```') == 1.0
    assert fixed("p", 'By:\n```python\nage = 3\n```\nthis is\n```json\n{"age": 3}\n```') == 1.0  # the last block
    assert fixed("p", '{"age": -1}') == 0.0
    assert fixed("p", '{"age": 3} and more') == 0.0
    assert fixed("p", "[" * 100_000) == 0.0
    assert JsonSchema()("p", '{"age": 3}', schema=SCHEMA) == 1.0
    assert JsonSchema()("p", "[]", schema='{"type": "object"}') == 0.0
    tenths = JsonSchema(schema={"multipleOf": 0.1, "properties": {"age": {"type": "integer"}}})
    for text in ("9" * 5000, '{"age": ' + "9" * 5000 + "}", "1e999", "-1e999", "NaN", "[Infinity]"):
        assert tenths("p", text) == 0.0  # a number that cannot be read


def test_a_response_that_takes_longer_than_the_limit_is_wrong() -> None:
    unhashable = "[" + ",".join(f'{{"a": {i}}}' for i in range(100_000)) + "]"
    assert JsonSchema(schema={"uniqueItems": True}, limit_s=0.2)("p", unhashable) == 0.0
    assert JsonSchema(schema={"uniqueItems": True})("p", '[{"a": 1}, {"a": 2}]') == 1.0
    assert FormatRegex(pattern="(a|a)+b", limit_s=0.2)("p", "a" * 100) == 0.0
    assert FormatRegex(pattern="(a|a)+b", limit_s=0.2)("p", "aaab") == 1.0
    assert regex_match("p", "a" * 100, "(a|a)+b", "a", limit_s=0.2) == 0.0


def test_json_schema_that_is_wrong_or_missing_is_an_error_and_nothing_is_fetched() -> None:
    with pytest.raises(ValueError, match=r"args\.schema, or a column"):
        JsonSchema()("p", "{}")
    with pytest.raises(jsonschema.SchemaError):
        JsonSchema(schema={"type": "no such type"})
    with pytest.raises(referencing.exceptions.Unresolvable):
        JsonSchema(schema={"$ref": "http://127.0.0.1:1/schema.json"})("p", "{}")


REPEATED = ("```python\n", "``` \n", "```" + " " * 60_000 + "`", "answer" + " " * 1000, "answer is ", "<answer>")


@pytest.mark.parametrize("piece", [*REPEATED, "</answer>", "\\boxed{", " ", "1,"])
def test_a_response_that_repeats_itself_is_read_in_no_time(piece: str) -> None:
    """Collapsed models write such responses, and a rule of quadratic time would look like a hang."""
    response = piece * (200_000 // len(piece))
    began = time.process_time()  # processor time of this process, independent of the machine's load
    assert multiple_choice("p", response, "A") == 0.0
    assert last_number("p", response, 7) == 0.0
    assert JsonSchema(schema=SCHEMA)("p", response) == 0.0
    for extract in EXTRACTORS.values():
        extract(response)
    assert time.process_time() - began < 3.0


def test_limits_of_their_own() -> None:
    assert list(BUILT_INS) == sorted(BUILT_INS)
    for name, limit_s in {"math_answer": 5.0, "code_tests": 3.0, "exact_match": None, "mine.py:reward": None}.items():
        assert own_limit_s(name, {"limit_s": 3} if name != "math_answer" else {}) == limit_s
    assert own_limit_s("cosine_length", {"verifier_args": {"limit_s": 2}}) == 2.0
    for args in ({"verifier": "last_number"}, {"verifier": ["math_answer"]}, {"verifier_args": None}):
        assert own_limit_s("cosine_length", args) is None


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    extracts: tuple[dict[str, str], ...] = ({}, {"extract": "answer_tag"}, {"extract": "whole"})
    gym = [CodeSource(path=None, name="reasoning_gym", args=args) for args in extracts]
    sources = [CodeSource(path=None, name="math_answer", args={"limit_s": 1.0}), *gym]
    with closing(RewardPool(sources, timeout_s=20.0)) as pool:
        yield pool


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("3/4", "so \\boxed{\\frac{3}{4}}", "\\boxed{\\frac{4}{3}}"),
        ("\\frac{3}{4}", "The answer is 0.75.", "The answer is 0.57."),
        ("x^2+1", "$1+x^2$", "$x^2$"),
        ("$(1,2)$", "\\boxed{(1,2)}", "\\boxed{(2,1)}"),
        ("42", "The answer is 42", "junk"),
        ("5\\sqrt{2}", "\\boxed{5\\sqrt{2}}", "\\boxed{5}"),
        ("2\\pi", "\\boxed{2\\pi}", "\\boxed{2}"),
        ("3x+2", "\\boxed{2 + 3x}", "\\boxed{3}"),
        ("3xy + 2", "\\boxed{2 + 3xy}", "\\boxed{2}"),
        ("x^2 + 1", "\\boxed{x^2+1}", "\\boxed{1}"),
        ("(3, 4)", "\\boxed{(3,4)}", "\\boxed{4}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", "\\boxed{3}"),
        ("4\\frac{1}{2}", "\\boxed{4.5}", "\\boxed{\\frac{1}{2}}"),
        ("1, 2 and 3", "\\boxed{1, 2, 3}", "\\boxed{3}"),
        ("5\\sqrt{2} \\text{ cm}", "\\boxed{5\\sqrt{2}}", "\\boxed{5}"),
        ("\\theta = 5\\pi", "\\boxed{5\\pi}", "\\boxed{5}"),
        ("5*sqrt(2)", "\\boxed{5\\sqrt{2}}", "\\boxed{5}"),
        ("sqrt(3)/2", "\\boxed{\\frac{\\sqrt{3}}{2}}", "\\boxed{2}"),
        ("5sqrt{2}", "\\boxed{5\\sqrt{2}}", "\\boxed{5}"),
        ("5\\sqrt{2}", "\\boxed{5sqrt{2}}", "\\boxed{5sqrt{3}}"),
        ("\\frac{sqrt{2}}{2}", "\\boxed{\\frac{1}{\\sqrt{2}}}", "\\boxed{\\frac{1}{2}}"),
        ("sqrt{\\frac{1}{4}}", "\\boxed{0.5}", "\\boxed{0.25}"),
        ("$sqrt[3]{8}$", "\\boxed{2}", "\\boxed{8}"),
        ("3*pi/4", "\\boxed{\\frac{3\\pi}{4}}", "\\boxed{\\frac{3}{4}}"),
        ("2pi", "\\boxed{2\\pi}", "\\boxed{2}"),
    ],
)
def test_math_answer(pool: RewardPool, answer: str, right: str, wrong: str) -> None:
    assert pool.score(0, "p", [right, wrong], {"answer": answer}).scores == (1.0, 0.0)


NUMBERS_IN_TEXT = {
    "1,234": "1234", "1 000 000": "1000000", "12 apples": "12", "Rs 500": "500", "is 5": "5", "5 miles": "5",
    "42 km/h": "42", "9.8 m/s^2": "9.8", "20 N": "20", "50%": "50\\%", "50\\%": "50\\%", "1/2": "0.5", "$5": "5",
    "€12": "12", "x = 5": "5", "2 + 2 = 4": "4", "(B) 12": "12", "3 * 4 = 12, so 12 #### 12": "12",
    "The answer is \\frac{1}{2}": "0.5", "(C)": "C", "no": "no", "plain words": "plain words",
}  # fmt: skip


@pytest.mark.parametrize("answer", NUMBERS_IN_TEXT)
def test_math_answer_reads_numbers_within_text(pool: RewardPool, answer: str) -> None:
    responses = [f"\\boxed{{{NUMBERS_IN_TEXT[answer]}}}", "\\boxed{77}"]
    assert pool.score(0, "p", responses, {"answer": answer}).scores == (1.0, 0.0)


def test_math_answer_bounds_hostile_responses(pool: RewardPool) -> None:
    hostile = ["$9^{9^{9^9}}$", "$100000000!$", "$\\binom{1000000}{500000}$"]
    outcome = pool.score(0, "p", [*hostile, "$12$"], {"answer": "12"})
    assert outcome.scores == (0.0, 0.0, 0.0, 1.0)  # the limit of the pool would be an error
    (failure,) = pool.score(0, "p", ["3"], {"answer": ""}).failures
    assert failure.kind == "raised"
    assert "finds no expression" in failure.message


ENTRY = {"answer": "12", "metadata": {"source_dataset": "gcd", "numbers": [24, 36]}}


def test_reasoning_gym_scores_the_extracted_answer(pool: RewardPool) -> None:
    assert pool.score(1, "p", ["24 and 36: it is 12.", "24", "no number"], ENTRY).scores == (1.0, 0.0, 0.0)
    assert pool.score(2, "p", ["<answer> 12 </answer>", "12"], ENTRY).scores == (1.0, 0.0)


def gym_entry(task: str, **args: object) -> dict[str, Any]:
    return dict(reasoning_gym.create_dataset(task, seed=3, size=1, **args)[0])


def gym_score(entry: dict[str, Any], response: str) -> float:
    return ReasoningGym(extract="whole")("p", response, **entry)


def test_gym_scorers_that_raise_or_can_be_fooled_give_0_unless_the_entry_is_wrong() -> None:
    entry = gym_entry("prime_factorization")
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym.get_score_answer_fn("prime_factorization")("junk", entry)
    assert gym_score(entry, "junk") == 0.0
    assert gym_score(entry, entry["answer"]) == 1.0
    with pytest.raises(ValueError, match="invalid literal"):
        gym_score(entry | {"answer": "wrong data"}, "junk")
    entry = gym_entry("complex_arithmetic")
    assert reasoning_gym.get_score_answer_fn("complex_arithmetic")("nan", entry) == 1.0
    assert [gym_score(entry, text) for text in ("nan", "NaN + 1i", entry["answer"])] == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="game_of_life_halting gives full marks to nonsense"):
        gym_score(gym_entry("game_of_life_halting"), "True")
    assert len(GYM_TASKS) + 1 == 106  # the number in the documentation


GYM_TASKS = sorted(set(reasoning_gym.factory.DATASETS) - {"composite"})
# Tasks with several right answers: such a task checks a response, and stores no answer.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(GYM_TASKS) - {"game_of_life_halting"}))
def test_every_gym_task_by_name(task: str, pool: RewardPool) -> None:
    """A reward process scores rows as in a run: the stored answer gets 1, nonsense gets less, and nothing fails."""
    shots = 1 if task in WITHOUT_ANSWER else 2
    rows = make_rows(TaskSource(task=f"reasoning_gym/{task}", split="train", size=2, args={"shots": shots}))
    nonsense = ["nonsense", "", "[]", "{}", "None", "nan", "1/0", "9" * 50, "a b\nc"]
    for row in rows:
        columns = {name: row[name] for name in ("answer", "metadata", "question")}
        responses = nonsense if task in WITHOUT_ANSWER else [*nonsense, str(row["answer"])]
        outcome = pool.score(3, "p", responses, columns)
        assert outcome.failures == ()
        assert all(score < 1.0 for score in outcome.scores[: len(nonsense)])
        assert task in WITHOUT_ANSWER or outcome.scores[-1] == 1.0


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


@pytest.mark.parametrize(
    ("reward", "args", "scores"),
    [
        (length_penalty, {"limit": 20}, {0: 0.0, 5: -0.25, 20: -1.0, 40: -1.0}),
        (target_length, {"target": 10}, {10: 0.0, 8: -0.2, 15: -0.5, 0: -1.0, 90: -1.0}),
        (overlong, {"limit": 100, "buffer": 20}, {0: 0.0, 80: 0.0, 85: -0.25, 99: -0.95, 100: -1.0, 300: -1.0}),
    ],
)
def test_lengths(reward: Callable[..., float], args: dict[str, float], scores: dict[int, float]) -> None:
    assert {count: reward("p", words(count), **args) for count in scores} == pytest.approx(scores)
    with pytest.raises(ValueError, match="must be positive"):
        reward("p", "a", **{name: 0 for name in args})
    with pytest.raises(ValueError, match="unit is 'tokens'"):
        reward("p", "a", **args, unit="tokens")
    assert length_penalty("p", " ab cd ", limit=10, unit="characters") == -0.5  # white space at the ends apart


@pytest.mark.parametrize(
    ("response", "ngram", "penalty"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b a b", 2, -0.6),  # ab ba ab ba ab: 2 of 5 are new
        ("A b a B", 2, -1 / 3),  # ab ba ab
        ("a a a a", 1, -0.75),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_penalty(response: str, ngram: int, penalty: float) -> None:
    assert repetition_penalty("p", response, ngram=ngram) == pytest.approx(penalty)
    assert repetition_penalty("p", response, ngram=ngram, max_penalty=0.5) == pytest.approx(penalty / 2)


def test_cosine_length() -> None:
    assert cosine(0, 10, 2.0, 1.0) == 2.0
    assert cosine(10, 10, 2.0, 1.0) == pytest.approx(1.0)
    assert cosine(10 / 3, 10, 2.0, 1.0) == pytest.approx(1.75)  # cos 60 degrees is a half: 1 + 0.5 * 1.5
    reward = CosineLength(limit=10, verifier="last_number")
    assert reward("p", "3", answer=3) == pytest.approx(cosine(1, 10, 2.0, 1.0))
    assert reward("p", "4", answer=3) == pytest.approx(cosine(1, 10, -10.0, 0.0))
    assert reward("p", "it is surely about 3", answer=3) == pytest.approx(1.5)
    assert reward("p", "it is surely about 4", answer=3) == pytest.approx(-5.0)
    assert reward("p", words(9) + " 3", answer=3) == -10.0


def test_cosine_length_reads_the_columns_of_its_verifier() -> None:
    args = {"limit": 10, "verifier": "regex_match", "verifier_args": {"pattern": "[0-9]+"}}
    loaded = load_reward("cosine_length", args=args, folders=[], key="k")
    assert (loaded.signature.required, loaded.signature.takes_all) == (("answer",), False)
    assert CosineLength(**args)("p", "it is 3", answer="3") > 1.0  # type: ignore[arg-type]
    for name in ("cosine_length", "none"):
        with pytest.raises(ValueError, match="another built-in"):
            CosineLength(limit=10, verifier=name)
