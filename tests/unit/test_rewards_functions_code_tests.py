"""The reward `code_tests` finds the program, reads every form of tests, and resists cheating."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.rewards.functions.code_tests import (
    Cases,
    CodeTests,
    last_code_block,
    read_test_code,
    read_tests,
    same_output,
    same_value,
)
from rlhf.rewards.loading import load_reward

ADD = "def add(a, b):\n    return a + b"
SUM_SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
PRINTED = [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4", "output": "7"}]


GUARD = 'if __name__ == "__main__":\n    '


def block(program: str) -> str:
    return f"It is:\n```python\n{program}\n```\nDone."


@pytest.fixture(scope="module")
def share() -> CodeTests:
    return CodeTests(score="share", test_s=3.0, limit_s=6.0)


def test_the_last_block_of_python_is_the_program() -> None:
    for response, program in {
        "```python\na\n```\n```py\nb\n```\n```\noutput\n```": "b\n",
        "```\na\n```\ntext\n  ```\n  b\n  ```": "  b\n",
        "```Python title\na\n```": "a\n",
        "```python\na\n```\n```python\ncut off": "a\n",
        "```python\ncut\n```python\na\n```\nend": "a\n",
        "```python\n```": "",
        "no block": None,
        "``` a ```": None,
    }.items():
        assert last_code_block(response) == program


METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
CALLS = {"fn_name": "add", "inputs": [[1, 2], [3, 4], "1\n1", [[1], [2]]], "outputs": [3, [7], "2", [[1, 3]]]}
VALUES = "def f(n):\n    return [(1, 2), {1: None}, {1, 2}, 'a', f][n]"
AS_JSON = {"fn_name": "f", "inputs": [[0], [1], [2], [3], [4]], "outputs": [[1, 2], {"1": None}, [1, 2], "a", "f"]}
MAIN = ADD + "\nif __name__ == '__main__':\n    print(add(int(input()), 1))"
ASSERTIONS = ["assert add(1, 2) == 3", "import math\nassert add(math.pi, 0) > 3", "assert add(0, 0) == 1"]
TEST_FUNCTIONS = (
    "from solution import add\n\ndef test_right():\n    assert add(1, 2) == 3\n    return 1\n\n"
    "def test_wrong():\n    assert add(1, 2) == 4\n\ndef helper():\n    raise ValueError\n"
)
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3"
STATEMENTS = "for i in range(3):\n    assert add(i, 1) == i + 1"
GUARDED = f"import sys\nsys.setrecursionlimit(999)\ndef check(f):\n    assert f(1, 2) == 3\n{GUARD}check(add)"


@pytest.mark.parametrize(
    ("program", "columns", "expected"),
    [
        (SUM_SCRIPT, {"tests": PRINTED}, 1.0),
        (SUM_SCRIPT, {"tests": json.dumps(PRINTED)}, 1.0),
        ("print(3)", {"tests": PRINTED}, 0.5),
        ("print(3)", {"tests": json.dumps(PRINTED)}, 0.5),
        ("print(3)\nexit(1)", {"tests": PRINTED}, 0.0),
        ("print(", {"tests": PRINTED}, 0.0),
        ("", {"tests": PRINTED}, 0.0),
        (SUM_SCRIPT, {"tests": {"inputs": [["1 2"], "3 4\n"], "outputs": ["3", ["7", ""]]}}, 1.0),  # lines
        (ADD, {"tests": CALLS}, 0.75),  # the last call expects [1, 2]
        (METHOD, {"tests": CALLS}, 0.75),
        (VALUES, {"tests": AS_JSON}, 0.6),  # a set and a function are no JSON
        (MAIN, {"tests": ["assert add(1, 2) == 3"]}, 1.0),  # the main block does not run
        (ADD, {"tests": ASSERTIONS}, 2 / 3),
        (ADD, {"test_code": TEST_FUNCTIONS}, 0.5),
        ("def test_wrong(): pass", {"test_code": TEST_FUNCTIONS}, 0.0),
        (ADD, {"test_code": CHECK, "entry_point": "add"}, 1.0),
        (ADD, {"test_code": CHECK, "entry_point": "other"}, 0.0),
        (ADD, {"test_code": STATEMENTS}, 1.0),
        (ADD, {"test_code": GUARDED}, 1.0),  # statements of a main guard are run
        ("def add(a, b):\n    return a", {"test_code": GUARDED}, 0.0),
    ],
)
def test_the_score_is_the_share_of_passed_tests(
    share: CodeTests, program: str, columns: dict[str, Any], expected: float
) -> None:
    assert share("p", block(program), **columns) == pytest.approx(expected)


def test_all_or_nothing_and_the_whole_response() -> None:
    all_tests, whole = CodeTests(test_s=3.0, limit_s=6.0), CodeTests(extract="whole")
    for program, expected in ((block(SUM_SCRIPT), 1.0), (block("print(3)"), 0.0), ("no program", 0.0)):
        assert all_tests("p", program, tests=PRINTED) == expected
    assert whole("p", SUM_SCRIPT, tests=PRINTED) == 1.0
    assert whole("p", block(SUM_SCRIPT), tests=PRINTED) == 0.0


CHEATS = (
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "import builtins\nbuiltins.exec = builtins.eval = lambda *_: None",
    "import os\nwrite = os.write\nos.write = lambda fd, data: write(fd, data.replace(b'null', b'true'))",
    "import json\njson.dumps = lambda _: 'true'",
    "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'true\\n' * 9)\n    except OSError: pass",
    "import sys\nsys.settrace(lambda *_: None)\nAssertionError = ValueError",
    # a value that equals everything is only text here
    "class Any(int):\n def __eq__(self, other): return True\nclass Solution:\n def add(self, a, b): return Any(0)",
)


@pytest.mark.parametrize("program", CHEATS)
def test_leaving_or_meddling_passes_nothing(share: CodeTests, program: str) -> None:
    assert share("p", block(program), tests=["assert add(1, 2) == 3", "assert False"]) == 0.0
    assert share("p", block(program), test_code="assert add(1, 2) == 3") == 0.0
    assert share("p", block(program), tests={"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}) == 0.0


def test_a_hang_counts_as_wrong_within_the_limit() -> None:
    bounded = CodeTests(score="share", test_s=0.5, limit_s=1.0)
    tests = [{"input": str(i), "output": str(i)} for i in range(50)]
    assert bounded("p", block("n = input()\nwhile n != '0': pass\nprint(n)"), tests=tests) == 1 / 50
    hangs = "def add(a, b):\n    while a: pass\n    return b"
    assert bounded("p", block(hangs), tests=["assert add(0, 1)", "add(1, 1)"]) == 0.5


SAME = (("3\n", "3"), ("  3  \n\n", "3\n"), ("1.0 2", "1 2.00"), ("1e3", "1000"), ("nan", "nan"), ("", ""))
DIFFERENT = (("1 2", "12"), ("1\n2", "1 2"), ("Yes", "YES"), ("0.1", "0.2"), ("inf", "1"), ("", "1"))
UNALIKE = (*DIFFERENT, ("9" * 500, "9" * 499 + "8"), ("1 2\n3", "1\n2 3"))


def test_same_output() -> None:
    assert [pair for pair in SAME if not same_output(*pair)] == []
    assert [pair for pair in UNALIKE if same_output(*pair)] == []
    assert not same_output("0.3333333", "0.3333334")
    assert same_output("x 0.3333333", "x 0.3333334", tolerance=1e-6)
    assert same_value([{"a": 0.1 + 0.2}], [{"a": 0.3}], tolerance=1e-9)
    assert not same_value([{"a": 0.1 + 0.2}], [{"a": 0.3}])
    assert not same_value(10**400, 1.0, tolerance=1e-9)
    assert not same_value([1], [1, 2])
    assert not same_value("1", 1, tolerance=1e-6)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("nonsense", "not JSON"),
        (5, "it must be a list of objects"),
        ([], "is empty, so every program would pass"),
        ([{"input": "1"}], "it must be a list of objects"),
        ([{"input": 1, "output": "1"}], "must be text"),
        ({"inputs": [], "outputs": []}, "is empty, so every program would pass"),
        ({"inputs": ["1"], "outputs": []}, "shorter"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "lines of JSON"),
    ],
)
def test_tests_that_cannot_be_read_are_errors(tests: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "is not Python"),
        ("import math\nX = 1\ndef check(candidate):\n    assert candidate(1)", "only has definitions"),
        ('"""Tests."""\nclass TestAdd:\n    def test_a(self):\n        assert 1', "only has definitions"),
        (
            f"import unittest\nclass T(unittest.TestCase):\n    def test_a(self): pass\n{GUARD}unittest.main()",
            "class T,",
        ),
        (f"def check(candidate):\n    assert candidate(1)\n{GUARD}pass", "only has definitions"),
        (f"import pytest\nclass TestAdd:\n    def test_a(self): pass\n{GUARD}pytest.main()", "only has definitions"),
    ],
)
def test_test_code_that_tests_nothing_is_an_error(code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_test_code(code, None)


def test_tests_are_read() -> None:
    lines = read_tests({"fn_name": "f", "inputs": ['"a\u2028b\x85"\r\n\n2\n'], "outputs": ["3"]})
    assert lines == Cases(function="f", returned=((["a\u2028b\x85", 2], 3),))
    assert read_test_code("assert f()", None) == Cases(statements=("assert f()",))
    assert read_test_code("def test_a(): pass\nX = 1", None).test_functions == ("test_a",)
    assert read_test_code(f"def test_a(): pass\n{GUARD}test_a()", None).test_functions == ("test_a",)
    run = "import unittest\nclass T(unittest.TestCase): pass\nassert unittest.TextTestRunner().run(T()).wasSuccessful()"
    assert read_test_code(run, None).statements == (run,)


def test_a_row_needs_tests_and_their_packages(share: CodeTests) -> None:
    for columns in ({}, {"tests": PRINTED, "test_code": "assert 1"}):
        with pytest.raises(ValueError, match="exactly one of the columns `tests` and `test_code`"):
            share("p", block(ADD), **columns)
    with pytest.raises(ValueError, match=r"import no_such_package, which .* lacks.*args\.python"):
        share("p", block(ADD), tests=["import no_such_package.part as n\nassert add(1, 2) == 3"])


WRONG = {"score": "some", "extract": "first", "test_s": 9.0, "limit_s": 0.0, "memory_mib": 1, "tolerance": -1}


def test_arguments_are_checked_and_a_machine_without_a_sandbox_is_refused_before_a_run_starts() -> None:
    for name, value in WRONG.items():
        with pytest.raises(ValueError, match=name):
            CodeTests(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^rewards\.x: .*no sandbox .*apt-get install bubblewrap"):
        load_reward("code_tests", args={"python": "/nowhere/python"}, folders=[], key="rewards.x")
