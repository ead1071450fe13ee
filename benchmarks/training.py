"""The training pass: packed sequences through this project's engine, beside TRL's SFTTrainer, padded and packed.

    python benchmarks/training.py

Both sides train on the same sequences of uneven length: one optimizer step over all sequences, with forward, backward
and AdamW. Every token but a sequence's first counts in the loss. Each side and dtype runs alone in a separate process,
on all cores. The first step warms up and is not counted. Tokens are real tokens, without padding. The last column is
6 x parameters x tokens / time, over the rate of a large matrix product measured in the same run. TRL's side holds
weights in the dtype itself, TRL's fastest setting; our side keeps float32 master weights. Our process has the allocator
settings of our workers (actors.cluster.processes.KEEPS_MEMORY), and TRL's process has the C library's settings.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import queue
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from actors.cluster.processes import KEEPS_MEMORY

SEED, LR = 0, 1e-6
SHORTEST, LONGEST = 16, 512
DEADLINE_S = 900.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The task of a process. `budget`: tokens of a micro-batch, packed, or padded with as many rows as fit."""

    model: str
    dtype: str
    lengths: tuple[int, ...]
    budget: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The seconds of each counted step, and the peak memory of the process."""

    seconds: list[float]
    peak_gib: float
    parameters: int


def uneven_lengths(count: int) -> tuple[int, ...]:
    """Return log-normal lengths, as chat data has: many short sequences and few long ones."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.empty(count).log_normal_(mean=4.8, std=0.8, generator=generator)
    return tuple(int(x) for x in drawn.clamp(SHORTEST, LONGEST))


def sequences(lengths: tuple[int, ...]) -> list[Tensor]:
    """Return random token ids, since the time does not depend on the ids."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(100, 40_000, (length,), generator=generator) for length in lengths]


def packed_microbatches(lengths: tuple[int, ...], budget: int) -> list[list[int]]:
    """Return the rows of each micro-batch, filled by first fit from the longest row down."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for rows in bins:
            if sum(lengths[i] for i in rows) + lengths[row] <= budget:
                rows.append(row)
                break
        else:
            bins.append([row])
    return bins


def ours(job: Job) -> Measured:
    """Time the steps of the DeepSpeed engine on packed micro-batches, with one rank."""
    from rlhf.engine.deepspeed import DeepSpeedEngine
    from rlhf.engine.distributed import RankContext, init_distributed
    from rlhf.engine.memory import peak_memory
    from rlhf.engine.training_engine import OptimizerSettings, ScheduleSettings
    from rlhf.models.files.loading import load_causal_lm
    from rlhf.models.packed.forward import supervised_loss

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=DEADLINE_S
    )
    init_distributed(place, "127.0.0.1", port)
    model = load_causal_lm(job.model, dtype=DTYPES[job.dtype])
    engine = DeepSpeedEngine(
        model,
        optimizer=OptimizerSettings(lr=LR),
        schedule=ScheduleSettings(kind="constant", warmup_steps=0, total_steps=job.steps),
        zero_stage=0,
        dtype=DTYPES[job.dtype],
        device=torch.device("cpu"),
        deadline_s=DEADLINE_S,
    )
    rows, cut = sequences(job.lengths), packed_microbatches(job.lengths, job.budget)
    num_learnt = sum(job.lengths) - len(job.lengths)
    seconds = []
    for _ in range(job.steps + 1):
        start = time.perf_counter()
        for index, chosen in enumerate(cut):
            lengths = torch.tensor([job.lengths[i] for i in chosen])
            token_ids = torch.cat([rows[i] for i in chosen])
            mask = torch.ones(len(token_ids), dtype=torch.bool)
            mask[lengths.cumsum(0) - lengths] = False
            loss, *_ = engine.forward(supervised_loss, token_ids, lengths, mask=mask, token_weight=1.0 / num_learnt)
            engine.backward(loss, last=index == len(cut) - 1)
        engine.step()
        seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    return Measured(seconds=seconds[1:], peak_gib=peak_memory().rss_gib, parameters=parameters)


