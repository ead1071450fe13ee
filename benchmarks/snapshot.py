"""Measure the cost of a snapshot of a rank: steps of the DeepSpeed engine without, with, and with a copied snapshot.

    python benchmarks/snapshot.py

One rank trains SmolLM2-135M-Instruct in float32 on 16 sequences of 128 tokens: forward, backward and AdamW, all cores.
The three kinds of steps alternate in one run, in a rotating order. A ratio is the median over the rounds. A step with a
snapshot begins with `take_snapshot`: the state is copied during the passes, and the step waits for the copy before the
weights change. A step with a copy also sends the snapshot over loopback to a process that stands for another node, and
waits for the end of the transfer. Unlike another node, that process uses the same cores. The snapshot is also timed
alone. All snapshots are in /dev/shm.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlhf.engine.snapshot_copies import CopyHolder, CopyPlace

DEADLINE_S = 600.0
KINDS = ("neither", "snapshot", "snapshot and copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of each sequence")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences of each micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir():
        sys.exit(f"{arguments.model} is no folder: `rlhf models fetch smollm2` makes one")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that the folder is removed
    folder = Path(tempfile.mkdtemp(prefix="snapshot-", dir="/dev/shm"))
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    holder = spawning.Process(target=hold, args=(folder / "copies", there), daemon=True)
    holder.start()
    try:
        measure(arguments, folder / "snapshots", here.recv())
    finally:
        holder.kill()
        holder.join()
        shutil.rmtree(folder)


def hold(folder: Path, place: Connection) -> None:
    """Hold copies of snapshots, and report the address."""
    place.send(CopyHolder(folder, "127.0.0.1").place("policy-0"))
    signal.pause()


def measure(arguments: argparse.Namespace, folder: Path, place: CopyPlace) -> None:
    from rlhf.engine.deepspeed import DeepSpeedEngine
    from rlhf.engine.distributed import RankContext, init_distributed
    from rlhf.engine.training_engine import OptimizerSettings, ScheduleSettings
    from rlhf.models.files.loading import load_causal_lm
    from rlhf.models.packed.forward import supervised_loss

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=DEADLINE_S
    )
    init_distributed(context, "127.0.0.1", port)
    dtype = getattr(torch, arguments.dtype)
    engine = DeepSpeedEngine(
        load_causal_lm(arguments.model, dtype=dtype),
        optimizer=OptimizerSettings(lr=1e-6),
        schedule=ScheduleSettings(kind="constant", warmup_steps=0, total_steps=100),
        zero_stage=arguments.zero_stage,
        dtype=dtype,
        device=torch.device("cpu"),
        deadline_s=DEADLINE_S,
    )
    lengths = torch.full((arguments.microbatch,), arguments.length)
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = False
    token_ids = torch.randint(100, 40_000, mask.shape)
    microbatches = arguments.sequences // arguments.microbatch
    weight = 1.0 / (microbatches * int(mask.sum()))

    def step(number: int, kind: str) -> float:
        engine.send_snapshots_to(place if kind == "snapshot and copy" else None)
        engine.newest_snapshot()  # the copy of the last snapshot is not measured
        start = time.perf_counter()
        if kind != "neither":
            engine.take_snapshot(number)
        for index in range(microbatches):
            loss, *_ = engine.forward(supervised_loss, token_ids, lengths, mask=mask, token_weight=weight)
            engine.backward(loss, last=index == microbatches - 1)
        engine.step()
        if kind != "neither":
            engine.newest_snapshot()
        return time.perf_counter() - start

    start = time.perf_counter()
    engine.open_snapshots(folder)
    reserved = time.perf_counter() - start
    alone = []
    for number in range(4):  # the first two snapshots touch both slots
        start = time.perf_counter()
        engine.take_snapshot(number)
        called = time.perf_counter() - start
        engine.newest_snapshot()
        alone.append(time.perf_counter() - start)
    sent = []
    for number in (4, 5):
        start = time.perf_counter()
        engine.send_snapshots_to(place)
        engine.newest_snapshot()
        sent.append(time.perf_counter() - start)
        engine.send_snapshots_to(None)
        engine.take_snapshot(number)
        engine.newest_snapshot()
    step(6, "neither")  # the first round warms up
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(arguments.rounds):
        for index in range(len(KINDS)):
            kind = KINDS[(turn + index) % len(KINDS)]
            seconds[kind].append(step(7 + turn * len(KINDS) + index, kind))
    nbytes = sum(path.stat().st_size for path in folder.glob("slot_*"))
    table = Table("what", "value")
    table.add_row("bytes of both slots", f"{nbytes / 2**20:,.0f} MiB")
    table.add_row("reserved before training", f"{reserved:.2f} s")
    table.add_row("snapshot alone: first, last", f"{alone[0]:.2f} s, {alone[-1]:.2f} s")
    table.add_row("take_snapshot returns after", f"{1000 * called:.1f} ms")
    table.add_row("copy to the holder alone: first, second", f"{sent[0]:.2f} s, {sent[1]:.2f} s")
    for kind in KINDS:
        table.add_row(f"step with {kind}", f"{statistics.median(seconds[kind]):.2f} s")
    for kind in KINDS[1:]:
        ratios = [one / other for one, other in zip(seconds[kind], seconds["neither"], strict=True)]
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        table.add_row(f"ratio of {kind}, median (all)", f"{statistics.median(ratios):.3f} ({shown})")
    Console().print(table)


if __name__ == "__main__":
    main()
