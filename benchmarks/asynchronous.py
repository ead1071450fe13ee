"""GRPO on SmolLM2-135M in every mode of rollouts and training: same prompts, limits, batches and samples, one machine.

    python benchmarks/asynchronous.py
    python benchmarks/asynchronous.py --balance     # only the share of the rollouts in a step

Each mode runs alone. "one core each" gives the engine a core and the trainer a core. "both cores each" lets each side
use the whole machine in its turn. The other modes are compared with the faster of the two. The prompts are school
mathematics. A column limits the response tokens of each row. The limits are lognormal with a sigma of 1: most responses
are short, and a few keep the engine busy alone.

In the first table, the reward is a rule that costs nothing. In the second, it is a service whose latency is lognormal
with a sigma of 1 and a mean of one batch of rollouts, as measured in the first table. There, in flight is also measured
with batches in the order of completion: in the order of prompts, one slow answer keeps all later batches waiting.

A step is everything from one step's end to the next. The first steps are a warm-up and not counted. The last steps are
not counted either, because engines ahead of training have nothing left to sample then. All modes count the same steps,
and so the same prompts (but for the order of completion). Tokens are the prompt and response tokens of these steps.

The bound is the gain of a mode if overlapping cost nothing. The bound comes from the two sides of a step in turns with
one core each: the time until the rollouts are scored, and the rest. A step cannot be shorter than the longer side. In
flight, a step cannot be shorter than the rest: later responses fill the engine during the longest responses. The
prediction simulates the mode with the groups and the rates of that run; `rlhf plan` simulates with estimates. Both
sides should take about the same time, as on a cluster of the right size: --balance helps to choose the lengths.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import reasoning_gym
import yaml
from aiohttp import web
from rich.console import Console
from rich.table import Table

from rlhf.config.derive import derive
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.planning.lengths import Lengths
from rlhf.planning.simulate import simulate
from rlhf.planning.system import RecordedGroup, Schedule, System
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.sinks.tracker import read_metrics

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
SIGMA, MOST_TOKENS = 1.0, 384
LONGEST_QUESTION = 200  # characters
DEADLINE_S = 1800.0
RULE = {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}
ONE_CORE = {"cluster.roles.policy.threads": 1, "cluster.roles.rollout.threads": 1}
TURNS_BOTH, TURNS_ONE = "in turns, both cores each", "in turns, one core each"
IN_FLIGHT, BY_COMPLETION = "in flight, 2 ahead", "in flight, 2 ahead, by completion"
MODES: dict[str, dict[str, Any]] = {  # the keys of each mode
    TURNS_BOTH: {"cluster.roles.policy.threads": 2, "cluster.roles.rollout.threads": 2},
    TURNS_ONE: ONE_CORE,
    "streamed": ONE_CORE | {"train.streamed": True},
    "pipelined, 1 ahead": ONE_CORE | {"rollouts.max_staleness": 1},
    IN_FLIGHT: ONE_CORE | {"rollouts.max_staleness": 2, "rollouts.weight_updates": "in_flight"},
}
MODES[BY_COMPLETION] = MODES[IN_FLIGHT] | {"rollouts.batch_order": "completion"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The model, the sizes and the limits that all modes share."""

    steps: int  # counted
    prompts: int  # of a step
    samples: int  # of each prompt
    median_tokens: int  # of the limits

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of data, with the latency of the service relative to its mean."""
        count, generator = self.prompts * (WARM_UP + self.steps + 2), random.Random(0)
        items = reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=20 * count)
        questions = (item["question"] for item in items if len(item["question"]) <= LONGEST_QUESTION)
        rows = []
        for question in islice(questions, count):
            limit = round(generator.lognormvariate(math.log(self.median_tokens), SIGMA))
            latency = generator.lognormvariate(-(SIGMA**2) / 2, SIGMA)
            rows.append({"prompt": question, "max_new_tokens": min(max(limit, 4), MOST_TOKENS), "latency": latency})
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of one mode over the counted steps."""

    step_s: float
    tokens_per_s: float
    scored_s: float  # time of a step until its rollouts are scored, in turns
    waits: float  # part of the time in which training waited for responses
    idle: float  # part of the time in which the engines answered nothing
    lag: float  # versions between the trained weights and the oldest token of a response


@contextmanager
def reward_service(mean_s: float) -> Iterator[str]:
    """Serve a reward that takes `mean_s` on average. Yields its address."""
    loop = asyncio.new_event_loop()

    async def score(request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(mean_s * body["columns"]["latency"])
        return web.json_response({"scores": [math.log1p(len(response)) for response in body["responses"]]})

    async def greet(request: web.Request) -> web.Response:
        return web.Response()

    async def start() -> int:
        application = web.Application()
        application.add_routes([web.post("/score", score), web.get("/score", greet)])
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=30)
        yield f"http://127.0.0.1:{port}/score"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)


