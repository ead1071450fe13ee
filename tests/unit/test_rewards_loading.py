"""A reward is found by name and has a signature. Every wrong name has a message."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.rewards.loading import LoadedReward, check_columns, load_reward
from rlhf.rewards.processes.program import Signature

FILES = Path(__file__).parent.parent / "fixtures" / "rewards"


def load(
    function: str, *, folders: tuple[Path, ...] = (FILES,), timeout_s: float = 60.0, **args: object
) -> LoadedReward:
    return load_reward(function, args=args, folders=folders, key="rewards.r.function", timeout_s=timeout_s)


def refusal(function: str, *, folder: Path = FILES, timeout_s: float = 60.0, **args: object) -> str:
    with pytest.raises(UserError) as error:
        load(function, folders=(folder,), timeout_s=timeout_s, **args)
    assert str(error.value).startswith("rewards.r.function: ")
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
    length = load("simple.py:length", folders=(tmp_path, FILES))  # the first folder that has the file
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
    assert load("json.py:reward", folders=(tmp_path,)).function == "json.py:reward"


def test_check_columns() -> None:
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
