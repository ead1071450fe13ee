"""No response makes a built-in reward fail: each response gets a finite score within the reward's limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.extensions import CodeSource
from rlhf.rewards.functions.table import BUILT_INS
from rlhf.rewards.processes.pool import RewardPool

HOSTILE = {
    "many digits": "9" * 1_000_000,
    "many digits in an object": '{"a": ' + "9" * 5000 + "}",
    "many decimals": "1." + "0" * 100_000 + "1",
    "beyond floats": "1e999",
    "a long exponent": "1e" + "9" * 5000,
    "NaN": "NaN",
    "Infinity": "[-Infinity]",
    "deep arrays": "[" * 1000 + "]" * 1000,
    "deep arrays, not closed": "[" * 100_000,
    "deep objects": '{"a":' * 900 + "1" + "}" * 900,
    "unhashable items": "[" + ",".join(f'{{"a": {i}}}' for i in range(20_000)) + "]",
    "NUL": "```python\nprint(1)\0\n``` \\boxed{\0}",
    "surrogates": "```python\n\ud800\n``` answer is \udfff 5",
    "a fence that is none": "```" + " " * 60_000 + "`",
    "a language that is none": "```" + "a" * 60_000 + "`",
    "backquotes": "`" * 1_000_000,
    "open fences": "```\n" * 100_000,
    "parentheses": "(" * 1_000_000,
    "an expression of parentheses": "```python\n" + "(" * 100_000 + "\n```",
    "white space": " \t" * 500_000,
    "a word": "a" * 1_000_000,
    "open boxes": "\\boxed{" * 50_000,
    "fractions": "$" + "\\frac{1}{" * 300 + "1" + "}" * 300 + "$",
    "square roots": "\\boxed{" + "\\sqrt{" * 500 + "2" + "}" * 500 + "}",
    "a tower of powers": "$9^{9^{9^{9^9}}}$",
    "a factorial": "\\boxed{100000000!}",
    "a long sum": "$" + "1+" * 50_000 + "1$",
    "open answers": "<answer>" * 100_000,
    "answers": "answer " * 100_000,
    "commas": "1," * 300_000,
    "exponents": "1e" * 300_000,
    "points": "." * 1_000_000 + "5",
    "minus signs": "-" * 1_000_000,
    "other digits": "\u0661\u0662\u0663",
    "memory": "```python\nx = [0] * 10**10\n```",
    "empty": "",
}
REFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # args and columns
    "code_tests": ({"test_s": 1.0, "limit_s": 1.0}, {"tests": [{"input": "1", "output": "1"}]}),
    "contains": ({}, {"answer": "5"}),
    "cosine_length": ({"limit": 10**9, "verifier_args": {"limit_s": 0.2}}, {"answer": "5"}),
    "exact_match": ({}, {"answer": "5"}),
    "format_regex": ({"pattern": "(a|a)+b", "limit_s": 0.2}, {}),
    "json_schema": ({"schema": {"multipleOf": 0.1, "uniqueItems": True, "minimum": 1}, "limit_s": 0.2}, {}),
    "last_number": ({}, {"answer": "5"}),
    "length_penalty": ({"limit": 10}, {}),
    "math_answer": ({"limit_s": 0.2}, {"answer": "\\frac{1}{2}"}),
    "multiple_choice": ({}, {"answer": "C"}),
    "overlong": ({"limit": 10, "buffer": 3}, {}),
    "reasoning_gym": ({"limit_s": 0.2}, {"answer": "12", "metadata": {"source_dataset": "gcd", "numbers": [24, 36]}}),
    "regex_match": ({"limit_s": 0.2}, {"pattern": "answer is (.*)|(a|a)+b", "answer": "5"}),
    "repetition_penalty": ({}, {}),
    "target_length": ({"target": 10}, {}),
}


@pytest.fixture(scope="module")
def pool() -> Any:
    sources = [CodeSource(path=None, name=name, args=args) for name, (args, _) in REFERENCES.items()]
    with closing(RewardPool(sources, timeout_s=10.0)) as pool:
        yield pool


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_hostile_response_gets_a_finite_score(pool: RewardPool, name: str) -> None:
    assert REFERENCES.keys() == BUILT_INS.keys()
    columns = REFERENCES[name][1]
    outcome = pool.score(list(REFERENCES).index(name), "p", list(HOSTILE.values()), columns)
    assert [(list(HOSTILE)[failure.sample], failure.message) for failure in outcome.failures] == []
    assert all(math.isfinite(score) for score in outcome.scores)


FRAGMENTS = ["```", "```json\n", "\n", "answer is ", "\\boxed{", "}", "<answer>", "</answer>", "(", "A", "-", ".", ",",
             "1e9", "0", "\ud800", "\0", "{", '"', "[", ":", "true", " ", "$", "\\frac"]  # fmt: skip
QUICK = sorted(REFERENCES.keys() - {"code_tests", "math_answer", "cosine_length", "reasoning_gym"})


@pytest.mark.parametrize("name", QUICK)
def test_any_text_gets_a_finite_score(name: str) -> None:
    args, columns = REFERENCES[name]
    built_in: Callable[..., float] = BUILT_INS[name]
    call = built_in(**args) if isinstance(built_in, type) else built_in
    fixed = {} if isinstance(built_in, type) else args

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)))
    def scores(response: str) -> None:
        assert math.isfinite(call(prompt="p", response=response, **fixed, **columns))

    scores()
