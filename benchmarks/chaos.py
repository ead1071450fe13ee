"""Inject random faults into one small run, and compare it at the end with the same run without faults.

    python benchmarks/chaos.py --faults 20 --seed 0 --mode "in turns"

The seed draws who (the roles of tests/chaos), when (at the beginning of a stage) and how (SIGKILL or SIGSTOP). The next
fault comes when the run is back at work and has trained at least one more step. The run must finish, `rlhf doctor` must
prove its record, nothing of it may be left on the machine, and a mode that promises bits must end with the metrics and
weights of the run without faults.
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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.faults import VICTIMS, How, TimelineTail, inject, wait_until
from tests.chaos.survival import (
    IN_TURNS,
    MODES,
    Fault,
    Footprint,
    Outcome,
    contradictions,
    run_config,
    said,
    seconds_back,
    steps_done,
    wait_for_end,
)

BACK_WITHIN_S = 120.0
STEP_WITHIN_S = 240.0
STOPPED = 0.25  # share of the faults that stop a process instead of killing it
CAN_STOP = ("engine", "policy rank 0", "policy rank 1", "critic", "reference", "reward worker")
WHO = tuple(who for who in VICTIMS if who != "conversation")


def draw(mode: str, *, count: int, seed: int) -> list[Fault]:
    """Return the faults of a run."""
    moments, faults = random.Random(seed), []
    for _ in range(count):
        how: How = "stop" if moments.random() < STOPPED else "kill"
        who = moments.choice(CAN_STOP if how == "stop" else WHO)
        faults.append(Fault(mode=mode, who=who, when=moments.choice([*IN_TURNS][:-1]), how=how))
    return faults


def inject_all(
    folder: Path, faults: list[Fault], *, changes: dict[str, Any], console: Console
) -> tuple[list[Outcome], list[str]]:
    """Run to the end with all faults on the way. Return their outcomes, and what is wrong with the whole run."""
    config, run, footprint = run_config(folder, faults[0].mode, changes=changes), folder / "run", Footprint()
    is_supervised = any(VICTIMS[fault.who].is_supervised for fault in faults)
    process = footprint.start(config, *(["--supervise"] if is_supervised else []))
    tail, outcomes, bad = TimelineTail(run / "timeline.json"), [], []

    def is_over() -> bool:
        return process.poll() is not None

    with footprint.followed():
        try:
            for number, fault in enumerate(faults):
                done, span = steps_done(run), IN_TURNS[fault.when][0]
                if not wait_until(lambda done=done: steps_done(run) > done, is_over, limit_s=STEP_WITHIN_S):
                    bad.append(f"no step was trained before fault {number + 1}, {fault}")
                    break
                seen = tail.count(span)
                wait_until(lambda span=span, seen=seen: tail.count(span) > seen, is_over, limit_s=STEP_WITHIN_S)
                outcome = watch(run, tail, fault, is_over)
                outcomes.append(outcome)
                console.print(f"{number + 1} of {len(faults)}: {fault}, {outcome.contradictions or outcome.back_s}")
                if outcome.contradictions:
                    break
            code = wait_for_end(process, STEP_WITHIN_S + 10.0 * len(faults))
        finally:
            if not is_over():
                footprint.kill()
    bad += [] if code == 0 else [f"exit code {code}: {said(config)}"]
    return outcomes, bad + footprint.left()


def watch(run: Path, tail: TimelineTail, fault: Fault, is_over: Any) -> Outcome:
    """Inject a fault, and wait until the run is back at work."""
    victim = VICTIMS[fault.who]
    at = inject(run, victim, fault.how, is_over)
    if at is None:
        return Outcome(fault=fault, back_s=None, contradictions=["the fault was not injected"])
    if victim.recovers is None:
        return Outcome(fault=fault, back_s=None, contradictions=[])
    wait_until(lambda: seconds_back(tail, at, victim.recovers) is not None, is_over, limit_s=BACK_WITHIN_S)
    back_s = seconds_back(tail, at, victim.recovers)
    bad = [] if back_s is not None else [f"not back at work within {BACK_WITHIN_S:g} s"]
    return Outcome(fault=fault, back_s=back_s, contradictions=bad)


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
    parser.add_argument("--mode", choices=[mode for mode in MODES if mode != "conversations"], default="in turns")
    args = parser.parse_args()
    console, began = Console(highlight=False, markup=False), time.monotonic()
    often = {unit: args.faults + 1 for unit in ("engine", "gang", "worker")}
    changes = {"train": {"steps": 3 * args.faults + 4, "lr": 1e-5}, "cluster": {"restarts": often}}
    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    unbroken = None
    if MODES[args.mode].promise == "bits":
        config, footprint = run_config(folder / "unbroken", args.mode, changes=changes), Footprint()
        process = footprint.start(config)
        code = wait_for_end(process, STEP_WITHIN_S + 10.0 * args.faults)
        footprint.kill()
        if code != 0:
            raise SystemExit(said(config))
        unbroken = folder / "unbroken" / "run"
    faults = draw(args.mode, count=args.faults, seed=args.seed)
    outcomes, bad = inject_all(folder / "faults", faults, changes=changes, console=console)
    bad = bad or contradictions(folder / "faults" / "run", unbroken)
    console.print(table_of(outcomes))
    survived = sum(not outcome.contradictions for outcome in outcomes)
    console.print(f"{survived} of {args.faults} faults survived in {(time.monotonic() - began) / 60:.1f} minutes")
    if bad or survived < args.faults:
        console.print(f"The runs are in {folder}.", *bad[:10], sep="\n")
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
