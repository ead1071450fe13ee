"""Kill a run with hundreds of open agents' sessions several times, resume it, and count every session.

    python benchmarks/agents.py [--sessions 256] [--kind function]

Each step samples one batch of sessions, all open at once in one engine. A session calls the model two or three times.
The engine is killed during its sessions. The driver is killed during sessions, and after some sessions have ended. Then
each session of each step must be in the samples once, and `rlhf doctor` must prove the record. `--kind url` runs the
sessions in a service without a process each. `--kills 0` only measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.faults import VICTIMS, find_victim

STEPS = 2
SAMPLES = 8  # sessions of a prompt
KILLS = (("engine", 0.0), ("driver", 0.25), ("driver", 0.0))  # the killed process, and the share of ended sessions
DEADLINE_S = 400.0
NOTES = "notes"  # a line for the beginning and the end of each session
AGENT = '''
"""A session of two or three calls, which notes its beginning and its end. It rests, so that all are open at once."""

import asyncio
import os


async def solve(task, client):
    note = os.open({notes!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(note, b"+" + client.api_key.encode() + b"\\n")
    messages = []
    for number in range(2 + ord(client.api_key[-1]) % 2):
        messages.append({{"role": "user", "content": f"{{task['prompt']}} {{number}}"}})
        answer = await client.openai.chat.completions.create(model=client.model, messages=messages)
        messages.append({{"role": "assistant", "content": answer.choices[0].message.content}})
        await asyncio.sleep(3.0)
    os.write(note, b"-" + client.api_key.encode() + b"\\n")
    os.close(note)
    return messages[-1]["content"]


def odd(prompt, response, result):
    return float(len(result) % 2)
'''


def serve(folder: Path, urls: Any) -> None:
    """Run the agent as a service, for all sessions in one process."""
    from aiohttp import web
    from openai import AsyncOpenAI

    sys.path.append(str(folder))
    from agent import solve

    async def session(request: web.Request) -> web.Response:
        asked = await request.json()
        model = AsyncOpenAI(base_url=asked["openai_base_url"], api_key=asked["api_key"], max_retries=0, timeout=None)
        client = SimpleNamespace(model="model", api_key=asked["api_key"], openai=model)
        return web.json_response({"said": await solve(asked["task"], client)})

    async def run() -> None:
        application = web.Application()
        application.router.add_post("/solve", session)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        urls.put(f"http://127.0.0.1:{runner.addresses[0][1]}/solve")
        await asyncio.Event().wait()

    asyncio.run(run())


def write_config(folder: Path, *, sessions: int, agent: dict[str, Any], steps: int) -> Path:
    """Write the configuration of the run, and return its path."""
    tree = {
        "run": {"name": "run", "dir": str(folder), "seed": 0},
        "policy": {"model": "tiny:llama", "dtype": "float32"},
        "algorithm": {"name": "grpo"},
        "data": {
            "train": {"task": "running_totals", "split": "train", "size": 4 * sessions // SAMPLES},
            "max_prompt_tokens": 32,
        },
        "rollouts": {
            "prompts_per_step": sessions // SAMPLES,
            "samples_per_prompt": SAMPLES,
            "max_new_tokens": 8,
            "agent": {**agent, "max_calls": 3, "max_tokens": 256, "timeout_s": 300.0, "concurrency": sessions},
        },
        "rewards": {"odd": {"function": f"{folder}/agent.py:odd"}},
        "tracking": {"samples_per_step": sessions},
        "train": {
            "steps": steps,
            "lr": 1e-3,
            "sequences_per_update": sessions,
            "max_tokens_per_microbatch": 4096,
            "checkpoint_every": 1,
        },
        "cluster": {
            "object_store_gib": 0.25,
            "start_timeout_s": 300.0,
            "call_timeout_s": 350.0,
            "roles": {"rollout": {"kv_cache_gib": 1}},
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `rlhf train`. Its output goes to a file beside the configuration."""
    with config.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "rlhf.cli", "train", str(config), *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


