"""Serve an environment of verifiers to the environment `http`; a program for verifiers' separate Python environment.

rlhf, environment `http` <- this protocol -> Bridge <- EpisodeSession -> a model's endpoint <- verifiers

verifiers plays an episode itself and asks a model for each turn. The model is an endpoint in this process: the endpoint
passes the new messages on as the observation, and returns the response. The agent's program is a plain loop without
tools, also in this process. Written for verifiers 0.4.0 (v1, the only API).

Never import rlhf here, since verifiers' environment has no rlhf. Use only verifiers, the dependencies of verifiers and
the standard library.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from aiohttp import web

logger = logging.getLogger("verifiers_server")

HARNESS = "rlhf_turns"  # id of the agent's program, a module created in `add_harness`
KEY = "RLHF_TURNS_KEY"  # environment variable with the endpoint's key for verifiers' client
MOST_BYTES = 16 * 2**20  # limit of a message
REASON_CHARS = 450  # limit of an error text; the client reads 500 bytes

Message = Mapping[str, Any]


class Refusal(Exception):
    """Answers a call with this status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def text_of(message: Message) -> str:
    """Return the text of a chat completions message. ValueError if the message has any content besides text."""
    content = message.get("content") or ""
    if message.get("tool_calls") or message["role"] == "tool":
        raise ValueError("the environment calls tools, which a policy that answers in text cannot")
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise ValueError("a message has other content than text")
    return "".join(part["text"] for part in content)


def news(seen: Sequence[Message], messages: Sequence[Message]) -> str:
    """Return the new messages after `seen` as text. ValueError if the earlier messages have changed."""
    known = [(message["role"], text_of(message)) for message in seen]
    received = [(message["role"], text_of(message)) for message in messages]
    if received[: len(known)] != known:
        raise ValueError("the environment changed earlier messages, but a conversation may only grow")
    new = received[len(known) :]
    if not new or any(role == "assistant" for role, _ in new):
        raise ValueError("the environment sent no new message, or an assistant's turn that the policy did not write")
    return "\n\n".join(text for _, text in new)


class EpisodeSession:
    """A session: a running episode and the awaited turn. At most one turn is awaited at a time."""

    def __init__(self) -> None:
        self.observations: asyncio.Queue[str] = asyncio.Queue()
        self.pending_turn: asyncio.Future[str] | None = None  # set while a turn is awaited
        self.seen: list[Message] = []
        self.episode: asyncio.Task[float]
        self.called = False  # True while a call is being answered
        self.used = time.monotonic()

    async def ask(self, messages: Sequence[Message]) -> str:
        """Return the policy's turn for all messages so far."""
        if self.pending_turn is not None:
            raise ValueError("the environment asks for two turns at once, but a conversation has a single agent")
        observation = news(self.seen, messages)
        self.pending_turn = asyncio.get_running_loop().create_future()
        self.observations.put_nowait(observation)
        try:
            response = await self.pending_turn
        finally:
            self.pending_turn = None
        self.seen = [*messages, {"role": "assistant", "content": response}]
        return response


Play = Callable[
    [EpisodeSession, int, Mapping[str, Any]], Awaitable[float]
]  # plays an episode with a seed and columns, and returns its reward


