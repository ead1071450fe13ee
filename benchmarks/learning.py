"""What old responses cost: GRPO on a tiny task in turns, pipelined and in flight, with equal samples and three seeds.

    python benchmarks/learning.py

The task is running totals, as in `rlhf quickstart --algorithm grpo`. All runs begin with the same warm start, whose
model is right about half of the time. Runs with the same seed request the same prompts in the same
order. All modes but turns correct with `token_tis`. Accuracy is the held-out share of right greedy answers after the
same number of trained samples. Wall time is that of the steps, without evaluations and checkpoints, and each side has
one core.

The plot has the mean over the seeds: accuracy against samples on the left, against wall time on the right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from rlhf.tracking.display.plots import COLORS

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "quickstart_grpo.yaml"
ACCURACY = "eval/heldout/score"
DEADLINE_S = 900.0
MODES: dict[str, Mapping[str, Any]] = {
    "in turns": {"max_staleness": 0},
    **{f"pipelined, {ahead} ahead": {"max_staleness": ahead} for ahead in (1, 2, 4)},
    **{f"in flight, {ahead} ahead": {"max_staleness": ahead, "weight_updates": "in_flight"} for ahead in (1, 2, 4)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The held-out accuracy of a run at each evaluation. The first evaluation is before the first step."""

    samples: tuple[int, ...]
    seconds: tuple[float, ...]
    accuracies: tuple[float, ...]


def sections(stage: str) -> dict[str, Any]:
    """Return a stage of the recipe as a run of its own."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    tree: dict[str, Any] = recipe.pop("stages")[stage]
    data = recipe["data"] | tree["data"]
    return recipe | tree | {"data": data}


def train(tree: dict[str, Any], folder: Path) -> None:
    """Train a run in a process of its own."""
    folder.mkdir()
    tree["run"] = tree["run"] | {"name": "run", "dir": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf.cli", "train", str(folder / "run.yaml"), "--quiet"]
    subprocess.run(command, check=True, timeout=DEADLINE_S, cwd=ROOT)


def curve(name: str, seed: int, *, start: Path, folder: Path, steps: int, every: int) -> Curve:
    """Run a mode with a seed, and return its curve."""
    tree = sections("grpo")
    tree["run"] = {"seed": seed}
    tree["policy"] = tree["policy"] | {"model": str(start)}
    tree["rollouts"] = tree["rollouts"] | MODES[name]
    if MODES[name]["max_staleness"]:
        tree["algorithm"] = tree["algorithm"] | {"correction": {"preset": "token_tis"}}
    tree["train"] = tree["train"] | {"steps": steps, "checkpoint_every": steps}
    tree["eval"] = {"every": every}
    tree["cluster"] = {"roles": {"policy": {"threads": 1}, "rollout": {"threads": 1}, "reference": {"threads": 1}}}
    train(tree, folder)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    batch = tree["rollouts"]["prompts_per_step"] * tree["rollouts"]["samples_per_prompt"]
    seconds = accumulate(row.get("time/step_s", 0.0) if row["step"] else 0.0 for row in rows)
    points = [(row, elapsed) for row, elapsed in zip(rows, seconds, strict=True) if row.get(ACCURACY) is not None]
    return Curve(
        samples=tuple(row["step"] * batch for row, _ in points),
        seconds=tuple(elapsed for _, elapsed in points),
        accuracies=tuple(row[ACCURACY] for row, _ in points),
    )


def draw(curves: Mapping[str, Sequence[Curve]], output: Path) -> None:
    """Draw the mean curves of the modes against samples and against wall time."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for color, (name, runs) in zip(COLORS, curves.items(), strict=False):
        accuracies = [fmean(values) for values in zip(*(run.accuracies for run in runs), strict=True)]
        seconds = [fmean(values) for values in zip(*(run.seconds for run in runs), strict=True)]
        style: dict[str, Any] = {"color": color, "linewidth": 1.6, "marker": "o", "markersize": 3, "label": name}
        style["linestyle"] = "--" if "weight_updates" in MODES[name] else "-"
        left.plot(runs[0].samples, accuracies, **style)
        right.plot(seconds, accuracies, **style)
    left.set_xlabel("trained samples", fontsize=9)
    right.set_xlabel("seconds of training", fontsize=9)
    left.set_title("held-out accuracy, mean of the seeds", fontsize=10, loc="left")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=144)


def print_table(curves: Mapping[str, Sequence[Curve]], seeds: Sequence[int]) -> None:
    """Print the final accuracy of each mode and seed, and the mean's difference from turns."""
    table = Table("mode", *(f"seed {seed}" for seed in seeds), "mean", "against turns", "seconds")
    finals = {name: [run.accuracies[-1] for run in runs] for name, runs in curves.items()}
    turns = fmean(next(iter(finals.values())))
    for name, values in finals.items():
        cells = [f"{value:.3f}" for value in values]
        seconds = fmean(run.seconds[-1] for run in curves[name])
        table.add_row(name, *cells, f"{fmean(values):.3f}", f"{fmean(values) - turns:+.3f}", f"{seconds:.1f}")
    Console(width=120).print(table)


def main() -> None:
    """Train all modes with all seeds, print the table, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--at-once", type=int, default=1, help="runs at once; wall times need 1")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "asynchrony_learning.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        warm_start = sections("sft")
        del warm_start["data"]["max_prompt_tokens"]  # only for stages that sample
        train(warm_start, folder / "sft")
        start = folder / "sft" / "run" / "final"

        def measure(name: str, seed: int) -> Curve:
            place = folder / f"{name}-{seed}".replace(" ", "")
            return curve(name, seed, start=start, folder=place, steps=args.steps, every=args.every)

        with ThreadPoolExecutor(max_workers=args.at_once) as pool:
            runs = {name: [pool.submit(measure, name, seed) for seed in args.seeds] for name in args.modes}
            curves = {name: [run.result() for run in of_mode] for name, of_mode in runs.items()}
    print_table(curves, args.seeds)
    draw(curves, args.output)


if __name__ == "__main__":
    main()