def trl_padded(job: Job) -> Measured:
    """Time SFTTrainer with its defaults. Sequences are grouped by length, so there is little padding."""
    per_batch = max(1, job.budget // max(job.lengths))
    return _trl(
        job,
        per_device_train_batch_size=per_batch,
        gradient_accumulation_steps=-(-len(job.lengths) // per_batch),
        train_sampling_strategy="group_by_length",
        max_length=None,
    )


def trl_packed(job: Job) -> Measured:
    """Time SFTTrainer with packing. Each packed row, of at most the budget, is a micro-batch."""
    packs = packed_microbatches(job.lengths, job.budget)  # as many rows as SFTTrainer's best-fit packing makes
    return _trl(
        job,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(packs),
        packing=True,
        max_length=job.budget,
    )


def _trl(job: Job, **settings: Any) -> Measured:
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from rlhf.engine.memory import peak_memory

    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.dtype])
    rows = [{"input_ids": ids.tolist()} for ids in sequences(job.lengths)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=job.steps + 1,
                learning_rate=LR,
                use_cpu=True,
                bf16=False,  # the weights are in the dtype already
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=SEED,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(job.model),
            callbacks=[Clock()],
        )
        trainer.train()
    parameters = sum(p.numel() for p in model.parameters())
    return Measured(seconds=seconds[1:], peak_gib=peak_memory().rss_gib, parameters=parameters)


SIDES: dict[str, Callable[[Job], Measured]] = {"ours": ours, "trl-padded": trl_padded, "trl-packed": trl_packed}


def measure_product(dtype: str) -> float:
    """Return the rate of a large matrix product, measured in a separate process."""
    from rlhf.engine.flops import measure_peak_flops

    torch.set_num_threads(os.cpu_count() or 1)
    return measure_peak_flops(DTYPES[dtype], torch.device("cpu"))


def _in_process(results: Any, function: Callable[..., Any], argument: Any) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(os.cpu_count() or 1)
    results.put(function(argument))


def apart(function: Callable[..., Any], argument: Any, *, keeps_memory: bool = False) -> Any:
    """Return function(argument) from a new process. keeps_memory: the process has our workers' allocator settings.
    SystemExit if the process dies or takes too long."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_in_process, args=(results, function, argument))
    inherited = dict(os.environ)
    if keeps_memory:
        os.environ.update(KEEPS_MEMORY)
    process.start()
    os.environ.clear()
    os.environ.update(inherited)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return results.get(timeout=1.0)
            except queue.Empty:
                if not process.is_alive():
                    sys.exit(f"{function.__name__}({argument}) ended with code {process.exitcode}")
                if time.monotonic() > deadline:
                    sys.exit(f"{function.__name__}({argument}) took over {DEADLINE_S:g} s")
    finally:
        process.join(10.0)
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--dtypes", default="bfloat16,float32", help="each side is measured in each of them")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--budget", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of each side")
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir():
        sys.exit(f"{arguments.model} is no folder: `rlhf models fetch smollm2` makes one")
    os.environ["HF_HUB_OFFLINE"] = "1"
    lengths = uneven_lengths(arguments.sequences)
    dtypes, sides = arguments.dtypes.split(","), arguments.sides.split(",")
    product = {dtype: apart(measure_product, dtype) for dtype in DTYPES}
    measured: dict[tuple[str, str], Measured] = {}
    for side in sides:
        for dtype in dtypes:
            job = Job(
                model=arguments.model, dtype=dtype, lengths=lengths, budget=arguments.budget, steps=arguments.steps
            )
            measured[side, dtype] = apart(SIDES[side], job, keeps_memory=side == "ours")
    report(measured, product, lengths)


def report(measured: dict[tuple[str, str], Measured], product: dict[str, float], lengths: tuple[int, ...]) -> None:
    console = Console(width=110)
    tokens = sum(lengths)
    console.print(
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {tokens} in all. Large products: "
        + ", ".join(f"{dtype} {rate / 1e9:.0f} Gflop/s" for dtype, rate in product.items())
    )
    table = Table("side", "dtype", "s/step", "tokens/s", "peak GiB", "of the bfloat16 product", "of its own product")
    rates: dict[tuple[str, str], float] = {}
    for (side, dtype), result in measured.items():
        seconds = sum(result.seconds) / len(result.seconds)
        rates[side, dtype] = tokens / seconds
        work = 6 * result.parameters * tokens / seconds
        table.add_row(
            side,
            dtype,
            f"{seconds:.2f}",
            f"{tokens / seconds:.0f}",
            f"{result.peak_gib:.2f}",
            f"{work / product['bfloat16']:.0%}",
            f"{work / product[dtype]:.0%}",
        )
    console.print(table)
    best = {side: max(rate for (of, _), rate in rates.items() if of == side) for side, _ in rates}
    for side in best:
        if side != "ours" and "ours" in best:
            console.print(f"ours / {side}, each in its faster dtype: {best['ours'] / best[side]:.2f}")


if __name__ == "__main__":
    main()
