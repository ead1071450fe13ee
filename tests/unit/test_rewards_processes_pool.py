"""A pool of real processes keeps the order and reports every failure. The next group is scored after each failure."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.errors import RunError
from rlhf.extensions import CodeSource
from rlhf.rewards.processes.pool import Failure, RewardPool
from rlhf.rewards.processes.process import RewardProcess
from rlhf.rewards.processes.program import Hello, Reply, Request

FILES = Path(__file__).parent.parent / "fixtures" / "rewards"
TIMEOUT_S = 0.8


def source(function: str, **args: object) -> CodeSource:
    file, name = function.split(":")
    return CodeSource(path=str(FILES / file), name=name, args=args)


HOSTILE_NAMES = (
    "raises raises_in_library exits sleeps hangs_in_c swallows_everything dies crashes eats_memory returns "
    "batched_raises batched_short batched_sleeps noisy floods leaves_a_child leaves_a_daemon writes_rubbish "
    "writes_a_large_header torch_is_loaded"
)
HOSTILE = HOSTILE_NAMES.split()


@pytest.fixture(scope="module")
def hostile() -> Iterator[RewardPool]:
    """Yield a pool for all failures. Each test gets the pool in the state after the previous test."""
    with closing(RewardPool([source(f"hostile.py:{name}") for name in HOSTILE], timeout_s=TIMEOUT_S)) as pool:
        yield pool


def failures_of(pool: RewardPool, name: str, **columns: object) -> tuple[Failure, ...]:
    """Failures of the group a, x, b; afterwards the pool must score a good group."""
    outcome = pool.score(HOSTILE.index(name), "p", ["a", "x", "b"], columns)
    unscored = {sample for sample, score in enumerate(outcome.scores) if score is None}
    assert unscored == {failure.sample for failure in outcome.failures}
    assert pool.score(HOSTILE.index("raises"), "p", ["a", "b"], {}).scores == (1.0, 1.0)
    return outcome.failures


@pytest.mark.parametrize(
    ("name", "kind", "parts"),
    [
        ("raises", "raised", ("ValueError: no sense in x", "hostile.py:17 in raises")),
        ("raises_in_library", "raised", ("JSONDecodeError", "decoder.py", "called from", "in raises_in_library")),
        ("exits", "raised", ("SystemExit: enough", "in exits")),
        ("sleeps", "timeout", ("no answer within 0.8 s", "hostile.py:33 in sleeps")),
        ("hangs_in_c", "timeout", ("in hangs_in_c",)),
        ("swallows_everything", "timeout", ("in swallows_everything",)),
        ("dies", "died", ("exited with code 3",)),
        ("crashes", "died", ("SIGSEGV", "ctypes")),
        ("writes_rubbish", "died", ("wrote invalid data to the connection for its answers",)),
        ("writes_a_large_header", "died", ("wrote invalid data to the connection for its answers",)),
        ("eats_memory", "died", ("ran out of memory; the limit is reward_policy.memory_gib: 8",)),
        ("batched_raises", "raised", ("no sense in x",)),
        ("batched_short", "not_a_number", ("returned 1 scores for 3 responses",)),
        ("batched_sleeps", "timeout", ("in sleeps",)),
    ],
)
def test_only_the_culprit_fails(hostile: RewardPool, name: str, kind: str, parts: tuple[str, ...]) -> None:
    """A batched call fails as a whole."""
    failures = failures_of(hostile, name)
    culprits = (0, 1, 2) if name.startswith("batched") else (1,)
    assert [(failure.sample, failure.kind) for failure in failures] == [(sample, kind) for sample in culprits]
    assert all(part in failure.message for part in parts for failure in failures)


NO_NUMBERS = ((float("nan"), "returned nan"), (float("-inf"), "returned -inf"), ("0.5", "returned '0.5' of type str"))


def test_what_is_a_number_and_what_is_no_opinion(hostile: RewardPool) -> None:
    for value, expected in (*NO_NUMBERS, ([1.0], "of type list"), (10**400, "too large")):
        (failure,) = failures_of(hostile, "returns", value=value)
        assert (failure.sample, failure.kind) == (1, "not_a_number")
        assert expected in failure.message
    for value, score in ((True, 1.0), (3, 3.0), (-0.25, -0.25), (None, None)):
        outcome = hostile.score(HOSTILE.index("returns"), "p", ["a", "x", "b"], {"value": value})
        assert (outcome.scores, outcome.failures) == ((1.0, score, 1.0), ())


@pytest.mark.parametrize(("name", "kind"), [("sleeps", "timeout"), ("dies", "died"), ("raises", "raised")])
def test_a_group_that_goes_on_has_all_its_other_scores(hostile: RewardPool, name: str, kind: str) -> None:
    outcome = hostile.score(HOSTILE.index(name), "p", ["x", "a", "x", "b"], {}, goes_on=True)
    assert outcome.scores == (None, 1.0, None, 1.0)
    assert [(failure.sample, failure.kind) for failure in outcome.failures] == [(0, kind), (2, kind)]


def test_output_goes_to_the_log_and_a_flood_does_not_fill_it(
    hostile: RewardPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rlhf.rewards.processes.process"):
        assert hostile.score(HOSTILE.index("noisy"), "p", ["größer \ud800 字"], {}).scores == (1.0,)
        text = "\n".join(caplog.messages)
        assert [part in text for part in ("seen: größer \\ud800 字", "to stderr", "straight to the file")] == [True] * 3
        caplog.clear()
        assert hostile.score(HOSTILE.index("floods"), "p", ["a"], {}).scores == (1.0,)
    assert len(caplog.messages) == 21  # twenty lines, and one line about the lines left out


def test_what_a_reward_started_dies_with_it(hostile: RewardPool) -> None:
    for name, kind in (("leaves_a_child", "timeout"), ("leaves_a_daemon", "died")):
        (child,) = hostile.score(HOSTILE.index(name), "p", ["a"], {}).scores
        assert psutil.pid_exists(int(child))
        assert failures_of(hostile, name)[0].kind == kind
        assert_gone(int(child))


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 60.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there 60 s after its parent"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def simple() -> Iterator[RewardPool]:
    names = ("length", "right", "from_neighbour", "edits_its_column", "batched", "Counting")
    with closing(RewardPool([source(f"simple.py:{name}") for name in names], timeout_s=30.0)) as pool:
        yield pool


MANY = ["x" * (i * 7 % 50) for i in range(300)]


@pytest.mark.parametrize(
    ("reward", "responses", "columns", "scores"),
    [
        (0, [], {}, ()),
        (0, MANY, {}, tuple(float(len(response)) for response in MANY)),  # in order
        (0, ["字" * 3_000_000] * 2, {}, (3e6, 3e6)),  # larger than any buffer
        # equal to the answer, plus the tolerance, plus one other column
        (1, ["é", "b"], {"answer": "é", "tolerance": 0.5, "z": 0}, (2.5, 1.5)),
        (2, ["a"], {}, (7.0,)),
        (3, ["a", "b", "c"], {"steps": [5]}, (2.0, 2.0, 2.0)),  # no call sees the changes of another one
        (4, ["a", "b", "a"], {"answer": "a"}, (31.0, 30.0, 31.0)),  # a batched reward sees the group
    ],
)
def test_responses_and_columns_arrive(
    simple: RewardPool, reward: int, responses: list[str], columns: dict[str, Any], scores: tuple[float, ...]
) -> None:
    assert simple.score(reward, "p", responses, columns).scores == scores


def test_a_class_is_constructed_once_and_processes_are_light_and_quick(simple: RewardPool, hostile: RewardPool) -> None:
    assert simple.score(5, "p", ["a", "b"], {}).scores == (1.0, 2.0)
    assert simple.score(5, "p", ["a"], {}).scores == (3.0,)
    assert hostile.score(HOSTILE.index("torch_is_loaded"), "p", ["a"], {}).scores == (0.0,)
    fastest = math.inf  # of 500 groups, which other work on the machine does not slow down
    for _ in range(500):
        began = time.monotonic()
        simple.score(0, "p", ["a"] * 8, {})
        fastest = min(fastest, time.monotonic() - began)
    assert fastest < 8 / 2000


@pytest.mark.parametrize(("killed", "is_replaced"), [((1,), True), ((2,), True), ((1, 3), True), ((2, 3), False)])
def test_a_process_killed_while_it_loads_is_replaced_once(
    killed: tuple[int, ...], is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool starts a process, and a second process after the death of the first loaded process."""
    started: list[RewardProcess] = []
    start = RewardPool._start

    def start_and_kill(pool: RewardPool) -> RewardProcess:
        process = start(pool)
        started.append(process)
        if len(started) in killed:
            os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(RewardPool, "_start", start_and_kill)
    with closing(RewardPool([source("simple.py:length")], timeout_s=60.0)) as pool:
        os.kill(pool.pids()[0], signal.SIGKILL)
        if is_replaced:
            assert pool.score(0, "p", ["a", "bb"], {}).scores == (1.0, 2.0)
        else:
            with pytest.raises(RunError, match="loading `length` ended its process: it was killed by SIGKILL"):
                pool.score(0, "p", ["a", "bb"], {})
    assert len(started) == len(killed) + (2 if is_replaced else 1)


