"""Agents run in real processes and at a real service: results, limits, failures, and no leftovers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from aiohttp import web

from rlhf.agents.calls import AgentFiles, AgentResult
from rlhf.agents.hosted import access_variables
from rlhf.agents.limits import ProcessLimits
from rlhf.agents.runners import AgentTask, HostedRunner, ServiceRunner
from rlhf.errors import ChildLost, UserError
from rlhf.rollouts.environments.host import EnvironmentFailure
from rlhf.rollouts.environments.process import _fork
from rlhf.rollouts.environments.tool_servers import ToolServer
from tests.agent_programs import command, function, solved_beside, task

T = TypeVar("T")
QUICK = Path(__file__).parents[1] / "fixtures" / "tools" / "quick_server.py"


def with_runner(runner: Any, use: Callable[[Any], Awaitable[T]]) -> T:
    async def run() -> T:
        await runner.start()
        try:
            return await use(runner)
        finally:
            await runner.stop()

    return asyncio.run(asyncio.wait_for(run(), 60.0))


def solve(runner: Any, asked: AgentTask) -> AgentResult:
    result: AgentResult = with_runner(runner, lambda started: started.solve(asked))
    return result


def failure(runner: Any, asked: AgentTask) -> tuple[str, str]:
    with pytest.raises(EnvironmentFailure) as caught:
        solve(runner, asked)
    return caught.value.kind, str(caught.value)


def test_a_function_gets_the_task_and_returns_text_an_object_or_files() -> None:
    async def use(runner: HostedRunner) -> list[Any]:
        return [await runner.solve(task(mood=mood)) for mood in ("text", "object", "files")]

    text, found, files = with_runner(function(), use)
    assert text == "2 + 2 at http://127.0.0.1:9/v1 with sk-1"
    assert found["answer"] == 4
    assert not Path(found["folder"]).exists()  # the session's own folder is gone
    assert files == AgentFiles(contents={"src/main.py": "print(1)"})


def with_tools(*names: str) -> HostedRunner:
    command = (sys.executable, str(QUICK))
    options: Any = {"url": None, "env": {}, "headers": {}, "timeout_s": 20.0, "max_result_chars": 100}
    return function(servers=[ToolServer(key="rollouts.agent.tools.mcp.0", command=command, only=names, **options)])


def test_a_function_calls_the_tools_of_a_server() -> None:
    found: Any = solve(with_tools("echo", "wait"), task(mood="tools"))
    assert found["names"] == ["echo", "wait"]
    assert [result.split()[1:] for result in found["results"]] == [["1"], ["1", "1"]]
    assert not psutil.pid_exists(int(found["results"][0].split()[0]))
    kind, message = failure(with_tools("die"), task(mood="tools"))
    assert (kind, "failed to answer a call of the tool die" in message) == ("unavailable", True)


FAILURES = {
    "nothing": ("raised", "returned nothing and left no files in result/"),
    "number": ("raised", "the result is 4, expected text, a JSON object, or files"),
    "huge": ("raised", "the result has 100002 bytes as JSON, more than 65536"),
    "link": ("raised", "result/secret is a link or no regular file"),
    "raise": ("raised", "solve: ValueError: lost my way, at "),
    "exit": ("died", "in solve, it exited with code 3"),
    "crash": ("died", "in solve, it was killed by SIGSEGV"),
    "greedy": ("died", "ran out of memory (rollouts.agent.memory_gib: 4)"),
}


def failures(runner: HostedRunner, *moods: str) -> list[Any]:
    async def use(runner: HostedRunner) -> list[Any]:
        return await asyncio.gather(*[runner.solve(task(mood=mood)) for mood in moods], return_exceptions=True)

    return with_runner(runner, use)


def test_a_failure_is_reported_with_its_kind() -> None:
    for (kind, message), failure in zip(FAILURES.values(), failures(function(), *FAILURES), strict=True):
        assert (failure.kind, message in str(failure)) == (kind, True), failure


def test_sessions_that_hang_together_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, runner = [], function(timeout_s=1.0)
    look = runner.host._where

    async def where(pid: int) -> str:
        asked.append(pid)
        return await look(pid)

    monkeypatch.setattr(runner.host, "_where", where)
    found = failures(runner, *["hang"] * 4, "await")
    message = "solve did not answer within rollouts.agent.timeout_s: 1"
    assert [(failure.kind, message in str(failure)) for failure in found] == [("timeout", True)] * 5
    assert any(f"{message}, at " in str(failure) for failure in found)
    assert len(asked) < 5


ATTACKS = {
    "half character": "ValueError: \\ud800",
    "folder link": "result is a link or no folder",
    "fifo": "result/pipe is a link or no regular file",
    "bad name": "is not UTF-8",
    "many folders": "more than 65536 bytes or 100 files",
    "deep result": "more than 65536 bytes or 100 files",
    "rubbish": "it wrote invalid data to its connection",
    "forged": "the result is 4, expected text",
    "threads": "the session had more threads than rollouts.agent.max_threads: 15",
    "memory": "the session's processes took more than rollouts.agent.memory_gib: 0.5",
    "files": "the session's files took more than rollouts.agent.disk_gib: 0.0195312",
    "removed file": "the session's files took more than rollouts.agent.disk_gib: 0.0195312",
    "one file": "File too large",
}


def test_an_attack_fails_its_session_alone() -> None:
    runner = function(limits=ProcessLimits(memory_gib=0.5, max_threads=15, disk_gib=20 / 1024))

    async def use(runner: HostedRunner) -> dict[str, AgentResult | BaseException]:
        moods = [task(mood="slow", s=2.0), *(task(mood="attack", kind=kind) for kind in ("deep", *ATTACKS))]
        results = await asyncio.gather(*[runner.solve(asked) for asked in moods], return_exceptions=True)
        assert not psutil.Process(runner.host.pid).children(recursive=True)
        assert runner._folder is not None
        assert os.listdir(runner._folder.path) == [".lock"]
        return dict(zip(["honest", "deep", *ATTACKS], results, strict=True))

    found = with_runner(runner, use)
    assert (found.pop("honest"), found.pop("deep")) == ("late", "done")  # `deep` leaves a folder too deep for Python
    assert {kind for kind, message in ATTACKS.items() if message not in str(found[kind])} == set(), found
    assert {type(failure) for failure in found.values()} == {EnvironmentFailure}


def test_a_machine_without_room_for_a_process_fails_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = function()

    async def full(pid: int, fd: int | None) -> int:
        return -errno.EAGAIN

    async def use(runner: HostedRunner) -> AgentResult:
        with monkeypatch.context() as patched:
            patched.setattr(runner.host, "_ask", full)
            with pytest.raises(EnvironmentFailure) as caught:
                await runner.solve(task(mood="text"))
        assert caught.value.kind == "unavailable"
        return await runner.solve(task(mood="text"))

    assert with_runner(runner, use)
    monkeypatch.setattr(os, "fork", lambda: os.open("/none/of/these", 0))
    mine, theirs = socket.socketpair()
    with mine:
        assert _fork(None, theirs.detach(), mine, 0, None) == -errno.ENOENT  # type: ignore[arg-type]


def test_a_thread_of_the_code_does_not_hold_up_the_end(tmp_path: Path) -> None:
    lines = ["import threading, time", "threading.Thread(target=time.sleep, args=[600]).start()"]
    (tmp_path / "busy.py").write_text("\n".join([*lines, "async def solve(task, client):", "    return 'done'"]))

    async def use(runner: HostedRunner) -> Any:
        assert await runner.solve(task()) == "done"
        return runner.host._started.process

    assert with_runner(function(path=tmp_path / "busy.py"), use).returncode == 0  # not killed


ENGINE = """
import asyncio, sys
from tests.agent_programs import function, task
async def run():
    runner = function()
    await runner.start()
    await runner.solve(task(mood="daemon", note=sys.argv[1], s=600))
