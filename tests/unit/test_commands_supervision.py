"""rlhf/commands/supervision.py: when a driver is started again. A small script takes the place of the driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.cli import parse_arguments
from rlhf.commands import supervision
from rlhf.commands.supervision import DriverEnd, DriverRestarts
from rlhf.commands.train import _driver_command
from rlhf.process.driver_parent import DriverReport

# Each start takes the next line of the plan: the row and the checkpoint that it writes, and how it ends.
DRIVER = """
import json, os, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path
from rlhf.process.driver_parent import tell_parent, unrecorded_deaths
here, word = Path(sys.argv[1]), sys.argv[2]
starts = here / "starts.jsonl"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    deaths = [asdict(death) for death in unrecorded_deaths()]
    file.write(json.dumps({"word": word, "pid": os.getpid(), "deaths": deaths}) + chr(10))
plan = json.loads((here / "plan.json").read_text())[number]
if "row" in plan:
    run = here / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    tell_parent(folder=str(run), restarts=plan.get("restarts", 5), window_s=100.0)
    (run / "metrics.jsonl").write_text(json.dumps({"step": plan["row"]}) + chr(10))
    if "checkpoint" in plan:
        (run / "checkpoints" / "latest").unlink(missing_ok=True)
        (run / "checkpoints" / "latest").symlink_to(f"step_{plan['checkpoint']:06d}")
if plan.get("leaves"):
    sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (here / "left").write_text(str(sleeper.pid))
if plan.get("final"):
    tell_parent(is_final=True)
if plan["end"] == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waits").touch()
    time.sleep(1000)
sys.exit(plan["end"]) if plan["end"] >= 0 else os.kill(os.getpid(), -plan["end"])
"""
PARENT = (
    "import sys; from rlhf.commands import supervision as s; s.END_BY_THEMSELVES_S = s.STOPPED_FOR_S = 0.3; "
    "s.LOOK_EVERY_S = 0.1; words = [sys.executable, *sys.argv[1:]]; "
    "sys.exit(s.supervise([*words, 'first'], [*words, 'again']))"
)


def begin(folder: Path, plan: list[dict[str, Any]], before: str = "") -> subprocess.Popen[str]:
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-c", before + PARENT, str(folder / "driver.py"), str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def carry_out(folder: Path, plan: list[dict[str, Any]], before: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """Return the exit code, the start of each driver, and the log. `before` runs in the parent first."""
    process = begin(folder, plan, before)
    _, log = process.communicate(timeout=60)
    return process.returncode, starts(folder), log


def starts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def await_file(path: Path) -> None:
    until = time.monotonic() + 60.0
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


KILLED = -signal.SIGKILL


def test_a_killed_driver_is_started_again_until_the_run_is_done(tmp_path: Path) -> None:
    plan = [
        {"row": 3, "checkpoint": 2, "end": KILLED, "leaves": True},
        {"row": 3, "end": 1},
        {"row": 5, "checkpoint": 4, "end": KILLED},
        {"row": 6, "end": 75},
        {"row": 8, "end": 0},
    ]
    code, drivers, log = carry_out(tmp_path, plan)
    assert code == 0
    assert [driver["word"] for driver in drivers] == ["first", *["again"] * 4]
    killed, ended = "The driver was killed by SIGKILL after step", "The driver ended with exit code"
    # A driver gets the deaths since its checkpoint: the driver removes their records when it continues from there.
    messages = [[death["message"] for death in driver["deaths"]] for driver in drivers]
    assert messages[:3] == [[], [f"{killed} 3."], [f"{killed} 3.", f"{ended} 1 after step 3."]]
    assert messages[3:] == [[f"{killed} 5."], [f"{killed} 5.", f"{ended} 75 after step 6."]]
    assert "It is started again (4 of at most 5, cluster.restarts.gang)." in log
    assert not psutil.pid_exists(int((tmp_path / "left").read_text()))


DIES, BEGUN_DIES = {"end": KILLED}, {"row": 3, "end": KILLED}
BEFORE = "The driver was killed by SIGKILL before its run began. It is started again"
TWICE = "It is not started again: it died twice in a row at the same step in the same manner.\n"


@pytest.mark.parametrize(
    ("plan", "code", "words", "logged"),
    [
        *(([{"end": code}], code, "first", "") for code in (0, 2, 130)),
        *(([{"row": 1, "end": code, "final": True}], code, "first", "") for code in (1, 75)),
        ([DIES, {"row": 1, "end": KILLED}, {"row": 2, "end": 0}], 0, "first first again", BEFORE),
        ([{"row": 2, "end": KILLED}, DIES, DIES], 128 + 9, "first again again", TWICE),
        ([{"row": 2, "end": KILLED}, BEGUN_DIES, BEGUN_DIES], 128 + 9, "first again again", TWICE),
    ],
)
def test_a_driver_is_started_again_unless_the_run_has_ended_or_nothing_changes(
    tmp_path: Path, plan: list[dict[str, Any]], code: int, words: str, logged: str
) -> None:
    """The parent's Python is built for a C library without memfd_create."""
    result, drivers, log = carry_out(tmp_path, plan, before="import os; vars(os).pop('memfd_create', None); ")
    assert (result, [driver["word"] for driver in drivers]) == (code, words.split())
    assert logged in log