def test_each_response_may_lose_its_process_once(tmp_path: Path) -> None:
    """Processes end by themselves, and one process is killed from outside."""
    (tmp_path / "once.py").write_text(
        "import os, pathlib\n"
        "def once(prompt, response):\n"
        "    seen = pathlib.Path(__file__).with_name(response)\n"
        "    if not seen.exists(): seen.touch(), os._exit(3)\n"
        "    return float(len(response))\n"
    )
    with closing(RewardPool([CodeSource(path=str(tmp_path / "once.py"), name="once")], timeout_s=60.0)) as pool:
        assert pool.score(0, "p", ["a", "bb", "ccc"], {}).scores == (1.0, 2.0, 3.0)
        os.kill(pool.pids()[0], signal.SIGKILL)
        assert_gone(pool.pids()[0])  # so that even the request cannot be sent
        assert pool.score(0, "p", ["a"], {}).scores == (1.0,)


def test_a_stopped_process_is_replaced() -> None:
    with closing(RewardPool([source("simple.py:length")], timeout_s=0.5)) as pool:
        pid = pool.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        # far more than a socket holds, so the request cannot even be sent
        assert pool.score(0, "p", ["a" * 10_000_000], {}).failures[0].kind == "timeout"
        assert pool.score(0, "p", ["a"], {}).scores == (1.0,)
        assert not psutil.pid_exists(pid)


