"""The peak resident memory that `rlhf plan` estimates for every process, beside what short runs log.

    python benchmarks/plan_memory.py [--alone] [--runs FOLDER] [CASE ...]

Each case is two steps of a recipe in a separate process. The cases run in turn. A run that exists in the folder is not
repeated. The estimate uses the real tokens of the run's micro-batches, since `rlhf plan` assumes full ones. The
constants of rlhf.planning.memory.Measured come from the marked cases alone. No other case was used for the constants.

--alone: measure training ranks without Ray on random sequences, in a tenth of the time. A rank has a worker's loader,
engine, forward pass of the losses and allocator settings, and makes two optimizer steps of two micro-batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.cluster.processes import KEEPS_MEMORY
from rlhf.config.derive import derive
from rlhf.config.files.load import load
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import GIB

DEADLINE_S = 900
WITHIN = 0.15
ROOT = Path(__file__).resolve().parents[1]
SHORT = ["train.steps=2", "train.checkpoint_every=1", "tracking.wandb=off"]
TINY = [
    'policy={model: "tiny:llama", dtype: float32}',
    "data={apply_chat_template: false, train: {task: running_totals, split: sft, size: 300}}",
]
FP32, SMALL = "policy.dtype=float32", "train.max_tokens_per_microbatch=1024"
SFT = ["configs/sft_smollm2.yaml", "train.sequences_per_update=32"]
SFT_SMALL = ["configs/sft_smollm2.yaml", "train.sequences_per_update=16", SMALL]
GRPO = ["configs/grpo_smollm2.yaml", "data.eval=null"]
ONLINE_SMALL = [SMALL, "rollouts.prompts_per_step=2", "train.sequences_per_update=16", "rollouts.max_new_tokens=48"]
TINY_GRPO = [
    'policy={model: "tiny:llama", dtype: float32}',
    "data={apply_chat_template: false, max_prompt_tokens: 16, train: {task: running_totals, split: train, size: 3000}}",
    "rollouts={prompts_per_step: 32, samples_per_prompt: 8, max_new_tokens: 13}",
    "rewards={correct: {function: last_number}}",
    "algorithm.kl={coef: 0.01, estimator: k3, place: loss}",
    "train.sequences_per_update=128",
    "train.max_tokens_per_microbatch=4096",
]


def ranks(count: int, stage: int) -> list[str]:
    """Return the overrides for a number of ranks and a ZeRO stage."""
    return [
        f"cluster.roles.policy.zero_stage={stage}",
        *([f"cluster.roles.policy.workers={count}"] if count > 1 else []),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recipe with overrides."""

    said: list[str]
    calibrates: bool = False


CASES = {
    "tiny-grpo": Case(said=[GRPO[0], "data.eval=null", *TINY_GRPO], calibrates=True),
    "grpo-bf16": Case(said=[*GRPO, "rollouts.prompts_per_step=4", "train.sequences_per_update=32"], calibrates=True),
    "sft-bf16": Case(said=SFT, calibrates=True),
    "sft-fp32": Case(said=[*SFT, FP32], calibrates=True),
    "tiny-sft": Case(said=[SFT[0], *TINY]),
    "dpo-bf16-1k": Case(said=["configs/dpo_smollm2.yaml", SMALL]),
    "sft-bf16-z0": Case(said=[*SFT_SMALL, *ranks(1, 0)]),
    "sft-bf16-ckpt": Case(said=[*SFT_SMALL, "policy.gradient_checkpointing=true"]),
    "sft-fp32-z3x2": Case(said=[*SFT_SMALL, FP32, *ranks(2, 3)]),
    "sft-bf16-z2x2": Case(said=[*SFT_SMALL, *ranks(2, 2)]),
    "ppo-bf16-1k": Case(said=["configs/ppo_smollm2.yaml", "data.eval=null", *ONLINE_SMALL]),
    "grpo-lora-1k": Case(said=[*GRPO, *ONLINE_SMALL, "policy.lora={}"]),
    "grpo-fp32-1k": Case(said=[*GRPO, *ONLINE_SMALL, FP32]),
}


