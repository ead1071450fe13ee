"""Environments of other libraries follow our protocol, with the real libraries if installed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.extensions import CodeSource
from rlhf.rollouts.environments.host import EnvironmentFailure, EnvironmentHost, Step
from rlhf.rollouts.environments.observations import Seen
from tests.vision_models import drawn, encoded

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
Told = tuple[str, list[Step]]


def play(name: str, args: dict[str, Any], columns: dict[str, Any], *says: str, seed: int = 1) -> Told:
    """Return the first observation and the steps of a conversation in a separate process."""

    async def run() -> Told:
        host = EnvironmentHost(CodeSource(path=None, name=name, args=args), step_timeout_s=30.0, memory_gib=8.0)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(host.stop)
            description = await host.start()
            conversation = await host.open()
            stack.push_async_callback(conversation.end)
            first = await conversation.reset(seed, description.select(columns))
            return first, [await conversation.step(text) for text in says]

    return asyncio.run(asyncio.wait_for(run(), 120.0))


def test_a_game_of_textarena_is_its_seeds() -> None:
    pytest.importorskip("textarena", reason="the extra textarena is not installed")
    game = {"game": "GuessTheNumber-v0", "args": {"max_turns": 30}}
    rules, steps = play("textarena", game, {}, "no number", "[1]", seed=3)
    assert "guess the number between 1 and 20" in rules
    assert "invalid move" in str(steps[0].observation)
    assert steps[1] == Step(observation="The target number is higher.", reward=0.0, done=False)
    guesses = [f"[{number}]" for number in range(1, 9)]  # the secret of seed 3 is 8
    _, steps = play("textarena", game, {}, *guesses, seed=3)
    assert [step.done for step in steps] == [False] * 7 + [True]
    assert steps[-1].reward == 1.0


def test_an_environment_of_skyrl_gym_is_made_of_the_row() -> None:
    pytest.importorskip("skyrl_gym", reason="the extra skyrl-gym is not installed")
    row = {"reward_spec": {"ground_truth": "4"}, "messages": [{"role": "user", "content": "2 + 2?"}]}
    args = {"env": "gsm8k_multi_turn", "extras": {"max_turns": 3}}
    first, steps = play("skyrl_gym", args, row, "#### 5", "#### 4")
    assert first == ""
    assert "tentative numeric answer" in str(steps[0].observation)
    assert steps[0].reward == pytest.approx(0.2 / 3)
    assert (steps[1].reward, steps[1].done) == (1.0, True)
    with pytest.raises(EnvironmentFailure, match="ground_truth is required"):
        play("skyrl_gym", args, {})


@pytest.mark.parametrize(("name", "args"), [("textarena", {"game": "Nim-v0"}), ("skyrl_gym", {"env": "gsm8k"})])
def test_what_is_not_installed_names_its_extra(name: str, args: dict[str, Any]) -> None:
    try:
        __import__(name)
    except ImportError:
        with pytest.raises(UserError, match=rf"is not installed .*ray-rlhf\[{name.replace('_', '-')}\]"):
            play(name, args, {})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's server with the page's environment."""
    folder = tmp_path_factory.mktemp("server")
    for name, block in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        (folder / name).write_text(block)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "serve.py", str(port)], cwd=folder)
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait(10)


def test_a_server_plays_or_fails(server: str) -> None:
    first, steps = play("http", {"url": server}, {"start": 1}, "3", "x")
    assert first == "10 are left. Take 1, 2 or 3."
    assert str(steps[0].observation).endswith(" are left.")
    assert steps[1] == Step(observation="Say 1, 2 or 3.", reward=-0.1, done=False)
    with pytest.raises(EnvironmentFailure, match=r"reset: .*URLError"):
        play("http", {"url": "http://127.0.0.1:9"}, {})
    with pytest.raises(UserError, match="expected a URL that begins with http:// or https://"):
        play("http", {"url": "file:///etc/passwd"}, {})


def test_a_server_sends_images_in_base64() -> None:
    image = base64.b64encode(encoded(drawn("red"))).decode()
    answers = {
        "/reset": {"session": 1, "observation": [{"type": "image", "image": image}]},
        "/step": {
            "observation": [{"type": "text", "text": "?"}, {"type": "image", "image": "%"}],
            "reward": 0,
            "done": 0,
        },
        "/close": {},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    first, _ = play("http", {"url": url}, {})
    assert first == Seen((encoded(drawn("red")),))
    answers["/reset"]["observation"][0]["image"] = f"data:image/png;base64,{image}"
    assert play("http", {"url": url}, {})[0] == first
    with pytest.raises(EnvironmentFailure, match=r"step: .*Error: "):
        play("http", {"url": url}, {}, "go")
    server.shutdown()


@pytest.fixture
def openenv() -> Iterator[str]:
    """An OpenEnv server's messages: a session for each connection, and errors in answers."""
    sync_server = pytest.importorskip("websockets.sync.server", reason="the extra openenv is not installed")

    def serve(session: Any) -> None:
        assert session.request.path == "/ws"
        if session.request.headers.get("Authorization") not in (None, "Bearer a-token"):
            session.send(json.dumps({"type": "error", "data": {"message": "who are you?"}}))
            return
        left = 0
        for message in map(json.loads, session):
            data = message["data"]
            if message["type"] == "reset":
                left, reward = data.get("start", data["seed"]), None
            elif data["kind"] != ["say"] or data["text"] == "boom":
                session.send(json.dumps({"type": "error", "data": {"message": "too loud", "code": "EXECUTION_ERROR"}}))
                continue
            else:
                left, reward = left - 1, 0.5
            told = {"observation": {"said": f"{left} left", "more": [1]}, "reward": reward, "done": left == 0}
            session.send(json.dumps({"type": "observation", "data": told}))

    with sync_server.serve(serve, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/"


ACTION = {"kind": ["say"], "text": "{response}"}


def test_an_environment_of_openenv_plays(openenv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args: dict[str, Any] = {"url": openenv, "action": ACTION, "observation": "said"}
    first, steps = play("openenv", args, {"start": 2, "answer": "x"}, "{a}", "b")
    assert first == "2 left"
    assert steps == [Step(observation=f"{left} left", reward=0.5, done=not left) for left in (1, 0)]
    assert play("openenv", args, {}, seed=3)[0] == "3 left"
    del args["observation"]
    monkeypatch.setenv("ENV_TOKEN", "a-token")
    assert json.loads(play("openenv", {**args, "token_env": "ENV_TOKEN"}, {})[0]) == {"said": "1 left", "more": [1]}
    monkeypatch.setenv("ENV_TOKEN", "another")
    with pytest.raises(EnvironmentFailure, match=r"reset: .* answered reset with error: \{'message': 'who are you"):
        play("openenv", {**args, "token_env": "ENV_TOKEN"}, {})


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({}, EnvironmentFailure, r"step: RuntimeError: ws://.*/ws answered step with error: .*too loud"),
        ({"observation": "told"}, EnvironmentFailure, "the observation has said, more, but not told"),
        ({"url": "http://127.0.0.1:9"}, EnvironmentFailure, r"reset: ConnectionRefusedError"),
        ({"url": "ftp://here"}, UserError, "expected a URL that begins with http:// or https://"),
        ({"action": {"text": "fixed"}}, UserError, r"which has no \{response\}"),
        ({"token_env": "NO_SUCH_TOKEN"}, UserError, "NO_SUCH_TOKEN for the token is not set"),
    ],
)
def test_what_openenv_does_not_take_is_said(openenv: str, changes: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        play("openenv", {"url": openenv, "action": ACTION, **changes}, {}, "boom")
