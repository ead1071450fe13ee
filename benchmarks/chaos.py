"""Inject random faults into one small run, and compare it at the end with the same run without faults.

    python benchmarks/chaos.py --faults 20 --seed 0 --mode "in turns"
    python benchmarks/chaos.py --faults 12 --model models/SmolLM2-135M-Instruct --who engine --who "policy rank 0"

The seed draws cells of the matrix in tests/chaos: who, when and how (SIGKILL or SIGSTOP). The next fault comes when the
run is back at work and has trained at least one more step. The run must finish and leave nothing on the machine, and
`rlhf doctor` must prove the record. In turns, metrics and weights must equal those of a run without faults.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.faults import VICTIMS, Fault
from tests.chaos.survival import MODES, Outcome, survive, train_unbroken, with_model
from tests.chaos.test_chaos import all_runs

STEPS_PER_FAULT = 4


def draw(mode: str, *, count: int, seed: int, who: Sequence[str]) -> list[Fault]:
    """Return the faults of a run: the cells of the matrix in random order, again and again.

    A round has one cell with each victim that ends the driver, since its successor takes as long as a start of the run.

    Args:
        who: the victims. Empty: all.
    """
    chance, faults = random.Random(seed), list[Fault]()
    known = {fault for run in all_runs() for fault in run.faults if fault.mode == mode}
    drawn = [fault for fault in known if fault.when != "export" and fault.how != "memory"]
    cells = sorted((fault for fault in drawn if fault.who in (who or VICTIMS)), key=str)
    if not cells:
        sys.exit(f"--who: no run {mode} has this victim. Use one of: {', '.join(sorted({one.who for one in drawn}))}.")
    endings = [who for who in VICTIMS if VICTIMS[who].ends_driver and any(fault.who == who for fault in cells)]
    while len(faults) < count:
        round_ = [fault for fault in cells if fault.who not in endings]
        round_ += [chance.choice([fault for fault in cells if fault.who == who]) for who in endings]
        chance.shuffle(round_)
        faults += round_
    return faults[:count]


def table_of(outcomes: list[Outcome]) -> Table:
    """Return the table of the outcomes: who and how, the number survived, and the median time until back at work."""
    cells: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.fault.who, outcome.fault.how].append(outcome)
    table = Table("who", "how", "faults", "survived", "median back at work (s)")
    for (who, how), alike in sorted(cells.items()):
        times = [outcome.back_s for outcome in alike if outcome.back_s is not None]
        median = f"{statistics.median(times):.1f}" if times else "-"
        survived = sum(not outcome.contradictions for outcome in alike)
        table.add_row(who, how, str(len(alike)), str(survived), median)
    return table


def main() -> None:
    """Run with and without faults, print the table, and exit with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["in turns", "in flight"], default="in turns")
    parser.add_argument("--who", action="append", choices=VICTIMS, default=[], help="a victim; by default all are")
    parser.add_argument("--model", help="model folder, in place of the tiny model")
    args = parser.parse_args()
    console, began, known = Console(highlight=False, markup=False), time.monotonic(), list[Outcome]()
    steps, changes = STEPS_PER_FAULT * (args.faults + 2), {} if args.model is None else with_model(args.model)
    folder, unbroken = Path(tempfile.mkdtemp(prefix="chaos_")), None
    if MODES[args.mode].promise == "bits":
        unbroken = train_unbroken(folder / "unbroken", args.mode, steps=steps, changes=changes)

    def tell(outcome: Outcome) -> None:
        known.append(outcome)
        back = "survived" if outcome.back_s is None else f"back after {outcome.back_s:.1f} s"
        result = "; ".join(outcome.contradictions) or back
        console.print(f"{len(known)} of {args.faults}, {time.monotonic() - began:.0f} s: {outcome.fault}: {result}")

    faults = draw(args.mode, count=args.faults, seed=args.seed, who=args.who)
    outcomes = survive(folder / "faults", faults, unbroken, steps=steps, changes=changes, told=tell)
    console.print(table_of(outcomes))
    survived = sum(not outcome.contradictions for outcome in outcomes)
    console.print(f"{survived} of {args.faults} faults survived in {(time.monotonic() - began) / 60:.1f} minutes")
    if survived < args.faults:
        console.print(f"The runs are in {folder}.", *outcomes[-1].contradictions, sep="\n")
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
