"""Compare the decode speed of an engine with a LoRA adapter and of an engine with the merged weights, in one run.

    python benchmarks/lora_decode.py [--sequences 64] [--tokens 128] [--rounds 5] [--threads 1]

Two engines in separate processes hold the same policy: the first as base weights and an adapter, the second merged. The
engines answer the same requests in turn. The ratio compares processor seconds a token, as the median over the rounds.
Unlike wall time, processor time hardly depends on other work of the machine, but includes threads that wait actively.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from actors.rollout.engine_actor import RolloutSpec, RolloutWorker, engine_environment
from actors.weights.adapter import AdapterSender
from actors.weights.shm import ShmSender
from rlhf.deferred import transformers
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.weights import ADAPTER, adapter_sources, weight_sources
from rlhf.types import GroupRequest, Prompt, Sampling

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 300.0
SAMPLES = 8  # responses to a prompt
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A started engine."""

    handle: Any
    process: psutil.Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The tokens that an engine sampled in one batch, and the time that the batch took."""

    tokens: int
    seconds: float
    processor_s: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, which is on all linear layers")
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 64], help="decoded at once")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens of a response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each engine; only one works at a time")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: start(arguments, lora_rank=rank) for name, rank in (("merged", None), ("adapter", arguments.rank))
        }
        senders = publish(arguments, Path(folder), engines)
        sys.stdout.write("| sequences | merged tok/s | adapter tok/s | adapter / merged |\n|---|---|---|---|\n")
        for sequences in arguments.sequences:
            decode_rounds(arguments, engines, sequences)
        for sender in senders:
            sender.close()
    ray.shutdown()


def decode_rounds(arguments: argparse.Namespace, engines: dict[str, Engine], sequences: int) -> None:
    """Print one row of the table."""
    rounds: dict[str, list[Round]] = {name: [] for name in engines}
    for number in range(arguments.rounds + 1):  # the first round warms up
        for name, engine in engines.items():
            done = decode(engine, number, sequences=sequences, tokens=arguments.tokens)
            rounds[name] += [done] if number else []
    merged, adapter = (statistics.median(r.tokens / r.seconds for r in rounds[name]) for name in ("merged", "adapter"))
    ratio = statistics.median(
        (a.processor_s / a.tokens) / (m.processor_s / m.tokens)
        for m, a in zip(rounds["merged"], rounds["adapter"], strict=True)
    )
    sys.stdout.write(f"| {sequences} | {merged:.0f} | {adapter:.0f} | {ratio:.2f} |\n")
    sys.stdout.flush()


def start(arguments: argparse.Namespace, *, lora_rank: int | None) -> Engine:
    """Start an engine in its own process."""
    spec = RolloutSpec(
        name="engine",
        model=str(arguments.model),
        dtype=arguments.dtype,
        max_model_len=PROMPT_TOKENS + arguments.tokens,
        max_num_seqs=max(arguments.sequences),
        transport="shm",
        threads=arguments.threads,
        kv_cache_gib=0.5,
        lora_rank=lora_rank,
    )
    options = {"num_cpus": 1, "max_concurrency": 100, "runtime_env": {"env_vars": engine_environment(spec)}}
    handle = ray.remote(RolloutWorker).options(**options).remote(spec)
    call(handle.start.remote())
    return Engine(handle=handle, process=psutil.Process(call(handle.__ray_call__.remote(lambda worker: os.getpid()))))


def publish(arguments: argparse.Namespace, folder: Path, engines: dict[str, Engine]) -> tuple[ShmSender, AdapterSender]:
    """Give both engines the same policy, a random adapter on the model."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    policy = add_lora(model, rank=arguments.rank, alpha=2.0 * arguments.rank, dropout=0.0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    merged = ShmSender(rank=0)
    config = json.loads(json.dumps(policy.peft_config[ADAPTER].to_dict(), default=sorted))
    adapter = AdapterSender(folder / "adapter", config, base=str(arguments.model), rank=0)
    for name, sender, sources in (
        ("merged", merged, weight_sources(policy)),
        ("adapter", adapter, adapter_sources(policy)),
    ):
        manifest = sender.publish(((source.name, source.make().to(dtype)) for source in sources), 1)
        call(engines[name].handle.update_weights.remote(manifest, 1))
    return merged, adapter


def decode(engine: Engine, number: int, *, sequences: int, tokens: int) -> Round:
    """Let an engine answer a batch, and measure the time, the short prefill included."""
    requests = [request(number, group) for group in range(sequences // SAMPLES)]
    call(engine.handle.hold.remote())
    groups = [engine.handle.generate.remote(r, Sampling(max_new_tokens=tokens)) for r in requests]
    began, used = time.perf_counter(), processor_seconds(engine.process)
    call(engine.handle.release.remote(len(requests)))
    answers = ray.get(groups, timeout=DEADLINE_S)
    return Round(
        tokens=sum(info.num_response_tokens for _, infos in answers for info in infos),
        seconds=time.perf_counter() - began,
        processor_s=processor_seconds(engine.process) - used,
    )


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor seconds that all threads of a process have used so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def request(number: int, group: int) -> GroupRequest:
    """Return a request for a prompt of arbitrary tokens, different in each group and round."""
    token_ids = tuple(1000 + (7919 * number + 101 * group + 13 * i) % 20000 for i in range(PROMPT_TOKENS))
    return GroupRequest(
        group_id=group,
        prompt=Prompt(prompt_id=group, token_ids=token_ids, text="", columns={}),
        seeds=tuple(1000 * group + sample for sample in range(SAMPLES)),
        first_sequence_id=group * SAMPLES,
    )


def call(ref: Any) -> Any:
    """Return the engine's answer."""
    return ray.get(ref, timeout=DEADLINE_S)


if __name__ == "__main__":
    main()
