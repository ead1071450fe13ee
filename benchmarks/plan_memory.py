"""The peak resident memory that `rlhf plan` estimates for every process, beside what short runs log.

    python benchmarks/plan_memory.py [--runs FOLDER] [CASE ...]

Each case is two steps of a recipe, in a process of its own, one after the other; a run that is in the folder already is
not done again. The estimate is given the tokens of the run's micro-batches, since `rlhf plan` takes them as full. The
constants of rlhf.planning.memory.Measured were set by the cases marked so; the others were not looked at for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.config.derive import derive
from rlhf.config.load import load
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
    """Overrides for so many ranks at a ZeRO stage."""
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
    """The folder of a case's run, which is done if it is not there."""
    folder = runs / name
    if not (folder / "metrics.jsonl").exists():
        config, *overrides = CASES[name].said
        named = [*overrides, f"run={{name: {name}, dir: {runs}}}", *SHORT]
        command = [sys.executable, "-m", "rlhf.cli", "train", config, "--quiet", *named]
        subprocess.run(command, check=True, timeout=DEADLINE_S, cwd=ROOT)
    return folder


def compare(folder: Path) -> list[tuple[str, float, float]]:
    """(role, estimated, measured) of a run, GiB."""
    config = next(iter(load(folder / "config.resolved.yaml").runs.values()))
    row = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    of_rank = row["update/tokens/total"] / derive(config).updates_per_step / derive(config).data_parallel_ranks
    tokens = min(config.train.max_tokens_per_microbatch, int(of_rank))
    found = footprints(config, Sizes(tokens=tokens))
    measured = {one.role: row.get(f"memory/{one.role}_rss_gib") for one in found}
    return [(one.role, one.rss / GIB, m) for one in found if (m := measured[one.role]) is not None]


def main() -> None:
    """Print the table; exit 1 if an estimate is further off than WITHIN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all if none is given")
    parser.add_argument("--runs", type=Path, default=Path("runs/plan_memory"))
    args = parser.parse_args()
    table = Table("case", "role", "estimated GiB", "measured GiB", "error", "calibrates")
    worst = 0.0
    for name in args.cases or CASES:
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
