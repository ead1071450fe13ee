"""GRPO on SmolLM2-135M: this project beside TRL's GRPOTrainer, same prompts, batch, lengths, dtype and machine.

    python benchmarks/online.py                 # ours and TRL with transformers' generate
    python benchmarks/online.py --sides trl-generate,trl-continuous,trl-vllm

The sides run in turn, each in separate processes. A step is everything from one step's end to the
next: sampling, scoring, update, weight sync. The first step of each side is a warm-up and not counted. Tokens are the
prompt and response tokens that a step trains on, padding apart. Memory is the largest peak of any one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from rlhf.tracking.metrics.declarations import declared

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES, NEW_TOKENS = 4, 8, 96
LR, SEED = 1e-6, 0
DEADLINE_S = 1800.0
SIDES = ("ours", "trl-generate", "trl-continuous", "trl-vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The measurements of one side over its counted steps."""

    side: str
    steps: int
    seconds: float
    tokens: int
    response_tokens: float  # mean over all responses
    peak_gib: float
    stages: dict[str, float]  # seconds a step, by stage; empty if the side does not measure stages

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def digit_share(prompt: str, response: str, **columns: Any) -> float:
    """Return the share of digits in a response. Such a reward differs between samples and costs nothing."""
    return sum(c.isdigit() for c in response) / max(len(response), 1)