asyncio.run(run())
"""


def test_a_daemon_ends_with_a_killed_engine(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, str(note)])
    deadline = time.monotonic() + 120.0
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    daemon = psutil.Process(int(note.read_text()))
    engine.kill()
    engine.wait()
    daemon.wait(timeout=20.0)  # TimeoutExpired: it survived


@pytest.mark.parametrize(
    ("number", "is_parent"),
    [(signal.SIGKILL, False), (signal.SIGSTOP, False), (signal.SIGSTOP, True)],
    ids=["killed", "hung", "with its parent hung"],
)
def test_a_daemon_ends_with_the_process_that_forks_sessions(
    tmp_path: Path, number: signal.Signals, is_parent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    monkeypatch.setattr("rlhf.rollouts.environments.host.STOP_WITHIN_S", 3.0)  # limit of a hung process

    async def use(runner: HostedRunner) -> psutil.Process:
        session = asyncio.create_task(runner.solve(task(mood="daemon", note=str(note), s=600)))
        while not (note.exists() and note.read_text()):
            await asyncio.sleep(0.02)
        daemon = psutil.Process(int(note.read_text()))
        forking = psutil.Process(runner.host.pid)
        (forking.parent() if is_parent else forking).send_signal(number)  # type: ignore[union-attr]
        if number == signal.SIGKILL:
            with pytest.raises(ChildLost, match="process is gone"):
                await session
            assert not daemon.is_running()
        session.cancel()
        return daemon

    with_runner(function(), use).wait(timeout=20.0)  # TimeoutExpired: it survived


def test_a_daemon_ends_with_its_session(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    async def use(runner: HostedRunner) -> AgentResult:
        other = asyncio.create_task(runner.solve(task(mood="slow", s=1.5)))  # this session runs on meanwhile
        assert await runner.solve(task(mood="daemon", note=str(note))) == "done"
        assert not psutil.pid_exists(int(note.read_text()))
        return await other

    assert with_runner(function(), use) == "late"


def test_a_cancelled_session_leaves_no_process_and_no_folder() -> None:
    async def use(runner: HostedRunner) -> list[str]:
        host = psutil.Process(runner.host.pid)
        session = asyncio.create_task(runner.solve(task(mood="await")))
        while not host.children(recursive=True):
            await asyncio.sleep(0.02)
        session.cancel()
        await asyncio.gather(session, return_exceptions=True)
        while host.children(recursive=True):  # a copy in progress ends a moment later
            await asyncio.sleep(0.02)
        assert runner._folder is not None
        return [name for name in os.listdir(runner._folder.path) if name != ".lock"]

    assert with_runner(function(), use) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "is a plain function; an agent is a function `async def plain(task, client)`"),
        ("lonely", "cannot be called as `lonely(task, client)`"),
        ("absent", "defines no `absent`; it defines: "),
    ],
)
def test_what_is_no_agent_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        solve(function(name), task())


ECHO = """
import json, os, sys
task = json.load(sys.stdin)
assert task == json.load(open("task.json"))
print(json.dumps({"task": task, "url": os.environ["OPENAI_BASE_URL"], "key": os.environ["ANTHROPIC_API_KEY"]}))
"""


def test_a_command_gets_the_task_and_its_output_is_the_result() -> None:
    assert solve(command(sys.executable, "-c", ECHO), task(size=3)) == {
        "task": {"prompt": "2 + 2", "size": 3},
        "url": "http://127.0.0.1:9/v1",
        "key": "sk-1",
    }
    private = "stat -c %a .. ; echo log; echo 4 > result/answer; stat -c %a ../.. > result/mode"
    files = AgentFiles(contents={"answer": "4\n", "mode": "700\n"})  # the folders of sessions are private
    assert solve(command("sh", "-c", private), task()) == files


@pytest.mark.parametrize(
    ("name", "hosts", "direct"),
    [("NO_PROXY", "", "127.0.0.1"), ("no_proxy", "a.example", "a.example,127.0.0.1"), ("NO_PROXY", "*", "*")],
)
def test_a_command_reaches_the_engine_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, name: str, hosts: str, direct: str
) -> None:
    for other in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, hosts)
    variables = access_variables("http://127.0.0.1:9", "sk-1")
    assert (variables["NO_PROXY"], variables["no_proxy"]) == (direct, direct)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("sh", "-c", "echo lost my way >&2; exit 3"), "raised", "exited with code 3; it wrote last to stderr: lost"),
        (("sh", "-c", "kill -9 $$"), "raised", "was killed by signal 9; it wrote last to stderr: nothing"),
        (("yes",), "raised", "wrote more than 65536 bytes to its standard output"),
        (("printf", "\\377"), "raised", "standard output is not UTF-8"),
        (
            ("sh", "-c", "echo waiting for a lock >&2; sleep 600"),
            "timeout",
            "the command `sh -c 'echo waiting for a lock >&2; sleep 600'` did not end within "
            "rollouts.agent.timeout_s: 1; it wrote last to stderr: waiting for a lock",
        ),
        (("/no-such-agent",), "raised", "No such file or directory: '/no-such-agent'"),  # in the sandbox, at the root
    ],
)
def test_a_failing_command_is_reported(words: tuple[str, ...], kind: str, message: str) -> None:
    runner = command(*words, timeout_s=1.0 if kind == "timeout" else 20.0, sandbox=words == ("/no-such-agent",))
    found = failure(runner, task())
    assert (found[0], "solve" in found[1]) == (kind, False)
    assert message in found[1]


@pytest.mark.parametrize("sandbox", [False, True])
def test_the_children_of_a_command_may_keep_its_output_open_and_end_with_it(sandbox: bool) -> None:
    async def use(runner: HostedRunner) -> AgentResult:
        found = await runner.solve(task())
        assert not psutil.Process(runner.host.pid).children(recursive=True)
        return found

    assert with_runner(command("sh", "-c", "setsid sleep 600 & echo four", sandbox=sandbox), use) == "four\n"


PRISONER = """
import json, os, socket, sys, urllib.request
task = json.load(sys.stdin)
def tried(what):
    try:
        return what()
    except OSError as error:
        return type(error).__name__
