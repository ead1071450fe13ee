"""Kill a small run at random moments, resume it until it is finished, and compare it with an unbroken run.

    python benchmarks/kill_resume.py --kills 10 --mode all --seed 0

Each kill is a SIGKILL to the driver alone, or to all processes of the run at once. The moment is a random time in the
start, or in a random step after the newest checkpoint. Every mode must end with a record that
`rlhf doctor RUN` proves. A mode that promises bits must also have the metrics and the final weights of the unbroken
run, and a mode that promises the groups must have trained the same groups in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 300.0  # for one start of a run
STARTS = 0.2  # share of the kills that come during a start
CLOCKS = ("time", "throughput/", "memory/", "system/")  # metrics that differ between two equal runs


@dataclass(frozen=True)
class Mode:
    """The keys of a mode, and the results that a resumed run shares with an unbroken run."""

    promise: Literal["bits", "groups", "each prompt once"]
    rollouts: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


MODES = {
    "in turns": Mode("bits"),
    "streamed": Mode("groups", {"dynamic_sampling": None}, {"streamed": True}),  # a filter may tip over by rounding
    "pipelined": Mode("bits", {"max_staleness": 2}),
    "in flight": Mode("each prompt once", {"max_staleness": 2, "weight_updates": "in_flight"}),
}


@dataclass(kw_only=True)
class Tally:
    """The outcome of a run that was killed."""

    kills: int = 0
    repeated: int = 0  # steps that were trained again
    seconds: float = 0.0


def write_config(folder: Path, name: str, mode: Mode, *, steps: int) -> Path:
    """Write the configuration of a run, and return its path."""
    tree = {
        "run": {"name": name, "dir": str(folder), "seed": 0},
        "policy": {"model": "tiny:llama", "dtype": "float32"},
        "algorithm": {"name": "grpo", "kl": {"coef": 0.05}, "correction": {"preset": "token_tis"}},
        "data": {
            "train": {"task": "running_totals", "split": "train", "size": 64},
            "apply_chat_template": False,
            "max_prompt_tokens": 16,
        },
        "rollouts": {
            "prompts_per_step": 8,
            "samples_per_prompt": 4,
            "max_new_tokens": 16,
            "dynamic_sampling": {"max_filtered_fraction": 8.0},
            **mode.rollouts,
        },
        "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
        "train": {
            "steps": steps,
            "lr": 1e-5,  # so small that the reward still separates responses in the last step
            "sequences_per_update": 16,
            "max_tokens_per_microbatch": 256,
            "checkpoint_every": 2,
            **mode.train,
        },
        "cluster": {"object_store_gib": 0.25},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def start(config: Path) -> subprocess.Popen[bytes]:
    """Start or resume a run. Its output goes to a file next to its configuration."""
    log = config.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "rlhf.cli", "train", str(config), "--resume", "auto", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], config: Path) -> None:
    """Wait until a run has ended. Exit with its output if it failed."""
    try:
        code = process.wait(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        kill(process, driver_only=False)
        raise
    if code != 0:
        raise SystemExit(f"{config.stem} ended with {code}:\n{config.with_suffix('.log').read_text()[-4000:]}")


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the whole lines of a file of a run."""
    path = run / name
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def last_step(run: Path) -> int:
    """Return the last step with a row."""
    return max((row["step"] for row in rows(run, "metrics.jsonl")), default=0)


def checkpoint_step(run: Path) -> int:
    """Return the step of the newest checkpoint."""
    link = run / "checkpoints" / "latest"
    return int(link.readlink().name.removeprefix("step_")) if link.is_symlink() else 0


def kill(process: subprocess.Popen[bytes], *, driver_only: bool) -> None:
    """Send SIGKILL to the driver, or to the driver and all that it has started. Return when all of them have ended."""
    driver = psutil.Process(process.pid)
    started = driver.children(recursive=True)
    for victim in [driver] if driver_only else [driver, *started]:
        _end(victim)
    process.wait(timeout=DEADLINE_S)
    _, left = psutil.wait_procs(started, timeout=10.0)  # without their driver they end by themselves
    for victim in left:
        _end(victim)
    psutil.wait_procs(left, timeout=30.0)


