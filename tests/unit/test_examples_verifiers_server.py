"""The server for environments of verifiers serves sessions of a local episode, and of verifiers itself if installed."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.environments import verifiers_server
from examples.environments.verifiers_server import Bridge, EpisodeSession, listen, news, parsed
from rlhf.rollouts.environments.adapters.http import HttpEnvironment

PYTHON = "RLHF_TEST_VERIFIERS_PYTHON"  # the interpreter of an environment with verifiers 0.4.0


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_what_is_new_is_told() -> None:
    begun = [{"role": "system", "content": "rules"}, {"role": "user", "content": [{"type": "text", "text": "go"}]}]
    assert news([], begun) == "rules\n\ngo"
    said = [*begun, {"role": "assistant", "content": "a"}]
    assert news(said, [*said, user("b"), user("c")]) == "b\n\nc"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("other"), user("b")], "may only grow"),
        ([user("a")], "sent no new message"),
        ([user("a"), {"role": "assistant", "content": "x"}, user("b")], "the policy did not write"),
        ([user("a"), {"role": "tool", "content": "4", "tool_call_id": "1"}], "calls tools"),
        ([user("a"), {"role": "user", "content": [{"type": "image_url"}]}], "has other content than text"),
    ],
)
def test_what_a_conversation_cannot_hold_is_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        news([user("a")], messages)


async def count_down(conversation: EpisodeSession, seed: int, columns: Mapping[str, Any]) -> float:
    """Play an episode of `seed` turns with the length of all answers as the reward; columns make the episode fail, hang
    or return nan."""
    if columns.get("fails"):
        raise RuntimeError("the dataset is gone")
    messages: list[dict[str, str]] = []
    for left in range(seed, 0, -1):
        messages.append(user(f"{left} left"))
        messages.append({"role": "assistant", "content": await conversation.ask(messages)})
    if columns.get("hangs"):
        await asyncio.sleep(60)
    return float("nan") if columns.get("nan") else sum(len(one["content"]) for one in messages[1::2])


@pytest.fixture
def served() -> Iterator[Any]:
    """Yield a bridge in a separate thread, and its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    bridge = Bridge(count_down, timeout_s=0.5, idle_s=60.0, most=2, token=None)
    runner, port = wait(listen(bridge.app(), "127.0.0.1", 0))
    yield SimpleNamespace(bridge=bridge, url=f"http://127.0.0.1:{port}")
    for end in (bridge.stop(), runner.cleanup()):
        wait(end)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_an_episode_is_told_turn_by_turn_and_rewarded_at_its_end(served: Any) -> None:
    environment = HttpEnvironment(served.url)
    assert environment.reset(2) == "2 left"
    other = HttpEnvironment(served.url)
    assert other.reset(1) == "1 left"
    with pytest.raises(RuntimeError, match=r"answered 503: .*2 sessions are open"):
        HttpEnvironment(served.url).reset(1)
    assert environment.step("abc") == ("1 left", 0.0, False)
    assert other.step("") == ("", 0.0, True)
    assert environment.step("de") == ("", 5.0, True)
    environment.close()
    assert not served.bridge.sessions
    with pytest.raises(RuntimeError, match=r"answered 404: .*no such session"):
        environment.step("more")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"fails": True}, r"reset answered 500: .*RuntimeError: the dataset is gone"),
        ({"hangs": True}, r"step answered 504: .*has not answered for 0.5 s"),
        ({"nan": True}, r"step answered 500: .*the episode's reward is nan"),
    ],
)
def test_a_failure_is_an_answer_with_its_reason(served: Any, columns: dict[str, Any], said: str) -> None:
    environment = HttpEnvironment(served.url)

    def play() -> None:
        environment.reset(1, **columns)
        environment.step("x")

    with pytest.raises(RuntimeError, match=said):
        play()
    assert not served.bridge.sessions


def test_a_token_is_asked_for(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served.bridge.token = "secret"
    with pytest.raises(RuntimeError, match="answered 401"):
        HttpEnvironment(served.url).reset(1)
    monkeypatch.setenv("TURNS_TOKEN", "another")
    with pytest.raises(RuntimeError, match="answered 401"):
        HttpEnvironment(served.url, token_env="TURNS_TOKEN").reset(1)
    monkeypatch.setenv("TURNS_TOKEN", "secret")
    assert HttpEnvironment(served.url, token_env="TURNS_TOKEN").reset(1) == "1 left"


def test_another_host_needs_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(["gsm8k", "--port", "0"])[1] is None
    monkeypatch.setenv("TURNS_TOKEN", "secret")
    assert parsed(["gsm8k", "--port", "0", "--host", "0.0.0.0", "--token-env", "TURNS_TOKEN"])[1] == "secret"
    with pytest.raises(SystemExit):
        parsed(["gsm8k", "--port", "0", "--host", "0.0.0.0"])
    assert "--token-env must name a variable" in capsys.readouterr().err
    monkeypatch.setenv("TURNS_TOKEN", "")
    with pytest.raises(SystemExit):
        parsed(["gsm8k", "--port", "0", "--token-env", "TURNS_TOKEN"])
    assert "TURNS_TOKEN is not set" in capsys.readouterr().err


SUMS = '''
"""One turn: the answer to a sum."""
import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        if self.data.answer == "6":
            raise RuntimeError("the judge is down")
        return float(len(trace.last_reply) < 3)


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> list[SumTask]:
        rule = "A number."
        data = (SumData(id=f"{n}", prompt=f"{n} + {n}?", system_prompt=rule, answer=f"{2 * n}") for n in range(4))
        return [SumTask(row) for row in data]


__all__ = ["Sums"]
'''


def test_verifiers_itself_plays_an_episode(tmp_path: Path) -> None:
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"VERIFIERS NOT TESTED: {PYTHON} does not name an interpreter that has it")
    (tmp_path / "sums_env.py").write_text(SUMS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, verifiers_server.__file__, "sums-env", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while f":{port}" not in (said := (tmp_path / "log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.1)
        client = HttpEnvironment(f"http://127.0.0.1:{port}")
        assert client.reset(5) == "A number.\n\n1 + 1?"  # task 5 % 4
        assert client.step("2") == ("", 2.5, True)  # 2 x right + 0.5 x short
        client.close()
        client.reset(0, task=3)
        with pytest.raises(RuntimeError, match=r"step answered 500: .*TaskError.*the judge is down"):
            client.step("6")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