def write_prompts(path: Path, count: int) -> None:
    """Write `count` prompts of the recipe's task, one JSON object a line."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("gcd", seed=SEED, size=count)
    path.write_text("".join(json.dumps({"prompt": item["question"]}) + "\n" for item in dataset), encoding="utf-8")


def run_ours(model: Path, prompts: Path, steps: int, folder: Path) -> list[str]:
    """Return the command of our side: the recipe with the benchmark's prompts, batch and reward. The run has one step
    more than is counted, because the last step also writes a checkpoint."""
    return [
        str(Path(sys.executable).with_name("rlhf")),
        "train",
        str(ROOT / "configs" / "grpo_smollm2.yaml"),
        f"run.dir={folder}",
        "run.name=ours",
        f"run.seed={SEED}",
        f"policy.model={model}",
        "policy.dtype=bfloat16",
        f"data.train={prompts}",
        "data.eval=null",
        "data.shuffle=false",
        "tracking.wandb=off",
        f'rewards={{"digits": {{"function": "{Path(__file__).resolve()}:digit_share"}}}}',
        f"rollouts.prompts_per_step={PROMPTS}",
        f"rollouts.samples_per_prompt={SAMPLES}",
        f"rollouts.max_new_tokens={NEW_TOKENS}",
        f"train.sequences_per_update={PROMPTS * SAMPLES}",
        f"train.steps={steps + 2}",
        f"train.lr={LR}",
        "algorithm.kl.coef=0.0",
    ]


def read_ours(folder: Path, steps: int, peak_gib: float) -> Result:
    """Read our run's metrics.jsonl: rows 2 to steps + 1, with the time from the end of row 1."""
    lines = (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    counted = [rows[step] for step in range(2, steps + 2)]
    keys = sorted({key for row in counted for key in row if key.startswith("time/")})
    names = [key for key in keys if declared(key).name == "time/<stage>_s"]  # without waits and fractions
    return Result(
        side="ours",
        steps=steps,
        seconds=rows[steps + 1]["time_s"] - rows[1]["time_s"],
        tokens=sum(row["rollouts/tokens/total"] for row in counted),
        response_tokens=sum(row["rollouts/response_tokens/mean"] for row in counted) / steps,
        peak_gib=peak_gib,
        stages={
            name.removeprefix("time/").removesuffix("_s"): sum(row.get(name, 0.0) for row in counted) / steps
            for name in names
        },
    )


def run_trl(side: str, model: Path, prompts: Path, steps: int, folder: Path) -> list[str]:
    """Return the command of one TRL side: this file in a separate process."""
    command = [sys.executable, __file__, f"--trl={side}", f"--model={model}", f"--prompts={prompts}"]
    return [*command, f"--steps={steps}", f"--folder={folder}"]


def train_trl(side: str, model: Path, prompts: Path, steps: int, folder: Path) -> None:
    """Run TRL's side inside its process: GRPOTrainer without a reference model, one optimizer step a batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def reward(prompts: list[Any], completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
        return [digit_share("", completion[0]["content"]) for completion in completions]

    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        train_dataset=data,
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(folder / side),
            seed=SEED,
            use_cpu=True,
            bf16=True,
            model_init_kwargs={"dtype": "bfloat16"},
            beta=0.0,
            loss_type="dapo",
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=steps + 1,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            use_transformers_continuous_batching=side == "trl-continuous",
            use_vllm=side == "trl-vllm",
            vllm_mode="colocate",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "num_tokens" in log]
    counted = logs[1 : steps + 1]
    result = {
        "seconds": ends[steps] - ends[0],
        "tokens": int(counted[-1]["num_tokens"] - logs[0]["num_tokens"]),
        "response_tokens": sum(log["completions/mean_length"] for log in counted) / steps,
    }
    (folder / f"{side}.json").write_text(json.dumps(result), encoding="utf-8")


def read_trl(side: str, folder: Path, steps: int, peak_gib: float) -> Result:
    """Return the measurements that a TRL process has written."""
    values = json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))
    return Result(side=side, steps=steps, peak_gib=peak_gib, stages={}, **values)


def peak_of(process: psutil.Process) -> int:
    """Return the peak resident bytes of a process so far (VmHWM), or 0 if the process has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def watch(command: list[str], log: Path) -> float:
    """Run a command to its end. Return the largest memory peak of the process or any descendant, in GiB.

    Raises SystemExit with the end of the output if the command fails or runs longer than DEADLINE_S.
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "VLLM_NO_USAGE_STATS": "1"}
    peak, end = 0, time.monotonic() + DEADLINE_S
    with log.open("w", encoding="utf-8") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as child:
        root = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                peak = max(peak, *(peak_of(process) for process in [root, *root.children(recursive=True)]))
            except psutil.NoSuchProcess:
                continue
            if time.monotonic() > end:
                child.kill()
            time.sleep(0.2)
    if child.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
        raise SystemExit(
            f"{command[:3]} ended with {child.returncode} (limit {DEADLINE_S:.0f} s). Its last lines:\n{tail}"
        )
    return peak / 2**30


def show(results: list[Result]) -> None:
    """Print the table, and the time of each stage of our step."""
    console = Console(width=110)
    table = Table("side", "s / step", "tokens / step", "tokens / s", "mean response", "peak GiB", "ours is faster by")
    ours = next((result for result in results if result.side == "ours"), None)
    for result in results:
        ratio = f"{ours.tokens_per_s / result.tokens_per_s:.2f}x" if ours and result is not ours else ""
        table.add_row(
            result.side,
            f"{result.seconds / result.steps:.1f}",
            f"{result.tokens / result.steps:.0f}",
            f"{result.tokens_per_s:.1f}",
            f"{result.response_tokens:.1f}",
            f"{result.peak_gib:.2f}",
            ratio,
        )
    console.print(table)
    if ours:
        stages = Table("stage of our step", "s", "share")
        for name, seconds in sorted(ours.stages.items(), key=lambda item: -item[1]):
            stages.add_row(name, f"{seconds:.2f}", f"{100 * seconds * ours.steps / ours.seconds:.0f} %")
        console.print(stages)


def main() -> None:
    """Run the sides in turn, and print the table. The exit code is 1 if a side fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each side")
    parser.add_argument("--sides", default="ours,trl-generate", help=f"some of {','.join(SIDES)}")
    parser.add_argument("--trl", choices=SIDES[1:], help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        train_trl(args.trl, args.model, args.prompts, args.steps, args.folder)
        return
    if not (args.model / "config.json").exists():
        parser.error(f"--model: no model in {args.model}; `rlhf models fetch smollm2` puts it there")
    if args.sides != "ours" and find_spec("trl") is None:
        parser.error("TRL is not installed: `make benchmarks` installs it, or compare nothing with --sides ours")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        write_prompts(prompts, PROMPTS * (args.steps + 2))
        for side in args.sides.split(","):
            if side == "ours":
                peak = watch(run_ours(args.model, prompts, args.steps, folder), folder / "log.txt")
                results.append(read_ours(folder, args.steps, peak))
            else:
                peak = watch(run_trl(side, args.model, prompts, args.steps, folder), folder / "log.txt")
                results.append(read_trl(side, folder, args.steps, peak))
    show(results)


if __name__ == "__main__":
    main()
