"""What tracking costs a step: metrics, samples, histograms, W&B offline, TensorBoard and Prometheus, against its time.

    python benchmarks/tracking.py

First each back end alone, and then all together, get steps like those of a run of SmolLM2 here, at the run's pace:
80 metrics, three histograms, 16 samples of 128 tokens. `held` is the time for which the loop waits. `CPU` is the
processor time of other threads of the process and of W&B's service. Then two real runs with every back end measure the
time of a step. The ratio counts `held` and `CPU`, as if no thread ran in parallel to the loop.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from rich.console import Console
from rich.table import Table

from actors.cluster.prometheus import PrometheusBackend
from rlhf.tracking.metrics.declarations import METRICS, PLACEHOLDERS
from rlhf.tracking.metrics.histograms import ADVANTAGE_EDGES, RATIO_EDGES, TOKEN_EDGES
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.run_folder.samples import SampleRecord, SampleTokens, samples_path, write_samples
from rlhf.tracking.sinks.backends import TrackerBackend
from rlhf.tracking.sinks.tensorboard_backend import open_tensorboard
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.tracking.sinks.wandb_backend import open_wandb

ROOT = Path(__file__).resolve().parents[1]
STEPS, PACE_S = 40, 0.25
SAMPLES, TOKENS = 16, 128
SETTLE_S = 2.0
DEADLINE_S = 900.0
EVERYTHING = ("tracking={wandb: offline, tensorboard: true}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of tracking one step, in seconds."""

    what: str
    held: float  # median
    held_most: float
    cpu: float  # processor time of other threads, and of W&B's service

    @property
    def total(self) -> float:
        return self.held + self.cpu


def row(step: int) -> dict[str, float]:
    """Return a value for every declared metric, with placeholders filled in."""
    filled = {"name": "correct", "set": "heldout", "metric": "score", "role": "policy", "stage": "update", "node": "n"}
    filled |= {"lag": "1", "reason": "other_tools"}
    assert filled.keys() == PLACEHOLDERS.keys()
    keys = [metric.name for metric in METRICS.values() if metric.reduction is not Histogram]
    for word, value in filled.items():
        keys = [key.replace(f"<{word}>", value) for key in keys]
    return {key: 0.5 + 0.001 * step for key in keys}


def histograms() -> dict[str, Histogram]:
    """Return the three histograms of a step."""
    values = [0.01 * number - 2.0 for number in range(400)]
    return {
        "advantages/histogram": Histogram.of(values, edges=ADVANTAGE_EDGES),
        "update/ratio/histogram": Histogram.of([abs(value) for value in values], edges=RATIO_EDGES),
        "rollouts/response_tokens/histogram": Histogram.of([float(n) for n in range(400)], edges=TOKEN_EDGES),
    }


def samples() -> list[SampleRecord]:
    """Return the samples of a step."""
    column = tuple(-0.123456789 * (1 + place % 7) for place in range(TOKENS))
    return [
        SampleRecord(
            split="train",
            group_id=number // 8,
            prompt_id=number // 8,
            sample=number % 8,
            prompt="What is the greatest common divisor of 12 and 18? " * 4,
            response="word " * TOKENS,
            score=0.5,
            scores={"correct": 0.5},
            advantage=0.1,
            truncated=False,
            response_tokens=TOKENS,
            min_version=1,
            max_version=1,
            mean_rollout_logprob=-0.5,
            mean_old_logprob=-0.5,
            mean_ref_logprob=-0.6,
            tokens=SampleTokens(
                texts=("word ",) * TOKENS,
                ids=tuple(range(TOKENS)),
                sampled=(True,) * TOKENS,
                rollout_logprobs=column,
                old_logprobs=column,
                ref_logprobs=column,
                teacher_logprobs=None,
                advantages=column,
            ),
        )
        for number in range(SAMPLES)
    ]


def cpu_s() -> float:
    """Return the CPU seconds so far of this process's other threads and of W&B's service, a child process."""
    own = psutil.Process()
    family = [own, *(child for child in own.children(recursive=True) if "wandb" in child.name())]
    return sum(sum(process.cpu_times()[:2]) for process in family) - time.thread_time()


