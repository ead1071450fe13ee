"""What the snapshot of a rank costs: steps of the DeepSpeed engine with and without one, alternating in one run.

    python benchmarks/snapshot.py

One rank trains SmolLM2-135M-Instruct in float32: forward, backward and AdamW, all cores. Every other step begins with
`keep`, so the copy is made during its passes, and the step waits for it before the weights change. The order of each
pair alternates, and the ratio is the median over the pairs. The copy is also timed alone, without passes beside it. The
snapshots are in /dev/shm.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

DEADLINE_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of each sequence")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences of each micro-batch")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir():
        sys.exit(f"{arguments.model} is no folder: `make smollm2` makes one")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that the folder is removed
    folder = Path(tempfile.mkdtemp(prefix="snapshot-", dir="/dev/shm"))
    try:
        measure(arguments, folder)
    finally:
        shutil.rmtree(folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    from rlhf.engine.base import OptimizerSettings, ScheduleSettings
    from rlhf.engine.deepspeed import DeepSpeedEngine
    from rlhf.engine.distributed import RankContext, init_distributed
    from rlhf.models.loading import load_causal_lm
    from rlhf.models.packed import supervised_loss

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=DEADLINE_S
    )
    init_distributed(place, "127.0.0.1", port)
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

    def step(number: int, *, keeps: bool) -> float:
        start = time.perf_counter()
        if keeps:
            engine.keep(number)
        for index in range(microbatches):
            loss, *_ = engine.forward(supervised_loss, token_ids, lengths, mask=mask, token_weight=weight)
            engine.backward(loss, last=index == microbatches - 1)
        engine.step()
        return time.perf_counter() - start

    start = time.perf_counter()
    engine.keep_in(folder)
    reserved = time.perf_counter() - start
    alone = []
    for number in range(4):  # both slots are touched by the first two
        start = time.perf_counter()
        engine.keep(number)
        called = time.perf_counter() - start
        engine.kept()
        alone.append(time.perf_counter() - start)
    step(4, keeps=False)  # warms up
    with_copy, without = [], []
    for pair in range(arguments.pairs):
        for keeps in (True, False) if pair % 2 == 0 else (False, True):
            (with_copy if keeps else without).append(step(5 + pair, keeps=keeps))
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    table = Table("what", "value")
    table.add_row("bytes of both slots", f"{nbytes / 2**20:,.0f} MiB")
    table.add_row("reserved before training", f"{reserved:.2f} s")
    table.add_row("copy alone: first, last", f"{alone[0]:.2f} s, {alone[-1]:.2f} s")
    table.add_row("keep returns after", f"{1000 * called:.1f} ms")
    table.add_row("step without", f"{statistics.median(without):.2f} s")
    table.add_row("step with", f"{statistics.median(with_copy):.2f} s")
    ratios = [one / other for one, other in zip(with_copy, without, strict=True)]
    table.add_row("ratio, median (all)", f"{statistics.median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)})")
    Console().print(table)


if __name__ == "__main__":
    main()