def measure(name: str, runs: Path) -> Path:
    """Return the folder of a case's run. A missing run is made first."""
    folder = runs / name
    if not (folder / "metrics.jsonl").exists():
        config, *overrides = CASES[name].said
        named = [*overrides, f"run={{name: {name}, dir: {runs}}}", *SHORT]
        command = [sys.executable, "-m", "rlhf.cli", "train", config, "--quiet", *named]
        subprocess.run(command, check=True, timeout=DEADLINE_S, cwd=ROOT)
        for what in ("checkpoints", "final"):  # gigabytes
            shutil.rmtree(folder / what, ignore_errors=True)
    return folder


def compare(folder: Path) -> list[tuple[str, float, float]]:
    """Return (role, estimated, measured) for each process of a run, in GiB."""
    config = next(iter(load(folder / "config.resolved.yaml").runs.values()))
    row = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    of_rank = row["update/tokens/total"] / derive(config).updates_per_step / derive(config).data_parallel_ranks
    tokens = min(config.train.max_tokens_per_microbatch, int(of_rank))
    found = footprints(config, Sizes(tokens=tokens))
    measured = {one.role: row.get(f"memory/{one.role}_rss_gib") for one in found}
    return [(one.role, one.rss / GIB, m) for one in found if (m := measured[one.role]) is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """Ranks trained without Ray, with micro-batches of 512 tokens each."""

    ranks: int = 1
    dtype: str = "bfloat16"
    zero_stage: int = 2
    lora_rank: int | None = None
    checkpointing: bool = False
    supervised: bool = True

    def overrides(self) -> list[str]:
        """Return overrides of the recipe for supervised training, whose memory the plan estimates."""
        said = [f"policy.dtype={self.dtype}", *ranks(self.ranks, self.zero_stage)]
        said += ["policy.gradient_checkpointing=true"] * self.checkpointing
        return said + [f"policy.lora={{rank: {self.lora_rank}}}"] * (self.lora_rank is not None)


ALONE_TOKENS, ALONE_LENGTH = 512, 64
ALONE = {
    "bf16": Alone(),
    "bf16, policy's loss": Alone(supervised=False),
    "bf16, stage 0": Alone(zero_stage=0),
    "bf16, stage 1": Alone(zero_stage=1),
    "bf16, stage 3": Alone(zero_stage=3),
    "bf16, checkpointing": Alone(checkpointing=True),
    "bf16, LoRA": Alone(lora_rank=16),
    "fp32, stage 0": Alone(dtype="float32", zero_stage=0),
    "bf16, stage 3, two ranks": Alone(zero_stage=3, ranks=2),
    "fp32, stage 3": Alone(dtype="float32", zero_stage=3),
    "fp32, stage 3, two ranks": Alone(dtype="float32", zero_stage=3, ranks=2),
    "fp32, policy's loss": Alone(dtype="float32", supervised=False),
}


def train_alone(case: Alone, rank: int, port: int, model: str, results: Any) -> None:
    """Train in a separate process. The first rank puts its peak memory, in GiB, into the queue."""
    import torch

    from rlhf.config.derive import adapter_options
    from rlhf.config.schema.model import LoraConfig
    from rlhf.engine.distributed import RankContext, init_distributed
    from rlhf.engine.sharded_loading import shards_as_it_loads
    from rlhf.engine.training_engine import OptimizerSettings, ScheduleSettings
    from rlhf.models.adapters.lora import add_lora
    from rlhf.models.files.loading import load_causal_lm
    from rlhf.models.packed.forward import policy_logprobs, supervised_loss

    cpu, dtype = torch.device("cpu"), getattr(torch, case.dtype)
    torch.set_num_threads(max(1, torch.get_num_threads() // case.ranks))
    here = {"rank": rank, "world_size": case.ranks, "local_rank": rank, "local_world_size": case.ranks}
    init_distributed(RankContext(**here, device="cpu", threads=1, deadline_s=60.0), "127.0.0.1", port)
    from rlhf.engine.deepspeed import DeepSpeedEngine

    with shards_as_it_loads(zero_stage=case.zero_stage, dtype=dtype, offload_parameters=False):
        module = load_causal_lm(model, dtype=dtype, gradient_checkpointing=case.checkpointing)
        if case.lora_rank is not None:
            module = add_lora(module, **adapter_options(LoraConfig(rank=case.lora_rank)))
    engine = DeepSpeedEngine(
        module,
        optimizer=OptimizerSettings(
            lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, grad_clip=1.0, lora_plus_ratio=1.0
        ),
        schedule=ScheduleSettings(kind="constant", warmup_steps=0, total_steps=10, min_ratio=0.0),
        zero_stage=case.zero_stage,
        dtype=dtype,
        device=cpu,
        deadline_s=60.0,
    )
    lengths = torch.full((ALONE_TOKENS // ALONE_LENGTH,), ALONE_LENGTH)
    mask = (torch.arange(ALONE_TOKENS) % ALONE_LENGTH) > 0
    for _ in range(2):
        for last in (False, True):
            token_ids = torch.randint(100, 40_000, (ALONE_TOKENS,))
            if case.supervised:
                loss = engine.forward(supervised_loss, token_ids, lengths, mask=mask, token_weight=1e-3)[0]
            else:
                loss = -1e-3 * engine.forward(policy_logprobs, token_ids, lengths, mask=mask)[0].sum()
            engine.backward(loss, last=last)
        engine.step()
    if rank == 0:
        results.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB)


def compare_alone(case: Alone) -> tuple[float, float]:
    """Return (estimated, measured) peak memory of the first rank, in GiB."""
    config = "configs/sft_smollm2.yaml" if case.supervised else "configs/grpo_smollm2.yaml"
    run = next(iter(load(ROOT / config, case.overrides()).runs.values()))
    found = footprints(run, Sizes(tokens=ALONE_TOKENS))[0]
    context = multiprocessing.get_context("spawn")
    os.environ.update(KEEPS_MEMORY)  # read by the C library when the child starts
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [(case, rank, port, str(ROOT / run.policy.model), results) for rank in range(case.ranks)]
    children = [context.Process(target=train_alone, args=one) for one in where]
    for child in children:
        child.start()
    measured: float = results.get(timeout=DEADLINE_S)
    for child in children:
        child.join(timeout=60)
    return (found.rss - found.of("shared")) / GIB, measured


def main() -> None:
    """Print the table. The exit code is 1 if an estimate is off by more than WITHIN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all if none is given")
    parser.add_argument("--runs", type=Path, default=Path("runs/plan_memory"))
    parser.add_argument("--alone", action="store_true", help="training ranks without Ray")
    args = parser.parse_args()
    table = Table("case", "role", "estimated GiB", "measured GiB", "error", "calibrates")
    worst = 0.0
    for name, case in (ALONE if args.alone else {}).items():
        estimated, measured = compare_alone(case)
        worst = max(worst, abs(estimated / measured - 1.0))
        table.add_row(name, "policy", f"{estimated:.2f}", f"{measured:.2f}", f"{estimated / measured - 1.0:+.1%}", "")
        sys.stderr.write(f"{name}: estimated {estimated:.2f}, measured {measured:.2f} GiB\n")
    for name in [] if args.alone else args.cases or CASES:
        for role, estimated, measured in compare(measure(name, args.runs)):
            error = estimated / measured - 1.0
            worst = max(worst, abs(error))
            mark = "yes" if CASES[name].calibrates else ""
            table.add_row(name, role, f"{estimated:.2f}", f"{measured:.2f}", f"{error:+.1%}", mark)
    console = Console()
    console.print(table)
    console.print(f"worst: {worst:.1%}")
    sys.exit(worst > WITHIN)


if __name__ == "__main__":
    main()
