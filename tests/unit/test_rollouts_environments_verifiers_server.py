"""The server for environments of verifiers: its sessions with an episode of ours, and verifiers itself where it is."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from rlhf.rollouts.environments import verifiers_server
from rlhf.rollouts.environments.adapters.http import HttpEnvironment
from rlhf.rollouts.environments.verifiers_server import Bridge, EpisodeSession, listen, news, parsed

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
    """An episode of `seed` turns whose reward is the length of all answers; columns make it fail, hang or say nan."""
    if columns.get("fails"):
        raise RuntimeError("the dataset is gone")
    messages: list[dict[str, str]] = []
    for left in range(seed, 0, -1):
        messages.append(user(f"{left} left"))
        messages.append({"role": "assistant", "content": await conversation.ask(messages)})
    if columns.get("hangs"):
        await asyncio.sleep(60)
    return float("nan") if columns.get("nan") else sum(len(one["content"]) for one in messages[1::2])


class Served:
    """A bridge in a thread of its own."""

    def __init__(self, **changes: Any) -> None:
        settings = {"timeout_s": 0.5, "idle_s": 60.0, "most": 2, "token": None, **changes}
        self.loop = asyncio.new_event_loop()
        self.bridge = Bridge(count_down, **settings)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.runner, port = self.wait(listen(self.bridge.app(), "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{port}"

    def wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def stop(self) -> None:
        self.wait(self.bridge.stop())
        self.wait(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.stop()


def test_an_episode_is_told_turn_by_turn_and_rewarded_at_its_end(served: Served) -> None:
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
def test_a_failure_is_an_answer_with_its_reason(served: Served, columns: dict[str, Any], said: str) -> None:
    environment = HttpEnvironment(served.url)

    def play() -> None:
        environment.reset(1, **columns)
        environment.step("x")

    with pytest.raises(RuntimeError, match=said):
        play()
    assert not served.bridge.sessions


def test_a_closed_and_an_idle_session_end_their_episodes(served: Served) -> None:
    environment = HttpEnvironment(served.url)
    environment.reset(1)
    (closed,) = served.bridge.sessions.values()
    environment.close()
    assert closed.episode.cancelled()
    environment.reset(1)
    (idle,) = served.bridge.sessions.values()
    served.bridge.idle_s = 0.1
    watching = asyncio.run_coroutine_threadsafe(served.bridge.watch(), served.loop)
    until = time.monotonic() + 60
    while not idle.episode.cancelled() and time.monotonic() < until:
        time.sleep(0.02)
    watching.cancel()
    assert idle.episode.cancelled()
    with pytest.raises(RuntimeError, match="no such session"):
        environment.step("x")


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(token="secret")
    try:
        with pytest.raises(RuntimeError, match="answered 401"):
            HttpEnvironment(served.url).reset(1)
        monkeypatch.setenv("TURNS_TOKEN", "another")
        with pytest.raises(RuntimeError, match="answered 401"):
            HttpEnvironment(served.url, token_env="TURNS_TOKEN").reset(1)
        monkeypatch.setenv("TURNS_TOKEN", "secret")
        assert HttpEnvironment(served.url, token_env="TURNS_TOKEN").reset(1) == "1 left"
    finally:
        served.stop()


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
        return [
            SumTask(SumData(id=f"sum-{n}", prompt=f"{n} + {n}?", system_prompt="A number.", answer=str(2 * n)))
            for n in range(4)
        ]


__all__ = ["Sums"]
'''

GUESSING = '''
"""Several turns: the environment is the user."""
import verifiers.v1 as vf


class GuessData(vf.TaskData):
    secret: int


class GuessTask(vf.Task[GuessData]):
    pass


class GuessingConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class Guessing(vf.Env[GuessingConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            turns = 1
            while not segment.terminated and segment.last_reply != str(task.data.secret):
                if segment.last_reply == "boom":
                    raise RuntimeError("the game broke")
                hint = "higher" if segment.last_reply < str(task.data.secret) else "lower"
                segment = await interaction.turn(hint)
                turns += 1
        won = not segment.terminated
        interaction.trace.record_reward("won", 1.0 / turns if won else 0.0, 1.0)


class Numbers(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self) -> list[GuessTask]:
        return [GuessTask(GuessData(prompt="1 to 9?", secret=n)) for n in (3, 7)]


__all__ = ["Guessing", "Numbers"]
'''


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has verifiers, which cannot be installed beside us."""
    found = os.environ.get(PYTHON)
    if found is None:
        pytest.skip(f"VERIFIERS NOT TESTED: {PYTHON} does not name an interpreter that has it")
    return found


