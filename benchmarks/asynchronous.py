"""GRPO on SmolLM2-135M in turns and with rollouts ahead of training: same prompts, batches and lengths, one machine.

    python benchmarks/asynchronous.py --steps 6

Each mode runs alone. "one core each" gives the engine a core and the trainer a core. "both cores each" lets each side
use the whole machine in its turn, which is the fastest way to take turns. A step is everything from one step's end to
the next. The first two steps of each mode are a warm-up and not counted. The last two are not counted either: engines
ahead of training have nothing left to sample in them. Tokens are the prompt and response tokens of the counted steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = RUN_OUT = 2
DEADLINE_S = 1800.0
MODES: dict[str, tuple[int, int]] = {  # threads of each side, max_staleness
    "in turns, both cores each": (2, 0),
    "in turns, one core each": (1, 0),
    "pipelined, 1 ahead, one core each": (1, 1),
    "pipelined, 2 ahead, one core each": (1, 2),
}


def config(folder: Path, *, steps: int, threads: int, max_staleness: int, new_tokens: int) -> dict[str, Any]:
    """The run of a mode."""
    return {
        "run": {"name": "run", "dir": str(folder), "seed": 0},
        "policy": {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "dtype": "bfloat16"},
        "algorithm": {"name": "grpo", "correction": {"preset": "token_tis"}},
        "data": {"train": {"task": "reasoning_gym/gcd", "split": "train", "size": 256}, "max_prompt_tokens": 256},
        "rollouts": {
            "prompts_per_step": 4,
            "samples_per_prompt": 8,
            "max_new_tokens": new_tokens,
            "max_staleness": max_staleness,
        },
        "rewards": {"number": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
        "train": {"steps": steps, "lr": 1e-6, "sequences_per_update": 32, "max_tokens_per_microbatch": 2048},
        "cluster": {"roles": {"policy": {"threads": threads}, "rollout": {"threads": threads}}},
    }


def measure(name: str, *, steps: int, new_tokens: int) -> list[dict[str, Any]]:
    """Run a mode, and return the rows of its counted steps."""
    threads, max_staleness = MODES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tree = config(folder, steps=steps, threads=threads, max_staleness=max_staleness, new_tokens=new_tokens)
        (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        command = [sys.executable, "-m", "rlhf.cli", "train", str(folder / "run.yaml"), "--quiet"]
        subprocess.run(command, check=True, timeout=DEADLINE_S, cwd=ROOT)
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if WARM_UP < row["step"] <= steps - RUN_OUT]


def main() -> None:
    """Run all modes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()
    table = Table("mode", "tokens / s", "against turns", "s / step", "training waits", "engines idle", "lag")
    rows = {name: measure(name, steps=args.steps, new_tokens=args.new_tokens) for name in MODES}
    speeds = {name: _sum(found, "rollouts/tokens/total") / _sum(found, "time/step_s") for name, found in rows.items()}
    turns = max(speed for name, speed in speeds.items() if MODES[name][1] == 0)
    for name, found in rows.items():
        seconds = _sum(found, "time/step_s")
        idle = sum(row["time/engines_idle/fraction"] for row in found) / len(found)
        cells = (f"{speeds[name]:.0f}", f"{speeds[name] / turns:.2f}", f"{seconds / len(found):.2f}")
        waits = f"{_sum(found, 'time/trainer_waits_s') / seconds:.0%}"
        table.add_row(name, *cells, waits, f"{idle:.0%}", f"{found[0]['experience/policy_lag/mean']:.1f}")
    Console(width=120).print(table)


def _sum(found: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in found)


if __name__ == "__main__":
    main()