def measure(what: str, folder: Path, open_backends: Callable[[Path], list[TrackerBackend]]) -> Cost:
    """Log steps at a pace. The first ones, in which libraries are imported, are not counted."""
    folder.mkdir()
    tracker = Tracker(folder, backends=open_backends(folder))
    found, shown, held = histograms(), samples(), []
    warm = STEPS // 4
    began = 0.0
    for step in range(1, warm + STEPS + 1):
        if step == warm + 1:
            time.sleep(SETTLE_S)
            began = cpu_s()
        start = time.perf_counter()
        write_samples(samples_path(folder, step), shown)
        tracker.log(step, row(step), found)
        held.append(time.perf_counter() - start)
        time.sleep(PACE_S)
    time.sleep(SETTLE_S)
    used = cpu_s() - began
    tracker.close()
    counted = held[warm:]
    return Cost(what=what, held=statistics.median(counted), held_most=max(counted), cpu=used / STEPS)


def costs(folder: Path) -> list[Cost]:
    """Measure the run folder alone, each back end alone, and all together."""
    made: dict[str, Callable[[Path], TrackerBackend]] = {
        "Prometheus": lambda at: PrometheusBackend(at.name),
        "TensorBoard": lambda at: open_tensorboard(at, done_steps=None),
        "W&B offline": lambda at: open_wandb(at, mode="offline", project="p", name=at.name, config={}),
    }
    found = [measure("run folder alone", folder / "alone", lambda at: [])]
    for number, (what, make) in enumerate(made.items()):
        found.append(measure(f"and {what}", folder / str(number), lambda at, make=make: [make(at)]))
    return [*found, measure("and all three", folder / "all", lambda at: [make(at) for make in made.values()])]


def step_s(config: str, name: str, folder: Path, *settings: str) -> float:
    """Return the mean time of the last steps of a real run with every back end."""
    command = [sys.executable, "-m", "rlhf.cli", "train", str(ROOT / "configs" / config), "--quiet"]
    command += [f"run.dir={folder}", f"run.name={name}", *EVERYTHING, *settings]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=DEADLINE_S, env=environment)
    if done.returncode:
        raise SystemExit("\n".join((folder / f"{name}.log").read_text().splitlines()[-12:]))
    metrics = max(folder.glob(f"{name}/**/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.mean(one["time/step_s"] for one in rows if one["step"] > 1)


def main() -> None:
    """Measure the back ends, make the real runs, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    args = parser.parse_args()
    console = Console(width=110)
    logging.getLogger("rlhf").setLevel(logging.ERROR)  # warnings about these made-up metrics do not matter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        found = costs(folder)
        ray.shutdown()
        steps = {
            "tiny model, GRPO": step_s(
                *("recipe:quickstart_grpo", "tiny", folder),
                *("stages.sft.train.steps=40", "stages.grpo.train.steps=5", "stages.grpo.train.warmup_steps=1"),
                "stages.grpo.data.eval=null",
            )
        }
        if (args.model / "config.json").exists():
            steps["SmolLM2-135M, GRPO"] = step_s(
                *("recipe:grpo_smollm2", "smollm2", folder, f"policy.model={args.model}", "data.eval=null"),
                *("rollouts.prompts_per_step=4", "rollouts.samples_per_prompt=8", "rollouts.max_new_tokens=96"),
                *("train.sequences_per_update=32", "train.steps=3"),
            )
    table = Table("what", "held ms, median", "held ms, most", "CPU ms", *(f"of a step: {what}" for what in steps))
    for cost in found:
        shares = [f"{100 * cost.total / seconds:.2f} %" for seconds in steps.values()]
        times = [f"{1000 * value:.1f}" for value in (cost.held, cost.held_most, cost.cpu)]
        table.add_row(cost.what, *times, *shares)
    console.print(table)
    console.print(", ".join(f"{what}: {seconds:.2f} s a step" for what, seconds in steps.items()))


if __name__ == "__main__":
    main()