@pytest.fixture(scope="module")
def verifiers(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The server on each of the two environments."""
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "sums_env.py").write_text(SUMS)
    (folder / "guessing_env.py").write_text(GUESSING)
    started: list[subprocess.Popen[bytes]] = []
    urls: dict[str, str] = {}
    try:
        for name, config in (("sums-env", {}), ("guessing-env", {"player": {"max_turns": 3}})):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [python, verifiers_server.__file__, name, "--port", str(port), "--config", json.dumps(config)]
            with (folder / f"{name}.log").open("wb") as log:
                environment = {**os.environ, "PYTHONPATH": str(folder)}
                process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            started.append(process)
            until = time.monotonic() + 120
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                said = (folder / f"{name}.log").read_text()
                assert process.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.1)
            urls[name] = f"http://127.0.0.1:{port}"
        yield urls
        for process in started:
            process.terminate()
            assert process.wait(30) == 0
    finally:
        for process in started:
            process.kill()
            process.wait(10)


def test_verifiers_with_one_turn(verifiers: dict[str, str]) -> None:
    environment = HttpEnvironment(verifiers["sums-env"])
    assert environment.reset(5) == "A number.\n\n1 + 1?"  # task 5 % 4
    assert environment.step("2") == ("", 2.5, True)  # 2 x right + 0.5 x short
    environment.close()
    assert environment.reset(0, task="sum-2", answer="x") == "A number.\n\n2 + 2?"
    assert environment.step("four") == ("", 0.0, True)
    assert environment.reset(0, task=0) == "A number.\n\n0 + 0?"
    assert environment.step("") == ("", 0.5, True)
    environment.reset(0, task=3)
    with pytest.raises(RuntimeError, match=r"step answered 500: .*TaskError.*the judge is down"):
        environment.step("6")
    with pytest.raises(RuntimeError, match=r"reset answered 500: .*the column task is 'sum-9'"):
        environment.reset(0, task="sum-9")


def test_verifiers_with_several_turns(verifiers: dict[str, str]) -> None:
    environment, other = HttpEnvironment(verifiers["guessing-env"]), HttpEnvironment(verifiers["guessing-env"])
    assert environment.reset(0, task=1) == "1 to 9?"
    assert other.reset(0, task=0) == "1 to 9?"
    assert environment.step("5") == ("higher", 0.0, False)
    assert other.step(" 9\n") == ("lower", 0.0, False)
    assert other.step("3") == ("", 0.5, True)
    assert environment.step("8") == ("lower", 0.0, False)
    assert environment.step("9") == ("", 0.0, True)  # its max_turns of 3
    assert environment.reset(0) == "1 to 9?"
    environment.close()
    assert environment.reset(0) == "1 to 9?"
    with pytest.raises(RuntimeError, match=r"step answered 500: .*the game broke"):
        environment.step("boom")


def test_an_environment_that_cannot_be_served_says_why(python: str) -> None:
    for arguments, said in (
        (["no-such-env"], "taskset 'no-such-env' not found"),
        (["no-such-env", "--config", '{"id": "user-sim"}'], "no-such-env has the agents assistant, user"),
    ):
        command = [python, verifiers_server.__file__, *arguments, "--port", "0"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode != 0
        assert re.search(said, ended.stderr), ended.stderr
