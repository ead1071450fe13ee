"""Measure the cost of restarts: compare steps of whole runs that can restart lost processes with runs that cannot.

    python benchmarks/supervision.py
    python benchmarks/supervision.py --model models/SmolLM2-135M-Instruct --steps 12 --rounds 2

Both kinds are the PPO run of tests/chaos in turns: two policy ranks, a critic, a reference, a reward worker and an
engine. With `cluster.restarts` at 0 the ranks take no snapshots, and heartbeats are as rare as the configuration
permits. The kinds alternate, and each round begins with the other kind. A ratio compares median steps of a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.survival import train_unbroken, with_model
from tests.integration.recipes import merge, rows

FIRST = 3  # steps that are not measured
KINDS: Mapping[str, Mapping[str, Any]] = {
    "with": {},
    "without": {"cluster": {"restarts": {"engine": 0, "gang": 0, "worker": 0}, "heartbeat_timeout_s": 1e6}},
}


def main() -> None:
    """Run both kinds in each round, and print their steps and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder, in place of the tiny model")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    common = merge({} if args.model is None else with_model(args.model), {"train": {"checkpoint_every": args.steps}})
    medians: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds):
        for kind in sorted(KINDS, reverse=turn % 2 == 1):
            with tempfile.TemporaryDirectory() as folder:
                changes = merge(merge(common, {"eval": {"every": args.steps}}), KINDS[kind])
                run = train_unbroken(Path(folder), "in turns", steps=args.steps, changes=changes)
                times = [row["time/step_s"] for row in rows(run) if "time/step_s" in row]
            medians[kind].append(statistics.median(times[FIRST:-1]))  # the last step has an evaluation and a checkpoint
    table = Table("round", *KINDS, "ratio")
    ratios = [one / other for one, other in zip(medians["with"], medians["without"], strict=True)]
    for turn, ratio in enumerate(ratios):
        table.add_row(str(turn + 1), *(f"{medians[kind][turn]:.3f} s" for kind in KINDS), f"{ratio:.3f}")
    console = Console()
    console.print(table)
    console.print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
