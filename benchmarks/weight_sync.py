"""Seconds of one warm weight sync, probe apart, against one memcpy of the same bytes.

    python benchmarks/weight_sync.py [--syncs 20] [--threads 2]

A trainer's model in this process publishes weights over shared memory. A rollout engine in a separate process loads the
weights, as in a run. Checksum and version prove every sync. memcpy is a C call on warm pages, in one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from actors.rollout.engine_actor import RolloutSpec, RolloutWorker, engine_environment
from actors.weights.shm import ShmSender
from rlhf.deferred import transformers

ROOT = Path(__file__).resolve().parents[1]

DEADLINE_S = 300.0
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The medians of one dtype, in seconds."""

    dtype: str
    megabytes: float
    memcpy_s: float
    publish_s: float
    update_s: float
    probe_s: float
    rss_growth_mb: float  # growth of the engine's memory, from the third sync to the last

    def line(self) -> str:
        """Return one line of the table."""
        total = self.publish_s + self.update_s
        seconds = [self.memcpy_s, self.publish_s, self.update_s, total]
        return (
            f"| {self.dtype} | {self.megabytes:.0f} | "
            + " | ".join(f"{1000 * s:.0f}" for s in seconds)
            + f" | {total / self.memcpy_s:.1f} | {1000 * self.probe_s:.0f} | {self.rss_growth_mb:.0f} |"
        )


HEADER = (
    "| dtype | MB | memcpy ms | publish ms | update ms | sync ms | sync / memcpy | probe ms | RSS growth MB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--syncs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    sys.stdout.write(HEADER + "\n")
    for dtype in arguments.dtypes:
        row = measure(arguments.model, dtype, syncs=arguments.syncs, threads=arguments.threads)
        sys.stdout.write(row.line() + "\n")
        sys.stdout.flush()
    ray.shutdown()


def measure(folder: Path, dtype: str, *, syncs: int, threads: int) -> Row:
    """Sync again and again, each time after a step of all weights; the first two warm up."""
    spec = RolloutSpec(
        name="engine",
        model=str(folder),
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=512,
        max_num_seqs=32,
        transport="shm",
        threads=threads,
        kv_cache_gib=0.25,
    )
    options = {"num_cpus": 1, "max_concurrency": 100, "runtime_env": {"env_vars": engine_environment(spec)}}
    engine = ray.remote(RolloutWorker).options(**options).remote(spec)
    call(engine.start.remote())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    sender = ShmSender(rank=0)
    probe = [i % model.config.vocab_size for i in range(PROBE_TOKENS)]
    publish, update, prove, rss = [], [], [], []
    for version in range(1, syncs + 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        manifest, seconds = timed(lambda version=version: sender.publish(model.named_parameters(), version))
        publish.append(seconds)
        receipt, seconds = timed(lambda m=manifest: call(engine.update_weights.remote(m, m.version)))
        update.append(seconds)
        assert (receipt.version, receipt.checksum) == (version, manifest.checksum)
        prove.append(timed(lambda: call(engine.probe.remote(probe)))[1])
        rss.append(call(engine.health.remote()).rss_gib)
    nbytes = manifest.nbytes
    sender.close()
    call(engine.shutdown.remote())
    ray.kill(engine)
    return Row(
        dtype=dtype,
        megabytes=nbytes / 1e6,
        memcpy_s=memcpy_seconds(nbytes),
        publish_s=statistics.median(publish[2:]),
        update_s=statistics.median(update[2:]),
        probe_s=statistics.median(prove[2:]),
        rss_growth_mb=1024 * (rss[-1] - rss[2]),
    )


def memcpy_seconds(nbytes: int) -> float:
    """Return the median time of nine copies between two warm buffers."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    copies = [timed(lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes))[1] for _ in range(10)]
    return statistics.median(copies[1:])


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call, and the seconds of wall time."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def call(ref: Any) -> Any:
    """Wait for the engine's answer, and return it."""
    return ray.get(ref, timeout=DEADLINE_S)


if __name__ == "__main__":
    main()
