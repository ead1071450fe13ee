"""How fast `rlhf view` answers, and how its memory grows, with a long run in its folder.

    python benchmarks/view.py --folder /tmp/view-benchmark

Writes a run of 1,000 steps with 100 samples each (token columns included), and serves the run in a separate process.
Requests are the requests of the page: the state of the runs, all metrics, and, for steps in random order, the list of
responses and all responses to one prompt. Then all steps are requested, and the server's memory is measured before and
after. The folder stays for the next time. The page's scripts are not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import psutil

from rlhf.tracking.metrics.declarations import METRICS
from rlhf.tracking.run_folder.samples import SampleRecord, SampleTokens, samples_path, write_samples

GROUP = 10
ASKED = 300  # requests of each kind
WORDS = ["The", " answer", " is", " 4", "2", ".", "\n", " so", " we", " have", " Zür", "ich", " therefore", " then"]


def write_run(folder: Path, *, steps: int, samples: int, tokens: int) -> None:
    """Write the run, unless a marker shows that the run is complete."""
    marker = folder / f"whole-{steps}-{samples}-{tokens}"
    if marker.exists():
        return
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "samples").mkdir(parents=True)
    names = [name for name in METRICS if "<" not in name]
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "time_s": 3.0 * step, **{name: draw.random() for name in names}}
            file.write(json.dumps(row) + "\n")
    for step in range(1, steps + 1):
        write_samples(samples_path(folder, step), [_record(step, i, tokens, draw) for i in range(samples)])
    marker.touch()


def _record(step: int, place: int, tokens: int, draw: random.Random) -> SampleRecord:
    ids = draw.choices(range(len(WORDS)), k=tokens)
    columns = [tuple(round(draw.random(), 6) for _ in ids) for _ in range(4)]
    texts = tuple(WORDS[i] for i in ids)
    group = step * 10_000 + place // GROUP
    return SampleRecord(
        split="train",
        group_id=group,
        prompt_id=group,
        sample=place % GROUP,
        prompt=f"<|user|>Question {group}: " + "what is it? " * 20 + "<|assistant|>",
        response="".join(texts),
        score=draw.random(),
        scores={"correct": draw.random()},
        advantage=draw.random() - 0.5,
        truncated=draw.random() < 0.1,
        response_tokens=tokens,
        min_version=step,
        max_version=step,
        mean_rollout_logprob=-0.5,
        mean_old_logprob=-0.5,
        mean_ref_logprob=-0.5,
        tokens=SampleTokens(
            texts=texts,
            ids=tuple(ids),
            sampled=(True,) * tokens,
            rollout_logprobs=columns[0],
            old_logprobs=columns[1],
            ref_logprobs=columns[2],
            teacher_logprobs=None,
            advantages=columns[3],
        ),
    )


async def measure(url: str, steps: int, server: psutil.Process) -> list[tuple[str, list[float], int]]:
    """Milliseconds of each kind of request, and the largest answer in bytes; memory goes to stdout."""
    draw = random.Random(1)
    async with aiohttp.ClientSession(url) as session:

        async def ask(path: str, **params: str | int) -> tuple[float, bytes, str]:
            began = time.perf_counter()
            async with session.get(path, params=params) as response:
                body = await response.read()
                assert response.status == 200, body
                return 1000.0 * (time.perf_counter() - began), body, response.headers.get("X-Place", "")

        run = json.loads((await ask("/api/runs"))[1])["runs"][0]["name"]
        kinds: dict[str, tuple[list[float], int]] = {}

        def note(kind: str, took: float, body: bytes) -> None:
            times, most = kinds.get(kind, ([], 0))
            kinds[kind] = ([*times, took], max(most, len(body)))

        async def step_at(step: int) -> None:
            took, body, _ = await ask("/api/samples", run=run, step=step)
            note("responses of a step, in short", took, body)
            listing = json.loads(body)
            at = ",".join(str(place) for place in range(GROUP))
            took, body, _ = await ask("/api/responses", run=run, step=step, version=listing["version"], at=at)
            note(f"{GROUP} responses, token by token", took, body)

        async def everything() -> None:
            place = {"next": 0, "mark": 0, "more": True}
            while place["more"]:
                took, body, header = await ask(
                    "/api/metrics", run=run, **{"from": place["next"], "mark": place["mark"]}
                )
                place = json.loads(header)
                note("metrics from the beginning, a piece of 1 MiB", took, body)
            for _ in range(10):
                took, body, _ = await ask("/api/metrics", run=run, **{"from": place["next"], "mark": place["mark"]})
                note("metrics, nothing new", took, body)
            for path, kind in (("/api/runs", "state of the runs"), ("/api/summary", "summary, nothing new")):
                took, body, _ = await ask(path, run=run)
                note(kind, took, body)

        note("first summary", *(await ask("/api/summary", run=run))[:2])
        for _ in range(20):
            await step_at(draw.randint(1, steps))
        before = server.memory_info().rss
        for _ in range(ASKED):
            await step_at(draw.randint(1, steps))
        for _ in range(ASKED // 5):
            await everything()
        middle = server.memory_info().rss
        for step in range(1, steps + 1):
            await step_at(step)
        after = server.memory_info().rss
    mib = [value / 2**20 for value in (before, middle, after)]
    sys.stdout.write(
        f"server RSS MiB: {mib[0]:.1f} after 20 steps, {mib[1]:.1f} after {ASKED}, {mib[2]:.1f} after all\n"
    )
    return [(kind, times, most) for kind, (times, most) in kinds.items()]


def main() -> None:
    """Write the run, serve it, measure the requests, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    write_run(args.folder, steps=args.steps, samples=args.samples, tokens=args.tokens)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    sys.stdout.write(f"{args.steps} steps, {args.samples * args.steps} samples, {size / 2**20:.0f} MiB\n")
    command = [sys.executable, "-m", "rlhf.cli", "view", str(args.folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[1].rstrip(";")
            found = asyncio.run(measure(url, args.steps, psutil.Process(process.pid)))
        finally:
            process.terminate()
    sys.stdout.write("| request | asked | p50 ms | p99 ms | largest ms | largest kB |\n|---|---|---|---|---|---|\n")
    for kind, times, most in found:
        times = sorted(times)
        p50, p99 = times[len(times) // 2], times[int(0.99 * (len(times) - 1))]
        sys.stdout.write(f"| {kind} | {len(times)} | {p50:.1f} | {p99:.1f} | {times[-1]:.1f} | {most / 1000:.0f} |\n")


if __name__ == "__main__":
    main()