class Bridge:
    """The open sessions. A failed call, or a call longer than `timeout_s`, ends the session."""

    def __init__(self, play: Play, *, timeout_s: float, idle_s: float, most: int, token: str | None) -> None:
        self.play = play
        self.timeout_s = timeout_s
        self.idle_s = idle_s
        self.most = most
        self.token = token
        self.sessions: dict[str, EpisodeSession] = {}

    def app(self) -> web.Application:
        """Return the application with the three calls of the protocol."""
        app = web.Application(client_max_size=MOST_BYTES)
        for path, call in (("/reset", self.reset), ("/step", self.step), ("/close", self.close)):
            app.router.add_post(path, self._answering(call))
        return app

    async def reset(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Begin an episode, and answer with the first turn's request."""
        if len(self.sessions) >= self.most:
            raise Refusal(503, f"{self.most} sessions are open, the largest number allowed (--sessions)")
        session, conversation = uuid.uuid4().hex, EpisodeSession()
        self.sessions[session] = conversation
        conversation.episode = asyncio.ensure_future(self._episode(conversation, sent))
        result = await self._next(session)
        if isinstance(result, float):
            raise Refusal(500, "the episode ended before it asked for a turn")
        return {"session": session, "observation": result}

    async def step(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Give the episode the next turn. The reward comes at the episode's end."""
        session, response = sent["session"], sent["response"]
        if session not in self.sessions:
            raise Refusal(404, "there is no such session: it ended, failed or was idle for too long (--idle-s)")
        conversation = self.sessions[session]
        if conversation.called or conversation.pending_turn is None or conversation.pending_turn.done():
            raise Refusal(409, "the session does not wait for a turn")
        if not isinstance(response, str):
            raise Refusal(400, f"response is {response!r:.80}, expected text")
        conversation.pending_turn.set_result(response)
        result = await self._next(session)
        if isinstance(result, float):
            return {"observation": "", "reward": result, "done": True}
        return {"observation": result, "reward": 0.0, "done": False}

    async def close(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Stop a running episode."""
        await self._drop(sent["session"])
        return {}

    async def watch(self) -> None:
        """Close idle sessions until cancelled."""
        while True:
            await asyncio.sleep(min(self.idle_s / 4, 10.0))
            since = time.monotonic() - self.idle_s
            for session in [key for key, one in self.sessions.items() if not one.called and one.used < since]:
                logger.warning("session %s: no call for %g s, dropped", session, self.idle_s)
                await self._drop(session)

    async def stop(self) -> None:
        """End the episodes of all sessions."""
        for session in list(self.sessions):
            await self._drop(session)

    async def _episode(self, conversation: EpisodeSession, sent: Mapping[str, Any]) -> float:
        reward = float(await self.play(conversation, int(sent["seed"]), sent["columns"]))
        if not math.isfinite(reward):
            raise ValueError(f"the episode's reward is {reward}")
        return reward

    async def _next(self, session: str) -> str | float:
        """Return the next observation, or the reward at the end. Only an observation keeps the session open."""
        conversation = self.sessions[session]
        heard = asyncio.ensure_future(conversation.observations.get())
        conversation.called = True
        going_on = False
        try:
            await asyncio.wait(
                {heard, conversation.episode}, timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if heard.done():
                going_on = True
                return heard.result()
            if not conversation.episode.done():
                raise Refusal(504, f"the environment has not answered for {self.timeout_s:g} s (--timeout-s)")
            if conversation.episode.cancelled():
                raise Refusal(410, "the session was closed")
            failure = conversation.episode.exception()
            if failure is not None:
                logger.error("session %s failed", session, exc_info=failure)
                raise Refusal(500, f"{type(failure).__name__}: {failure}") from failure
            return conversation.episode.result()
        finally:
            heard.cancel()
            conversation.called = False
            conversation.used = time.monotonic()
            if not going_on:
                await self._drop(session)

    async def _drop(self, session: str) -> None:
        conversation = self.sessions.pop(session, None)
        if conversation is not None:
            conversation.episode.cancel()
            await asyncio.wait({conversation.episode}, timeout=10.0)
            if (
                conversation.pending_turn is not None and not conversation.pending_turn.done()
            ):  # the call to the endpoint still waits for the turn
                conversation.pending_turn.set_exception(ValueError("the session is over"))

    def _answering(self, call: Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]) -> Any:
        async def answer(request: web.Request) -> web.Response:
            try:
                given = request.headers.get("Authorization", "")
                if self.token is not None and not hmac.compare_digest(
                    given.encode("utf-8", "surrogateescape"), f"Bearer {self.token}".encode()
                ):
                    raise Refusal(401, "the token is missing or wrong")
                try:
                    sent = await request.json()
                    return web.json_response(await call(sent))
                except (KeyError, TypeError, json.JSONDecodeError) as error:
                    raise Refusal(
                        400, f"the call does not follow the protocol: {type(error).__name__}: {error}"
                    ) from error
            except Refusal as refusal:
                return web.json_response({"error": str(refusal)[:REASON_CHARS]}, status=refusal.status)

        return answer


class Model:
    """The endpoint that verifiers calls as a model: each turn goes to the conversation of the trace."""

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(32)
        self.traces: dict[str, EpisodeSession] = {}

    def app(self) -> web.Application:
        """Return the application for chat completions without streaming."""
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _complete(self, request: web.Request) -> web.Response:
        conversation = self.traces.get(request.headers.get("X-Session-ID", ""))
        if request.headers.get("Authorization") != f"Bearer {self.key}" or conversation is None:
            return web.json_response({"error": {"message": "not a call of a conversation"}}, status=401)
        asked = await request.json()
        try:
            if asked.get("tools") or asked.get("stream"):
                raise ValueError("tools and streams are not answered")
            response = await conversation.ask(asked["messages"])
        except ValueError as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": response}}
        return web.json_response(
            {
                "id": uuid.uuid4().hex,
                "object": "chat.completion",
                "created": int(time.time()),
                "model": "policy",
                "choices": [choice],
            }
        )


def add_harness() -> None:
    """Register the agent's program with verifiers: a loop in this process, with a turn for each segment."""
    import httpx
    import verifiers.v1 as vf
    from verifiers.v1.dialects.chat import message_to_wire

    class Turns(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
        APPENDS_SYSTEM_PROMPT = True
        SUPPORTS_RESUME = True
        EXECUTES_CODE = False
        NEEDS_CONTAINER = False

        async def launch(
            self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            messages = [] if system is None else [{"role": "system", "content": system}]
            if isinstance(prompt, str):
                messages.append({"role": "user", "content": prompt})
            else:
                messages += [message_to_wire(message) for message in prompt or []]
            async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
                answer = await client.post(
                    f"{endpoint}/chat/completions",
                    json={"model": ctx.model, "messages": messages},
                    headers={"Authorization": f"Bearer {secret}"},
                )
            failed = answer.status_code != 200
            return vf.ProgramResult(int(failed), "", answer.text if failed else "")

    module = ModuleType(HARNESS)
    module.__dict__.update(__all__=["Turns"], Turns=Turns)
    sys.modules[HARNESS] = module


class Episodes:
    """The tasks of a verifiers environment, and the play of an episode."""

    def __init__(self, name: str, config: Mapping[str, Any], model: Model, most_tasks: int) -> None:
        import verifiers.v1 as vf

        kind = vf.env_config_type(name, config.get("id", ""))
        seats = [key for key, field in kind.model_fields.items() if isinstance(field.default, vf.AgentConfig)]
        if len(seats) != 1:
            raise ValueError(f"{name} has the agents {', '.join(seats)}, expected a single agent")
        seat = dict(config.get(seats[0], {}))
        if set(seat) & {"harness", "client", "model"}:
            raise ValueError(
                f"--config: may not set the harness, client or model of {seats[0]}, because this server does"
            )
        seat = {"runtime": {"type": "subprocess"}, **seat, "harness": {"id": HARNESS}}
        full_config = {**config, "taskset": {**config.get("taskset", {}), "id": name}, seats[0]: seat}
        self.vf = vf
        self.model = model
        self.env = vf.load_environment(vf.resolve_env_config(full_config))
        self.tasks = list(itertools.islice(self.env.taskset, most_tasks))
        if not self.tasks:
            raise ValueError(f"{name} has no tasks")
        self.by_id = {task.data.id: task for task in self.tasks if task.data.id is not None}
        self.endpoint = ""  # URL of the model, set once it is served

    def task(self, seed: int, columns: Mapping[str, Any]) -> Any:
        """Return the task named by column `task`, by position or id. Without the column, the seed selects the task."""
        named = columns.get("task")
        if named is None:
            return self.tasks[seed % len(self.tasks)]
        if isinstance(named, str) and named in self.by_id:
            return self.by_id[named]
        if isinstance(named, int) and 0 <= named < len(self.tasks):
            return self.tasks[named]
        raise ValueError(f"the column task is {named!r:.80}, neither an id nor a position below {len(self.tasks)}")

    async def play(self, conversation: EpisodeSession, seed: int, columns: Mapping[str, Any]) -> float:
        """Play an episode and return the reward. RuntimeError if any part failed or nothing was scored."""
        client = self.vf.EvalClientConfig(base_url=self.endpoint, api_key_var=KEY)
        traces: list[str] = []

        def minted(trace: Any) -> None:
            traces.append(trace.id)
            self.model.traces[trace.id] = conversation

        try:
            context = self.vf.ModelContext(model="policy", client=client)
            episode = await self.env.run_episode(self.task(seed, columns), context, on_trace=minted)
        finally:
            for one in traces:
                self.model.traces.pop(one, None)
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if errors or not episode.ok:
            raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "the episode failed")
        if len(episode.traces) != 1:
            raise RuntimeError(f"the episode has {len(episode.traces)} runs of the agent, expected one")
        (trace,) = episode.traces
        missing = [name for name, reward in trace.rewards.items() if reward is None]
        if missing or not trace.rewards:
            raise RuntimeError(f"the episode was not scored: {', '.join(missing) or 'it has no rewards'}")
        return float(trace.reward)


async def listen(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Serve an application, and return the runner and the port."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner, int(runner.addresses[0][1])


async def run_server(args: argparse.Namespace, token: str | None) -> None:
    """Serve the bridge until SIGINT or SIGTERM."""
    model = Model()
    os.environ[KEY] = model.key
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost")))
    add_harness()
    episodes = Episodes(args.environment, args.config, model, args.tasks)
    bridge = Bridge(episodes.play, timeout_s=args.timeout_s, idle_s=args.idle_s, most=args.sessions, token=token)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    inside, port = await listen(model.app(), "127.0.0.1", 0)
    episodes.endpoint = f"http://127.0.0.1:{port}/v1"
    try:
        async with episodes.env.serving():
            outside, port = await listen(bridge.app(), args.host, args.port)
            watching = asyncio.ensure_future(bridge.watch())
            logger.info("%s: %d tasks at %s:%d", args.environment, len(episodes.tasks), args.host, port)
            try:
                await stopped.wait()
            finally:
                watching.cancel()
                await bridge.stop()
                await outside.cleanup()
    finally:
        await inside.cleanup()


def _is_loopback(host: str) -> bool:
    """Return whether the address is reachable only from this machine."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def parsed(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, str | None]:
    """Return the arguments and the token. An invalid argument ends the program."""
    parser = argparse.ArgumentParser(description="An environment of verifiers for the environment `http`.")
    parser.add_argument("environment", help="the taskset's id: a package or module that can be imported")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="another than loopback needs --token-env")
    parser.add_argument("--token-env", help="variable with the token that a call must bear")
    parser.add_argument("--config", type=json.loads, default={}, help="more of verifiers' env section, as JSON")
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks that are taken, at most")
    parser.add_argument("--sessions", type=int, default=256, help="conversations open at once, at most")
    parser.add_argument("--timeout-s", type=float, default=50.0, help="of a call, below the other side's timeout_s")
    parser.add_argument("--idle-s", type=float, default=1800.0, help="until a session without a call is dropped")
    args = parser.parse_args(arguments)
    if not isinstance(args.config, dict):
        parser.error("--config: expected a JSON object")
    if min(args.tasks, args.sessions, args.timeout_s, args.idle_s) <= 0:
        parser.error("--tasks, --sessions, --timeout-s and --idle-s: expected more than 0")
    if args.token_env is None:
        if not _is_loopback(args.host):
            parser.error(
                f"--host {args.host}: other machines can reach it, so --token-env must name a variable with a token"
            )
        return args, None
    token = os.environ.get(args.token_env)
    if not token:
        parser.error(f"--token-env: the environment variable {args.token_env} is not set")
    return args, token


def main() -> None:
    """Run the program.

    The program's folder is removed from the import path, so no environment is imported from there.
    """
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if str(Path(folder).resolve()) != here]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    asyncio.run(run_server(*parsed()))


if __name__ == "__main__":
    main()
