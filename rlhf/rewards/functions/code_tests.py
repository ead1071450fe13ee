"""The reward `code_tests`: run the program in a response against the tests of the row.

Expected outputs and values never enter the sandbox: the sandbox returns the program's output or values for a comparison
here. Assertions run together with the program. An error in a row's tests raises, and an error in the program is a
failed test. Never execute output of the sandbox for a comparison.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeGuard, get_args

from rlhf.rewards.sandbox.run import START_LIMIT_S, Sandbox

Score = Literal["all", "share"]
Extract = Literal["code_block", "whole"]

_FENCE = re.compile(r"[ \t]*+```[ \t]*+(\w*+)[^`]*+")  # possessive, so a line without a fence takes linear time
_PYTHON = {"py", "python", "python3"}
_FUNCTION_OR_CLASS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_DEFINING = (*_FUNCTION_OR_CLASS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """The tests of a row. Exactly one of `printed`, `returned` and `statements` is filled."""

    printed: tuple[tuple[str, str], ...] = ()  # a script's standard input and output
    function: str | None = None  # the function's name, or the name of a method of `Solution`
    returned: tuple[tuple[list[Any], Any], ...] = ()  # the function's arguments and its value, as JSON values
    statements: tuple[str, ...] = ()
    test_functions: tuple[str, ...] = ()  # defined by the single statement; each function is a test


class CodeTests:
    """The share of tests passed by the program in the response, or 1.0 for all tests and else 0.0 (`score`).

    The program is the last fenced block of Python, or the last block if none is marked as Python (`extract`). `test_s`
    limits a process, and `limit_s` all processes of a response. Each test of standard output runs in a separate
    process; all other tests share a process.
    """

    def __init__(
        self,
        score: Score = "all",
        extract: Extract = "code_block",
        test_s: float = 4.0,
        limit_s: float = 8.0,
        memory_mib: int = 1024,
        tolerance: float = 0.0,
        python: str | None = None,
        unsafe: bool = False,
    ) -> None:
        for name, value, choices in (("score", score, Score), ("extract", extract, Extract)):
            if value not in get_args(choices):
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(choices))}")
        if test_s <= 0 or limit_s < test_s:
            raise ValueError(f"test_s ({test_s}) must be positive and at most limit_s ({limit_s})")
        if memory_mib < 64 or tolerance < 0:
            raise ValueError(f"memory_mib ({memory_mib}) must be 64 or more, tolerance ({tolerance}) not negative")
        self._score, self._extract = score, extract
        self._test_s, self._limit_s, self._tolerance = test_s, limit_s, tolerance
        self._sandbox = Sandbox(python=python, memory_mib=memory_mib, unsafe=unsafe)
        self._importable: dict[str, bool] = {}

    def __call__(
        self,
        prompt: str,
        response: str,
        tests: object = None,
        test_code: str | None = None,
        entry_point: str | None = None,
    ) -> float:
        if (tests is None) == (test_code is None):
            raise ValueError("a row needs exactly one of the columns `tests` and `test_code`")
        read = read_tests(tests) if test_code is None else read_test_code(test_code, entry_point)
        self._check_imports(read.statements)
        program = last_code_block(response) if self._extract == "code_block" else response
        if program is None:
            return 0.0
        results = self._results(program, read)
        count = len(read.printed or read.returned or read.test_functions or read.statements)
        return float(all(results)) if self._score == "all" else sum(results) / count

    def _results(self, program: str, tests: Cases) -> Iterator[bool]:
        """Yield whether each test passed, in order. Tests after an early end of the program are missing."""
        deadline = time.monotonic() + self._limit_s
        if not tests.printed:
            yield from self._in_one_process(program, tests)
            return
        for stdin, stdout in tests.printed:
            left = deadline - time.monotonic()
            if left <= 0:
                yield False
                return
            data = stdin.encode("utf-8", "surrogatepass")
            done = self._sandbox.run(program, wall_s=min(self._test_s, left), stdin=data)
            printed = done.stdout.decode("utf-8", "replace")
            yield done.code == 0 and same_output(printed, stdout, tolerance=self._tolerance)

    def _in_one_process(self, program: str, tests: Cases) -> Iterator[bool]:
        mark = secrets.token_hex(16)
        job = {
            "mark": mark,
            "function": tests.function,
            "calls": [arguments for arguments, _ in tests.returned],
            "statements": tests.statements,
            "test_functions": tests.test_functions,
        }
        count = len(tests.returned) or len(tests.statements) + len(tests.test_functions)
        answers = _parsed(self._sandbox.run(program, wall_s=self._test_s, tests=job).results, count)
        if tests.returned:
            for answer, (_, expected) in zip(answers, tests.returned, strict=True):
                yield isinstance(answer, dict) and self._is_expected(answer.get("value"), expected)
            return
        if tests.test_functions:
            defined, *answers = answers
            if defined != mark:  # otherwise the program could define functions of these names
                answers = [None] * len(answers)
        yield from (answer == mark for answer in answers)

    def _is_expected(self, value: object, expected: object) -> bool:
        """Compare a value with the expected value. Many data sets wrap the expected value in a list."""
        same = same_value(value, expected, tolerance=self._tolerance)
        return same or same_value([value], expected, tolerance=self._tolerance)

    def _check_imports(self, statements: Sequence[str]) -> None:
        """Raise ValueError if the tests import a missing package, since every program would fail."""
        for name in dict.fromkeys(name for code in statements for name in _imports(code)):
            if name not in self._importable:
                script = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"
                self._importable[name] = self._sandbox.run(script, wall_s=START_LIMIT_S).code == 0
            if not self._importable[name]:
                raise ValueError(
                    f"the tests import {name}, which {self._sandbox.python} lacks in the sandbox: name an interpreter "
                    "that has it with args.python"
                )


def last_code_block(response: str) -> str | None:
    """Return the last closed fenced block marked as Python, or else the last block, or None."""
    blocks = list(code_blocks(response))
    marked = [block for block in blocks if block[0].lower() in _PYTHON]
    return next((code for _, code in reversed(marked or blocks)), None)


def code_blocks(response: str) -> Iterator[tuple[str, str]]:
    """Yield language and content of each block. A fence with a language opens a block, even after an unclosed block."""
    language: str | None = None
    content: list[str] = []
    for line in response.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is not None and (language is None or fence[1]):
            language, content = fence[1], []
        elif fence is not None and language is not None:
            yield language, "".join(f"{held}\n" for held in content)
            language = None
        else:
            content.append(line)


def read_tests(column: object) -> Cases:
    """Read the column `tests`, a value or JSON text. ValueError for an unknown form."""
    try:
        value = json.loads(column) if isinstance(column, str) else column
    except ValueError as error:
        raise ValueError(f"the column `tests` is text that is not JSON: {_short(column)} ({error})") from error
    if isinstance(value, Mapping) and isinstance(value.get("inputs"), list) and isinstance(value.get("outputs"), list):
        pairs = list(zip(value["inputs"], value["outputs"], strict=True))
        if pairs and (function := value.get("fn_name")) is not None:
            return Cases(function=str(function), returned=tuple(_returned(*pair) for pair in pairs))
    elif isinstance(value, list) and all(isinstance(test, str) for test in value):
        pairs = []
        if value:
            return Cases(statements=tuple(value))
    elif isinstance(value, list) and all(
        isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in value
    ):
        pairs = [(test["input"], test["output"]) for test in value]
    else:
        raise ValueError(
            f"the column `tests` is {_short(column)}; it must be a list of objects with `input` and `output`, a list "
            "of assertions, or an object with `inputs`, `outputs` and perhaps `fn_name`"
        )
    if not pairs:
        raise ValueError("the column `tests` is empty, so every program would pass; add at least one test")
    return Cases(printed=tuple((_text(stdin), _text(printed)) for stdin, printed in pairs))


def read_test_code(code: str, entry_point: str | None) -> Cases:
    """Read the column `test_code`: statements, functions named test_..., or `check` for `entry_point`.

    The statements below `if __name__ == "__main__"` count as statements.
    """
    try:
        body = ast.parse(code).body
    except SyntaxError as error:
        raise ValueError(f"the column `test_code` is not Python: {error}") from error
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    names = tuple(node.name for node in functions if node.name.startswith("test_"))
    if names:
        return Cases(statements=(code,), test_functions=names)
    if entry_point is not None and any(node.name == "check" for node in functions):
        return Cases(statements=(f"{code}\n\ncheck({entry_point})\n",))
    statements = [part for node in body for part in (node.body if _is_main_guard(node) else [node])]
    if all(map(_tests_nothing, statements)):
        cases = [node.name for node in body if isinstance(node, ast.ClassDef) and _is_unittest(node)]
        what = f"has its tests in the unittest class {cases[0]}, which is not run" if cases else "only has definitions"
        raise ValueError(
            f"the column `test_code` {what}, so every program would pass: add statements, functions called test_... "
            "outside of a class, or a function `check` and a column `entry_point`"
        )
    return Cases(statements=(code if statements == body else ast.unparse(ast.Module(statements, type_ignores=[])),))


def _is_unittest(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("TestCase") for base in node.bases)


def _is_main_guard(node: ast.stmt) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
    )


def _tests_nothing(node: ast.stmt) -> bool:
    """Return whether a statement only defines something, or starts a runner. A runner finds no tests in the sandbox."""
    if isinstance(node, _DEFINING) or isinstance(getattr(node, "value", None), ast.Constant):
        return True
    return any(runner in ast.unparse(node) for runner in ("unittest.main(", "pytest.main("))


def same_output(printed: str, expected: str, *, tolerance: float = 0.0) -> bool:
    """Return whether the lines are equal, ignoring surrounding white space and trailing empty lines.

    Numbers are compared as numbers.
    """
    lines, wanted = ([line.split() for line in text.rstrip().splitlines()] for text in (printed, expected))
    return list(map(len, lines)) == list(map(len, wanted)) and all(
        _same_word(*pair, tolerance) for pair in zip(itertools.chain(*lines), itertools.chain(*wanted), strict=True)
    )


def same_value(value: object, expected: object, *, tolerance: float = 0.0) -> bool:
    """Compare two JSON values; numbers may differ by the tolerance, absolute or relative."""
    if isinstance(value, dict) and isinstance(expected, dict):
        items = list(value.items())
        return value.keys() == expected.keys() and same_value(
            [item for _, item in items], [expected[key] for key, _ in items], tolerance=tolerance
        )
    if isinstance(value, list) and isinstance(expected, list):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(same_value(v, e, tolerance=tolerance) for v, e in pairs)
    if value == expected:
        return True
    both = isinstance(value, int | float) and isinstance(expected, int | float)
    return both and tolerance > 0 and _close(value, expected, tolerance)


def _same_word(word: str, wanted: str, tolerance: float) -> bool:
    if word == wanted or not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(wanted)):
        return word == wanted
    first, second = Decimal(word), Decimal(wanted)
    return first == second or (tolerance > 0 and _close(first, second, tolerance))


def _close(first: Any, second: Any, tolerance: float) -> bool:
    try:
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer too large for a float
        return False


def _returned(raw_arguments: object, expected: object) -> tuple[list[Any], Any]:
    arguments = raw_arguments
    if isinstance(raw_arguments, str):  # `splitlines` would also split at U+2028, which a JSON string may contain
        arguments = [json.loads(line) for line in raw_arguments.split("\n") if line.strip()]
    if not isinstance(arguments, list):
        raise ValueError(f"the arguments of a test are {_short(raw_arguments)}; they must be a list, or lines of JSON")
    if isinstance(raw_arguments, str) and isinstance(expected, str):
        expected = json.loads(expected)
    plain = json.loads(json.dumps([arguments, expected]))
    return plain[0], plain[1]


def _text(value: object) -> str:
    if isinstance(value, list):  # lines
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(f"the input or output of a test is {_short(value)}; it must be text")
    return value


def _imports(code: str) -> Iterator[str]:
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError as error:
        raise ValueError(f"a test is not Python: {_short(code)} ({error})") from error
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names if alias.name != "solution")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module not in (None, "solution"):
            yield str(node.module).split(".")[0]


def _parsed(results: bytes, count: int) -> list[Any]:
    """Return an answer for each test. None: no JSON. The program can write answers itself: only compare answers."""
    answers: list[Any] = []
    for line in [*results.split(b"\n", count)[:count], *[b""] * count][:count]:
        try:
            answers.append(json.loads(line))
        except (ValueError, RecursionError):
            answers.append(None)
    return answers


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