def _end(victim: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(signal.SIGKILL)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int, *, after: int) -> None:
    """Wait until a step has its row, or until the run has ended.

    after: the step of the checkpoint. A resumed run first removes the rows after it.
    """
    until = time.monotonic() + DEADLINE_S
    has_begun = False
    while process.poll() is None and not (has_begun and last_step(run) >= step):
        has_begun = has_begun or last_step(run) <= after
        if time.monotonic() > until:
            kill(process, driver_only=False)
            raise SystemExit(f"{run} did not reach step {step} within {DEADLINE_S:g} s")
        time.sleep(0.02)


def kill_and_resume(
    config: Path, run: Path, *, kills: int, steps: int, start_s: float, step_s: float, seed: int
) -> Tally:
    """Run to the end, with a number of kills on the way."""
    moments, tally, began = random.Random(seed), Tally(), time.monotonic()
    while tally.kills < kills:
        from_step = checkpoint_step(run)
        process = start(config)
        if moments.random() < STARTS:
            time.sleep(moments.uniform(0.0, start_s))
        else:
            wait_for_step(process, run, min(from_step + moments.randint(1, 2), steps - 2), after=from_step)
            time.sleep(moments.uniform(0.0, step_s))
        if process.poll() is not None:  # the run was finished before the kill
            finish(process, config)
            break
        kill(process, driver_only=moments.random() < 0.5)
        tally.kills += 1
        tally.repeated += max(0, last_step(run) - checkpoint_step(run))
    finish(start(config), config)
    tally.seconds = time.monotonic() - began
    return tally


def contradictions(run: Path, unbroken: Path, mode: Mode) -> list[str]:
    """Return the results that contradict the promise of the mode. An empty list: there are none."""
    command = [sys.executable, "-m", "rlhf.cli", "doctor", str(run)]
    doctor = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [] if doctor.returncode == 0 else ["the record: " + doctor.stdout + doctor.stderr]
    if last_step(run) != last_step(unbroken):
        found.append("the number of steps")
    if mode.promise != "each prompt once" and rows(run, "groups.jsonl") != rows(unbroken, "groups.jsonl"):
        found.append("the groups of a step")
    if mode.promise == "bits":
        for row, other in zip(rows(run, "metrics.jsonl"), rows(unbroken, "metrics.jsonl"), strict=False):
            keys = [key for key in {**row, **other} if not key.startswith(CLOCKS) and row.get(key) != other.get(key)]
            found += [f"step {row['step']}: {key}" for key in keys]
        weights = [(path / "final" / "model.safetensors").read_bytes() for path in (run, unbroken)]
        found += [] if weights[0] == weights[1] else ["the final weights"]
    return found


def try_mode(name: str, folder: Path, *, kills: int, seed: int) -> tuple[Tally, list[str]]:
    """Run a mode without and with kills. Return the tally of the kills, and the contradictions."""
    mode, steps = MODES[name], 2 * kills + 4
    config = write_config(folder, "unbroken", mode, steps=steps)
    finish(start(config), config)
    times = [row["time_s"] for row in rows(folder / "unbroken", "metrics.jsonl")]
    config = write_config(folder, "killed", mode, steps=steps)
    tally = kill_and_resume(
        config,
        folder / "killed",
        kills=kills,
        steps=steps,
        start_s=times[0],
        step_s=(times[-1] - times[0]) / (len(times) - 1),
        seed=seed,
    )
    return tally, contradictions(folder / "killed", folder / "unbroken", mode)


def main() -> None:
    """Run the chosen modes, print the table, and exit with 1 if one of them broke its promise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--mode", choices=["all", *MODES], default="all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = Table("mode", "kills", "steps trained again", "minutes", "promise", "kept")
    console, is_broken = Console(), False
    for name in MODES if args.mode == "all" else [args.mode]:
        folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
        tally, found = try_mode(name, folder, kills=args.kills, seed=args.seed)
        cells = (str(tally.kills), str(tally.repeated), f"{tally.seconds / 60:.1f}", MODES[name].promise)
        table.add_row(name, *cells, "no" if found else "yes")
        console.print(f"{name}: {tally.kills} kills, {len(found)} contradictions", highlight=False)
        if found:
            is_broken = True
            console.print(f"The runs are in {folder}.", *found[:10], sep="\n", highlight=False, markup=False)
        else:
            shutil.rmtree(folder)
    console.print(table)
    raise SystemExit(int(is_broken))


if __name__ == "__main__":
    main()