def config(folder: Path, work: Work, *, steps: int, reward: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run that all modes share."""
    return {
        "run": {"name": "run", "dir": str(folder), "seed": 0},
        "policy": {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "dtype": "bfloat16"},
        "algorithm": {"name": "grpo", "correction": {"preset": "token_tis"}},
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "system_prompt": "Solve the problem step by step.",
            "shuffle": False,
            "max_prompt_tokens": 128,
        },
        "rollouts": {
            "prompts_per_step": work.prompts,
            "samples_per_prompt": work.samples,
            "max_new_tokens": MOST_TOKENS,
        },
        "rewards": {"quality": dict(reward)},
        "train": {
            "steps": steps,
            "lr": 1e-6,
            "sequences_per_update": work.prompts * work.samples,
            "max_tokens_per_microbatch": 2048,
            "checkpoint_every": steps,
        },
        "tracking": {"samples_per_step": work.prompts * work.samples},  # the prediction needs all lengths
    }


def measure(name: str, work: Work, folder: Path, *, reward: Mapping[str, Any]) -> Measured:
    """Run a mode in a new folder, and return the measurements of its counted steps."""
    folder.mkdir()
    rows = work.rows()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = WARM_UP + work.steps + MODES[name].get("rollouts.max_staleness", 0)
    tree = config(folder, work, steps=steps, reward=reward)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    keys = [f"{key}={json.dumps(value)}" for key, value in MODES[name].items()]
    command = [sys.executable, "-m", "rlhf.cli", "train", str(folder / "run.yaml"), "--quiet", *keys]
    subprocess.run(command, check=True, timeout=DEADLINE_S, cwd=ROOT)
    counted = [row for row in read_metrics(folder / "run") if WARM_UP < row["step"] <= WARM_UP + work.steps]
    seconds = sum(row["time/step_s"] for row in counted)
    return Measured(
        step_s=seconds / work.steps,
        tokens_per_s=sum(row["rollouts/tokens/total"] for row in counted) / seconds,
        scored_s=sum(row["time/rollouts_s"] for row in counted) / work.steps,
        waits=sum(row["time/trainer_waits_s"] for row in counted) / seconds,
        idle=sum(row["time/engines_idle/fraction"] * row["time/step_s"] for row in counted) / seconds,
        lag=sum(row["experience/policy_lag/mean"] for row in counted) / work.steps,
    )


def recorded_groups(folder: Path) -> tuple[RecordedGroup, ...]:
    """Return the groups of a run in order, from samples/. Groups are whole if tracking.samples_per_step allows."""
    groups = []
    for file in sorted((folder / "samples").glob("step_*.jsonl")):
        rows = [row for row in read_lines(file) if row["split"] == "train"]
        for _, samples in groupby(rows, key=lambda row: row["group_id"]):
            groups.append(RecordedGroup(lengths=tuple(row["response_tokens"] for row in samples)))
    return tuple(groups)


def measured_system(
    config: Config, rows: Sequence[Mapping[str, Any]], groups: Sequence[RecordedGroup], *, after: int
) -> System:
    """Return the system of a finished run in turns.

    The time of a batch's rollouts is fitted by base_s for each decoding step and each_s for each token. A token of a
    prompt takes each_s too, as for an engine bounded by arithmetic on a CPU.

    Args:
        rows: the run's metrics.
        groups: all groups of the run.
        after: number of first steps to leave out.
    """
    rollouts, engine = config.rollouts, config.cluster.roles.rollout
    assert rollouts is not None
    prompts, samples = rollouts.prompts_per_step, rollouts.samples_per_prompt
    if engine.workers > 1 or prompts * samples > engine.max_num_seqs:
        raise UserError("the rates of a run can be measured with one engine that decodes a whole batch at once")
    if any(len(group.lengths) != samples for group in groups):
        raise UserError(
            f"tracking.samples_per_step is {config.tracking.samples_per_step}, expected {prompts * samples}: the "
            "lengths of all responses are needed to measure the rates of a run"
        )
    steps = [row for row in rows if row["step"] > after]
    prompt_tokens = sum(row["rollouts/prompt_tokens/mean"] for row in steps) / len(steps)
    decoded = []
    for row in steps:
        batch = groups[(row["step"] - 1) * prompts : row["step"] * prompts]
        tokens = sum(sum(group.lengths) for group in batch) + prompts * prompt_tokens
        decoded.append((float(max(max(group.lengths) for group in batch)), tokens, row["time/rollouts_s"]))
    base_s, each_s = _fitted(decoded)
    sync_s = sum(row["time/weight_sync_s"] + row["time/probe_s"] for row in steps)
    trained_s = sum(row["time/step_s"] - row["time/rollouts_s"] for row in steps) - sync_s
    return System(
        lengths=Lengths(most=rollouts.max_response_tokens),
        recorded=tuple(groups),
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        prompt_tokens=prompt_tokens,
        engines=1,
        colocated=False,
        max_num_seqs=engine.max_num_seqs,
        base_s=base_s,
        each_s=each_s,
        train_tokens_per_s=sum(row["rollouts/tokens/total"] for row in steps) / trained_s,
        streamed_share=1.0 / derive(config).updates_per_step,
        sync_s=sync_s / len(steps),
        load_s=sync_s / len(steps) / 2,
        prefill_s=each_s,
        recomputes=rollouts.kv_after_update == "recompute",
    )


def _fitted(decoded: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the non-negative base_s and each_s fitted to (decoding steps, tokens, seconds) by least squares."""
    ss = sum(steps * steps for steps, _, _ in decoded)
    st = sum(steps * tokens for steps, tokens, _ in decoded)
    tt = sum(tokens * tokens for _, tokens, _ in decoded)
    sy = sum(steps * seconds for steps, _, seconds in decoded)
    ty = sum(tokens * seconds for _, tokens, seconds in decoded)
    determinant = ss * tt - st * st
    if determinant > 1e-9 * ss * tt:
        base_s, each_s = (sy * tt - ty * st) / determinant, (ty * ss - sy * st) / determinant
        if base_s >= 0.0 and each_s >= 0.0:
            return base_s, each_s
    alone = (0.0, ty / tt), (sy / ss, 0.0)
    return min(alone, key=lambda pair: sum((pair[0] * s + pair[1] * t - y) ** 2 for s, t, y in decoded))


def system_of(folder: Path, latencies: Sequence[float] = ()) -> System:
    """Return the system of a run in turns with one core each, for the simulation.

    Args:
        latencies: seconds that the service takes for each group. Empty: there is no service.
    """
    (run,) = load(folder / "run" / "config.resolved.yaml").runs.values()
    groups = recorded_groups(folder / "run")
    system = measured_system(run, read_metrics(folder / "run"), groups, after=1)
    if not latencies:
        return system
    slow = [replace(group, latency_s=latency) for group, latency in zip(groups, latencies, strict=False)]
    return replace(system, recorded=tuple(slow))


def predicted(name: str, work: Work, system: System) -> float:
    """Return the tokens per second of a mode by simulation."""
    keys = MODES[name]
    schedule = Schedule(
        max_staleness=keys.get("rollouts.max_staleness", 0),
        streamed="train.streamed" in keys,
        in_flight="rollouts.weight_updates" in keys,
        by_completion="rollouts.batch_order" in keys,
    )
    return simulate(system, schedule, steps=work.steps, seed=0, warm_up=WARM_UP).tokens_per_s


def print_table(reward: str, work: Work, measured: Mapping[str, Measured], *, sides: Measured, system: System) -> None:
    """Print the modes side by side.

    Args:
        sides: a run in turns with one core each, from which the bounds follow.
        system: the same run for the simulation.
    """
    turns = min((measured[name] for name in (TURNS_BOTH, TURNS_ONE) if name in measured), key=lambda one: one.step_s)
    trained_s = sides.step_s - sides.scored_s
    headings = ("mode", "tokens / s", "predicted", "against turns", "bound", "s / step", "training waits")
    table = Table(*headings, "engines idle", "lag", title=f"reward: {reward}", title_justify="left")
    table.columns[0].no_wrap = True
    for name, one in measured.items():
        longer = trained_s if name in (IN_FLIGHT, BY_COMPLETION) else max(sides.scored_s, trained_s)
        table.add_row(
            name,
            f"{one.tokens_per_s:.0f}",
            "" if name == TURNS_BOTH else f"{predicted(name, work, system):.0f}",
            f"{one.tokens_per_s / turns.tokens_per_s:.2f}",
            "" if name in (TURNS_BOTH, TURNS_ONE) else f"{turns.step_s / longer:.2f}",
            f"{one.step_s:.2f}",
            f"{one.waits:.0%}",
            f"{one.idle:.0%}",
            f"{one.lag:.1f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Run the modes with both rewards and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of each mode")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--median-tokens", type=int, default=64, help="median of the limits")
    parser.add_argument("--balance", action="store_true", help="only take turns with one core each")
    args = parser.parse_args()
    work = Work(steps=args.steps, prompts=args.prompts, samples=args.samples, median_tokens=args.median_tokens)
    modes = [TURNS_ONE] if args.balance else [name for name in MODES if name != BY_COMPLETION]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        by_rule = {name: measure(name, work, folder / name, reward=RULE) for name in modes}
        sides = by_rule[TURNS_ONE]
        print_table("a rule", work, by_rule, sides=sides, system=system_of(folder / TURNS_ONE))
        share = f"{sides.scored_s / sides.step_s:.0%}"
        Console(width=120).print(f"In turns with one core each, the rollouts take {share} of a step.")
        if args.balance:
            return
        faster = min((TURNS_BOTH, TURNS_ONE), key=lambda name: by_rule[name].step_s)
        with reward_service(sides.scored_s) as url:
            http = {"timeout_s": DEADLINE_S, "deadline_s": DEADLINE_S, "max_in_flight": 256}
            reward = {"url": url, "http": http}
            by_service = {
                name: measure(name, work, folder / f"{name}, service", reward=reward)
                for name in (faster, IN_FLIGHT, BY_COMPLETION)
            }
        system = system_of(folder / TURNS_ONE, [sides.scored_s * row["latency"] for row in work.rows()])
        print_table(f"a service, {sides.scored_s:.1f} s on average", work, by_service, sides=sides, system=system)


if __name__ == "__main__":
    main()