def test_what_ran_before_the_first_driver_lives_on(tmp_path: Path) -> None:
    loop = "while sleep 0.2; do :; done"  # the loop ends if a child is killed
    started = f"import subprocess as p; loop = p.Popen({loop!r}, shell=True, stdout=p.DEVNULL, stderr=p.DEVNULL); "
    noted = f"open({str(tmp_path / 'loop')!r}, 'w').write(str(loop.pid)); "
    plan = [{"row": 1, "end": KILLED, "leaves": True}, {"row": 2, "end": 0}]
    code, _, _ = carry_out(tmp_path, plan, before=started + noted)
    process = psutil.Process(int((tmp_path / "loop").read_text()))
    assert (code, process.status() != psutil.STATUS_ZOMBIE) == (0, True)
    process.kill()
    assert not psutil.pid_exists(int((tmp_path / "left").read_text()))


def test_too_many_deaths_in_the_window_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    restarts = DriverRestarts()

    def allows(at: float, step: int) -> bool:
        nonlocal now
        now = at
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        report = DriverReport(folder=str(tmp_path), restarts=2, window_s=100.0)
        return restarts.allow(DriverEnd(code=KILLED, is_told=False, hung=False, report=report))

    assert all([allows(0.0, 1), allows(50.0, 2), allows(101.0, 3)])  # the third is outside the window of the first
    assert not allows(102.0, 4)


def test_a_damaged_run_folder_does_not_end_the_supervision(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    restarts, report = DriverRestarts(), DriverReport(folder=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert restarts.allow(DriverEnd(code=1, is_told=False, hung=False, report=report))
    (tmp_path / "metrics.jsonl").write_text('garbage\n{"step": 2}\n')
    for _ in range(2):  # the broken file may hide two different steps
        assert restarts.allow(DriverEnd(code=1, is_told=False, hung=False, report=report))
    assert [death.message for death in restarts.deaths] == [
        "The driver ended with exit code 1 after step 1.",
        *("The driver ended with exit code 1 after an unknown step.",) * 2,
    ]


def test_a_driver_may_end_as_it_gets_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver(subprocess.Popen[bytes]):
        def send_signal(self, sig: int) -> None:  # as Popen does: it first looks whether the process has ended
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    monkeypatch.setattr(supervision, "_reap", lambda **_: None)  # ignores the children of other tests
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with Driver(["sleep", "1000"]) as driver:
            assert supervision._watch(driver, {signal.SIGUSR1}) == (True, False)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert driver.returncode == KILLED


def waiting(folder: Path, *after: dict[str, Any]) -> tuple[subprocess.Popen[str], int]:
    """Start a parent whose first driver waits. Return the parent and the driver's process id."""
    process = begin(folder, [{"row": 1, "end": "waits"}, *after])
    await_file(folder / "waits")
    return process, starts(folder)[0]["pid"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 128 + signal.SIGUSR1)])
def test_a_signal_is_passed_on_and_ends_the_supervision(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process, _ = waiting(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert (process.returncode, len(starts(tmp_path))) == (code, 1)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, "ended"), (signal.SIGSTOP, "hung")])
def test_a_driver_that_alone_gets_a_signal_is_started_again(tmp_path: Path, number: signal.Signals, kind: str) -> None:
    process, driver = waiting(tmp_path, {"row": 2, "end": 0})
    os.kill(driver, number)
    process.communicate(timeout=60)
    assert (process.returncode, len(starts(tmp_path))) == (0, 2)
    (death,) = starts(tmp_path)[1]["deaths"]
    assert (death["kind"] == "hung") == (kind == "hung")


def test_the_driver_ends_with_a_killed_parent(tmp_path: Path) -> None:
    process, pid = waiting(tmp_path)
    driver = psutil.Process(pid)
    process.kill()
    process.communicate(timeout=60)
    psutil.wait_procs([driver], timeout=60.0)
    assert not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE


OPTIONS = ["", "--overwrite --quiet --debug", "--json --until 3 --resume step_000012", "--resume auto"]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_driver_gets_the_arguments_of_its_parent(options: str) -> None:
    words = ["train", "x.yaml", "train.steps=3", *options.split()]
    supervised = parse_arguments([*words, "--supervise"])
    assert _driver_command(supervised)[:3] == [sys.executable, "-m", "rlhf.cli"]
    assert vars(parse_arguments(_driver_command(supervised)[3:])) == vars(parse_arguments(words))
    again = vars(parse_arguments(_driver_command(supervised, again=True)[3:]))
    assert again == vars(parse_arguments(words)) | {"resume": "auto", "overwrite": False}