class Notes:
    """The notes that sessions have written since the last kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()
        self.begin = 0

    def forget(self) -> None:
        """Begin a new count."""
        self.begin = self.path.stat().st_size

    def read(self) -> tuple[int, int]:
        """Return how many sessions are open, and how many have ended."""
        text = self.path.read_bytes()[self.begin :]
        ended = text.count(b"-sk")
        return text.count(b"+sk") - ended, ended


def memory(run: Path) -> tuple[float, float, int]:
    """Return the MiB of the engine, the MiB of all processes below the engine, and the number of these processes."""
    engine = find_victim(run, VICTIMS["engine"])
    if engine is None:
        return 0.0, 0.0, 0
    below = 0
    children = engine.children(recursive=True)
    for child in children:
        try:
            below += child.memory_full_info().pss
        except psutil.Error:
            continue
    return engine.memory_info().rss / 2**20, below / 2**20, len(children)


def main() -> None:
    """Run, kill and resume a run, and print the counts of each kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--kind", choices=["function", "url"], default="function")
    parser.add_argument("--kills", type=int, default=len(KILLS))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rlhf-agents-benchmark-"))
    (folder / "agent.py").write_text(AGENT.format(notes=str(folder / NOTES)), encoding="utf-8")
    agent: dict[str, Any] = {"function": f"{folder}/agent.py:solve"}
    service = None
    if arguments.kind == "url":
        context = multiprocessing.get_context("spawn")
        urls = context.Queue()
        service = context.Process(target=serve, args=[folder, urls], daemon=True)
        service.start()
        agent = {"url": urls.get(timeout=60)}
    config = write_config(folder, sessions=arguments.sessions, agent=agent, steps=arguments.steps)
    try:
        run_and_count(config, arguments)
    finally:
        if service is not None:
            service.kill()


def run_and_count(config: Path, arguments: argparse.Namespace) -> None:
    """Run with the kills, and print the counts."""
    run, notes, kills = config.parent / "run", Notes(config.parent / NOTES), list(KILLS[: arguments.kills])
    process, until, most, peak = start(config), time.monotonic() + DEADLINE_S, 0, (0.0, 0.0, 0)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
        open_now, ended = notes.read()
        if open_now > most:
            most, peak = open_now, memory(run)
        if not kills or open_now < 0.5 * arguments.sessions or ended < kills[0][1] * arguments.sessions:
            continue
        who, _ = kills.pop(0)
        engine = find_victim(run, VICTIMS["engine"])
        sys.stdout.write(f"{time.monotonic() - began:.0f} s: {who} killed, {open_now} sessions open, {ended} ended\n")
        sys.stdout.flush()
        if who == "engine" and engine is not None:
            engine.kill()
        elif who == "driver":
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start(config, "--resume", "auto")
        time.sleep(2.0)  # the sessions in progress have ended
        notes.forget()
        until = time.monotonic() + DEADLINE_S
    if process.poll() is None:
        process.kill()
    code = process.wait()
    counts: Counter[tuple[str, int, int]] = Counter()
    for path in sorted((run / "samples").glob("step_*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                counts[path.stem, row["prompt_id"], row["sample"]] += 1
    notes.begin = 0
    _, ended = notes.read()
    doctor = subprocess.run([sys.executable, "-m", "rlhf.cli", "doctor", str(run)], capture_output=True, text=True)
    sys.stdout.write(
        f"{time.monotonic() - began:.0f} s: exit code {code}, {len(kills)} kills left; most sessions open at once: "
        f"{most} (engine {peak[0]:.0f} MiB, its {peak[2]} processes {peak[1]:.0f} MiB)\n"
        f"samples: {len(counts)} of {arguments.steps * arguments.sessions} sessions, each "
        f"{sorted(set(counts.values()))} times; {ended} sessions ran to their end\n"
        f"rlhf doctor: exit code {doctor.returncode}\n{doctor.stdout if doctor.returncode else ''}"
        f"{config.parent}\n"
    )


if __name__ == "__main__":
    main()