def test_a_process_maps_no_more_memory_than_it_may() -> None:
    for limit, kinds in ((0.5, ["died"]), (4.0, [])):
        with closing(RewardPool([source("hostile.py:takes_a_gib")], timeout_s=10.0, memory_gib=limit)) as pool:
            failures = pool.score(0, "p", ["x"], {}).failures
        assert [failure.kind for failure in failures] == kinds
        assert all("the limit is reward_policy.memory_gib: 0.5" in failure.message for failure in failures)


def test_groups_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both groups are sent before a group gets a reply."""
    both, receive = threading.Barrier(2), RewardProcess.receive

    def receive_together(process: RewardProcess, timeout_s: float) -> Reply:
        both.wait(20.0)
        return receive(process, timeout_s)

    pair = RewardPool([source("simple.py:length")], timeout_s=30.0, processes=2)
    with closing(pair) as pool, ThreadPoolExecutor() as threads:
        monkeypatch.setattr(RewardProcess, "receive", receive_together)
        outcomes = list(threads.map(lambda response: pool.score(0, "p", [response], {}), ["a", "bb"]))
    assert [outcome.scores for outcome in outcomes] == [(1.0,), (2.0,)]


def test_closing_ends_a_group_under_way_and_a_reward_that_cannot_be_loaded_ends_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = RewardPool([source("hostile.py:sleeps")], timeout_s=60.0)
    send = RewardProcess.send

    def send_and_close(process: RewardProcess, message: Hello | Request, timeout_s: float) -> None:
        send(process, message, timeout_s)
        threading.Thread(target=pool.close).start()

    monkeypatch.setattr(RewardProcess, "send", send_and_close)
    with pytest.raises(RunError, match="closed"):
        pool.score(0, "p", ["x"], {})
    assert pool.pids() == []
    with pytest.raises(RunError, match="cannot load its rewards"):
        RewardPool([source("simple.py:absent")], timeout_s=1.0)


@pytest.mark.parametrize("name", ["sleeps", "hangs_in_c"])
def test_processes_end_with_their_parent(name: str) -> None:
    path = str(FILES / "hostile.py")
    code = (
        "from rlhf.rewards.processes.pool import RewardPool\n"
        "from rlhf.rewards.processes.process import RewardProcess\n"
        "from rlhf.extensions import CodeSource\n"
        f"pool = RewardPool([CodeSource(path={path!r}, name={name!r}, args={{}})], timeout_s=200)\n"
        "send = RewardProcess.send\n"
        "def send_and_say(process, message, timeout_s):\n"
        "    send(process, message, timeout_s)\n"
        f"    while not process.where({path!r}): pass\n"
        "    print(process.pid, flush=True)\n"
        "RewardProcess.send = send_and_say\n"
        "pool.score(0, 'p', ['x'], {})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert_gone(pid)


def test_steps_of_functions_and_what_is_none() -> None:
    sources = [source(f"steps.py:{name}") for name in ("digits", "lines_of_group", "returns")]
    with closing(RewardPool(sources, timeout_s=5.0)) as pool:
        one = pool.score(0, "p", ["a1b2", "", "x"], {}, by_step=True)
        assert one.scores == (3.0, 0.0, 0.0)
        assert [[(step.end, step.value) for step in steps] for steps in one.steps] == [[(2, 1.0), (4, 2.0)], [], []]
        two = pool.score(1, "p", ["ab\nc"], {}, by_step=True)
        assert [(step.end, step.value) for step in two.steps[0]] == [(3, 3.0), (4, 1.0)]
        for value, message in (
            (1.0, "returned 1.0 of type float where a list of (end, value), one a step, is expected"),
            ([(1, "x")], "returned 'x' of type str where a float is expected"),
            ([(1, float("nan"))], "returned nan"),
            ([(3, 1.0)], "returned a step that ends at 3, but the response has 2 characters"),
            ([(-1, 1.0)], "returned a step that ends at -1, but the response has 2 characters"),
            ([(0.5, 1.0)], "returned a step that ends at 0.5, but the response has 2 characters"),
        ):
            (failure,) = pool.score(2, "p", ["ab"], {"value": value}, by_step=True).failures
            assert (failure.kind, failure.message) == ("not_a_number", message)
        silent = pool.score(2, "p", ["ab"], {"value": None}, by_step=True)
        assert (silent.scores, silent.steps, silent.failures) == ((None,), ((),), ())
        assert pool.score(0, "p", ["1"], {}).failures[0].kind == "not_a_number"  # steps where a number is asked for