reached = urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/models").read().decode()
open("result/made", "w").write("kept")
print(json.dumps({
    "model": reached,
    "beside": tried(lambda: os.listdir(task["beside"])),
    "sessions": tried(lambda: len(os.listdir(".."))),
    "processes": tried(lambda: os.listdir("/proc")),
    "devices": tried(lambda: open("/dev/shm/x", "w")),
    "passwd": tried(lambda: open("/etc/passwd").read()),
    "write": tried(lambda: open("/usr/x", "w")),
    "net": tried(lambda: socket.create_connection(("127.0.0.1", task["port"]), 2.0)),
    "secret": os.environ.get("RLHF_TEST_SECRET"),
}), file=open("result/seen", "w"))
"""


def test_a_program_in_the_sandbox_has_the_packages_of_its_virtual_environment(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "installed_there.py").write_text("name = 'installed'")
    code = "import os, installed_there as i; os.system('echo from a shell'); print(i.name)"
    runner = command(str(folder / "bin" / "python"), "-c", code, sandbox=True)
    assert solve(runner, task()) == "from a shell\ninstalled\n"


def test_a_program_in_the_sandbox_reaches_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_SECRET", "token")

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="policy" if request.path == "/v1/models" else "")

    def prisoner(address: str) -> tuple[HostedRunner, AgentTask]:
        about = {"beside": str(tmp_path), "port": int(address.rpartition(":")[2])}
        runner = command(sys.executable, "-c", PRISONER, sandbox=True)
        return runner, AgentTask(task=about, address=address, api_key="", seed=1)

    result = solved_beside(answer, prisoner)
    assert isinstance(result, AgentFiles)
    assert result.contents["made"] == "kept"
    assert json.loads(result.contents["seen"]) == {
        "model": "policy",
        "beside": "FileNotFoundError",
        "sessions": 1,  # the folder of this session alone
        "processes": "FileNotFoundError",
        "devices": "OSError",
        "passwd": "FileNotFoundError",
        "write": "OSError",
        "net": "ConnectionRefusedError",
        "secret": None,
    }


def serve(answer: Any, timeout_s: float = 10.0) -> AgentResult:
    def service(address: str) -> tuple[ServiceRunner, AgentTask]:
        return ServiceRunner(f"{address}/solve", timeout_s=timeout_s, key="rollouts.agent"), task(size=3)

    return solved_beside(answer, service)


def test_a_service_is_sent_the_task_and_answers_with_the_result() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"path": request.path, **await request.json()})

    assert serve(answer) == {
        "path": "/solve",
        "task": {"prompt": "2 + 2", "size": 3},
        "openai_base_url": "http://127.0.0.1:9/v1",
        "anthropic_base_url": "http://127.0.0.1:9",
        "api_key": "sk-1",
    }


@pytest.mark.parametrize(
    ("status", "body", "late_s", "kind", "message"),
    [
        (500, b"broken", 0.0, "refused", "answered 500: 'broken'"),
        (200, b"x" * 70_000, 0.0, "raised", "as JSON, more than 65536"),
        (200, b"\xff", 0.0, "raised", "can't decode byte"),
        (200, b"late", 1.0, "timeout", "did not answer within rollouts.agent.timeout_s: 0.5"),
    ],
)
def test_a_failing_service_is_reported(status: int, body: bytes, late_s: float, kind: str, message: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(late_s)
        return web.Response(status=status, body=body)

    with pytest.raises(EnvironmentFailure, match=message) as caught:
        serve(answer, timeout_s=0.5 if late_s else 10.0)
    assert caught.value.kind == kind


def test_a_service_that_is_not_there_is_reported() -> None:
    runner = ServiceRunner("http://127.0.0.1:9/solve", timeout_s=5.0, key="rollouts.agent")
    kind, message = failure(runner, task())
    assert (kind, "cannot be reached" in message) == ("unavailable", True)


AGENT = """
import os, sys

async def solve(task, client):
    before, threads = set(sys.modules), len(os.listdir(f"/proc/{os.getppid()}/task"))
    said = await client.openai.chat.completions.create(model=client.model, messages=[{"role": "user", "content": "?"}])
    return {"said": said.choices[0].message.content, "imported": sorted(set(sys.modules) - before), "threads": threads}
"""


def test_what_a_call_imports_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the engine is reached without a proxy

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": "yes"}}]})

    def hosted(address: str) -> tuple[HostedRunner, AgentTask]:
        return function(path=tmp_path / "agent.py"), replace(task(), address=address)

    assert solved_beside(answer, hosted) == {"said": "yes", "imported": [], "threads": 1}
