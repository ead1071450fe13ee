"""Training on fixed data: this project's workers beside TRL's trainers, for SFT, DPO and a reward model.

    python benchmarks/offline.py

Both sides train SmolLM2 on the same rows of uneven length in the same steps, each row once, with the same learning
rate, clipping and AdamW. Each side, method and dtype runs alone in a separate process, on all cores. The first step
warms up and is not counted. Tokens are real tokens, without padding, and counted in the same way on both sides: a pair
counts its prompt twice, even if a side computes the prompt once. DPO's time includes the reference, which is computed
before the first step and divided evenly among the steps of this single pass over the data.

The float32 runs do ten steps, whose losses must be equal. In bfloat16, TRL's side runs twice. The first run has TRL's
default: float32 weights under autocast. In the second run weights and moments are bfloat16, so that most weights do not
change at this learning rate. Our side keeps float32 master weights. The rows of a step are sorted by length, so TRL's
micro-batches have little padding. Both sides have the allocator settings of our workers
(actors.cluster.processes.KEEPS_MEMORY), which make TRL faster too.

The last column is the necessary arithmetic of a side over the side's time, as a share of the rate of a large float32
matrix product measured in the same run. Necessary are products of the body for every token (on our side, a pair's
prompt once) and of the vocabulary head for learnt tokens: three times each, and once more for a reference.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from training import DEADLINE_S, DTYPES, SEED, apart, measure_product, uneven_lengths

LR, BETA = 1e-5, 0.1
STEPS = {"bfloat16": 3, "float32": 10}  # the first warms up
LONGEST = 512  # tokens of a sequence
PROMPT_SHARE = (0.2, 0.6)  # of a row's tokens
SECOND = (0.5, 1.5)  # length of a rejected response over the chosen one's
PAD = "<|endoftext|>"  # TRL scores the last token that is no padding: the usual padding token also ends a turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt with one response, or with a chosen and a rejected one."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the row's sequences. Each sequence has the prompt."""
        return sum(len(self.prompt) + len(response) for response in self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The task of a process. `trl_rows`: rows of TRL's padded micro-batch; ours is packed within `budget` tokens."""

    model: str
    method: str
    dtype: str
    batches: tuple[tuple[Row, ...], ...] = field(repr=False)  # one a step
    trl_rows: int

    @property
    def budget(self) -> int:
        """Tokens of our micro-batch: at least one pair. More tokens take more memory, and are faster in bfloat16."""
        if self.dtype == "bfloat16":
            return 1024
        return LONGEST if self.method == "sft" else 832

    @property
    def rows(self) -> list[Row]:
        """Return the rows of all steps."""
        return [row for batch in self.batches for row in batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measurements of all steps, and of the process."""

    seconds: list[float]
    losses: list[float]
    reference_s: float  # for all rows, before the first step
    peak_gib: float
    body: int  # parameters that each token is multiplied with
    head: int  # parameters that each learnt token is multiplied with


def uneven_rows(model: str, count: int, *, responses: int) -> list[Row]:
    """Return chat rows of 16 to 512 tokens a sequence: a sequence of word problems, cut into turns."""
    import reasoning_gym
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = torch.Generator().manual_seed(SEED)
    lengths = uneven_lengths(count)
    problems = reasoning_gym.create_dataset("gsm_symbolic", seed=SEED, size=2 + 4 * responses * sum(lengths) // 100)
    text = "\n\n".join(f"{problem['question']}\n{problem['answer']}" for problem in problems)
    head, turn, end, words = (
        tuple(tokenizer.encode(piece, add_special_tokens=False))
        for piece in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", text)
    )
    place = 0

    def take(length: int) -> tuple[int, ...]:
        nonlocal place
        place += length
        assert place <= len(words)
        return words[place - length : place]

    def between(bounds: tuple[float, float]) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand((), generator=generator))

    rows = []
    for length in lengths:
        asked = max(1, int(length * between(PROMPT_SHARE)) - len(head) - len(turn))
        prompt = head + take(asked) + turn
        answers = [max(1, length - len(prompt) - len(end))]
        if responses == 2:
            room = LONGEST - len(prompt) - len(end)
            answers.append(min(room, max(1, int(answers[0] * between(SECOND)))))
        rows.append(Row(prompt=prompt, responses=tuple(take(answer) + end for answer in answers)))
    return rows


def batches_of(rows: list[Row], size: int) -> tuple[tuple[Row, ...], ...]:
    """Return the rows of each step, sorted by length."""
    cut = [rows[start : start + size] for start in range(0, len(rows), size)]
    return tuple(tuple(sorted(batch, key=lambda row: row.tokens)) for batch in cut)


def ours(job: Job) -> Measured:
    """Time the steps of our worker for the method, in a gang of one rank."""
    from rlhf.config.files.load import checked
    from rlhf.config.schema.root import Config
    from rlhf.data.examples import Example, collate
    from rlhf.data.preferences import PreferencePair, collate_pairs
    from rlhf.engine.distributed import RankContext
    from rlhf.tracking.metrics.declarations import results
    from rlhf.types import MinibatchPlan
    from rlhf.workers.offline.pairs import PreferenceWorker, RewardModelWorker
    from rlhf.workers.offline.supervised import SupervisedWorker

    def sequence(index: int, row: Row, side: int) -> Example:
        response = row.responses[side]
        mask = (False,) * len(row.prompt) + (True,) * len(response)
        return Example(example_id=index, token_ids=row.prompt + response, loss_mask=mask)

    def pair(index: int, row: Row) -> PreferencePair:
        chosen, rejected = (sequence(2 * index + side, row, side) for side in (0, 1))
        return PreferencePair(
            example_id=index, chosen=chosen, rejected=rejected, prompt_tokens=len(row.prompt), margin=None
        )

    def plan(first: int, rows: list[Row] | tuple[Row, ...]) -> MinibatchPlan:
        return MinibatchPlan(
            sequences_by_rank=(tuple(range(first, first + len(rows))),),
            num_tokens=sum(len(row.responses[0]) for row in rows),
            num_sequences=len(rows),
        )

    config = Config.model_validate(
        {
            "run": {"name": "benchmark", "seed": SEED},
            "policy": {"model": job.model, "dtype": job.dtype},
            "algorithm": {"name": job.method} | ({"beta": BETA} if job.method == "dpo" else {}),
            "data": {"train": "rows.jsonl"},
            "cluster": {"roles": {"policy": {"zero_stage": 0}}},  # one rank has nothing to shard
            "train": {
                "steps": len(job.batches),
                "lr": LR,
                "sequences_per_update": len(job.batches[0]),
                "max_tokens_per_microbatch": job.budget,
            },
        }
    )
    place = RankContext(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        device="cpu",
        threads=torch.get_num_threads(),
        deadline_s=DEADLINE_S,
    )
    workers: Mapping[str, Any] = {"sft": SupervisedWorker, "dpo": PreferenceWorker, "reward_model": RewardModelWorker}
    worker = workers[job.method](next(iter(checked(config).stages.values())), place, optimizer_steps=len(job.batches))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker.start("127.0.0.1", port)
    if job.method == "sft":
        worker.load_data(collate([sequence(index, row, 0) for index, row in enumerate(job.rows)]))
    else:
        worker.load_data(collate_pairs([pair(index, row) for index, row in enumerate(job.rows)]))
    start = time.perf_counter()
    if job.method == "dpo":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{worker.reference_key(0)}.safetensors")
            worker.store_reference(0, path, worker.reference_logprobs(0, plan(0, job.rows))[0])
    reference_s = time.perf_counter() - start
    seconds, losses, done = [], [], 0
    for batch in job.batches:
        start = time.perf_counter()
        metrics = worker.update_on(plan(done, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(results(metrics)["update/loss/mean"])
        done += len(batch)
    worker.stop()
    return measured(job, worker.engine.module, seconds, losses, reference_s)


def measured(job: Job, model: Any, seconds: list[float], losses: list[float], reference_s: float) -> Measured:
    """Return the measurements, with the peak memory of the process and the sizes of the model."""
    from rlhf.engine.memory import peak_memory

    embedding = model.get_input_embeddings().weight.numel()
    return Measured(
        seconds=seconds,
        losses=losses,
        reference_s=reference_s,
        peak_gib=peak_memory().rss_gib,
        body=sum(p.numel() for p in model.base_model.parameters()) - embedding,
        head=0 if job.method == "reward_model" else embedding,
    )


def trl(job: Job, *, precomputes: bool = False, autocasts: bool = False) -> Measured:
    """Time the steps of TRL's trainer for the method on the same tokens, with the rows in the given order."""
    import transformers
    from datasets import Dataset

    seconds: list[float] = []
    losses: list[float] = []
    reference_s = 0.0
    trainer_class, config_class, settings = _trl_classes(job.method)

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            losses.append(0.0)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    class Watched(trainer_class):  # type: ignore[misc,valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses[-1] += float(loss)
            return loss

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            if job.method == "dpo":  # takes texts only, and these rows are tokens
                return dataset
            return super()._prepare_dataset(dataset, *args, **kwargs)

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal reference_s
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            reference_s = time.perf_counter() - start
            return dataset

    dtype = torch.float32 if autocasts else DTYPES[job.dtype]
    if job.method == "reward_model":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(job.model, dtype=dtype, num_labels=1)
        torch.nn.init.zeros_(model.score.weight)  # as our worker begins
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    extra: dict[str, Any] = {}
    if job.method == "dpo" and precomputes:
        settings["precompute_ref_log_probs"] = True
    elif job.method == "dpo":
        extra["ref_model"] = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.dtype])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = PAD
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(
            model=model,
            args=config_class(
                output_dir=folder,
                max_steps=len(job.batches),
                per_device_train_batch_size=job.trl_rows,
                gradient_accumulation_steps=len(job.batches[0]) // job.trl_rows,
                train_sampling_strategy="sequential",
                learning_rate=LR,
                lr_scheduler_type="constant",
                max_length=None,
                use_cpu=True,
                bf16=autocasts,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=SEED,
                **settings,
            ),
            train_dataset=Dataset.from_list([_trl_row(job.method, row) for row in job.rows]),
            processing_class=tokenizer,
            callbacks=[Clock()],
            **extra,
        )
        trainer.train()
    return measured(job, model, seconds, losses, reference_s)


def trl_precomputed(job: Job) -> Measured:
    """Compute the reference's log-probabilities before the first step, as our worker does."""
    return trl(job, precomputes=True)


def trl_autocast(job: Job) -> Measured:
    """Set TRL's default: float32 weights, and bfloat16 where autocast uses bfloat16."""
    return trl(job, autocasts=True)


def _trl_classes(method: str) -> tuple[Any, Any, dict[str, Any]]:
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    if method == "sft":
        return SFTTrainer, SFTConfig, {"completion_only_loss": True}
    if method == "dpo":
        return DPOTrainer, DPOConfig, {"beta": BETA}
    return RewardTrainer, RewardConfig, {}


def _trl_row(method: str, row: Row) -> dict[str, Any]:
    prompt, first = list(row.prompt), list(row.responses[0])
    if method == "sft":
        return {"input_ids": prompt + first, "completion_mask": [0] * len(prompt) + [1] * len(first)}
    if method == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": list(row.responses[1])}
    return {"chosen_ids": prompt + first, "rejected_ids": prompt + list(row.responses[1])}


OURS, TRL, TRL_AUTOCAST = "ours", "TRL", "TRL, autocast"
SIDES: Mapping[str, Mapping[str, Callable[[Job], Measured]]] = {
    "sft": {OURS: ours, TRL: trl, TRL_AUTOCAST: trl_autocast},
    "dpo": {OURS: ours, TRL: trl, "TRL, precomputed": trl_precomputed, TRL_AUTOCAST: trl_autocast},
    "reward_model": {OURS: ours, TRL: trl, TRL_AUTOCAST: trl_autocast},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument("--methods", default=",".join(SIDES))
    parser.add_argument("--dtypes", default=",".join(STEPS))
    parser.add_argument("--sequences", type=int, default=16, help="of a step; half as many pairs")
    parser.add_argument("--trl-sequences", type=int, default=1, help="of a padded micro-batch")
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir():
        sys.exit(f"{arguments.model} is no folder: `rlhf models fetch smollm2` makes one")
    os.environ["HF_HUB_OFFLINE"] = "1"
    console = Console(width=120)
    product = apart(measure_product, "float32")
    console.print(f"Large float32 product: {product / 1e9:.0f} Gflop/s")
    table = Table(
        "method",
        "dtype",
        "side",
        "s/step",
        "of it reference",
        "tokens/s",
        "peak GiB",
        "ours is faster by",
        "of product",
    )
    curves = Table("method", "side", "loss of step 1", "of the last", "largest difference from ours")
    for method in arguments.methods.split(","):
        responses = 1 if method == "sft" else 2
        size, trl_rows = arguments.sequences // responses, max(1, arguments.trl_sequences // responses)
        for dtype in arguments.dtypes.split(","):
            rows = uneven_rows(arguments.model, size * STEPS[dtype], responses=responses)
            job = Job(
                model=arguments.model,
                method=method,
                dtype=dtype,
                batches=batches_of(rows, size),
                trl_rows=trl_rows,
            )
            lengths = [len(row.prompt) + len(response) for row in rows for response in row.responses]
            console.print(
                f"{method}, {dtype}: {len(job.batches)} steps of {size} rows, sequences of {min(lengths)} to "
                f"{max(lengths)} tokens, {sum(lengths) / len(job.batches):.0f} a step, "
                f"{sum(len(row.prompt) for row in rows) / sum(row.tokens for row in rows) * responses:.0%} prompt"
            )
            found: dict[str, Measured] = {}
            for side, run in SIDES[method].items():
                if side == TRL_AUTOCAST and dtype == "float32":
                    continue
                found[side] = apart(run, job, keeps_memory=True)
                console.print(f"  {side}: " + " ".join(f"{s:.2f}" for s in found[side].seconds) + " s")
            report(table, curves, job, found, product)
    console.print(table)
    console.print(curves)


def report(table: Table, curves: Table, job: Job, found: Mapping[str, Measured], product: float) -> None:
    """Print a row for each side, and a row for the losses of the sides where the losses must be equal."""
    steps = len(job.batches) - 1
    counted = [row for batch in job.batches[1:] for row in batch]
    tokens = sum(row.tokens for row in counted)
    learnt = sum(len(response) for row in counted for response in row.responses)
    repeated = sum(len(row.prompt) * (len(row.responses) - 1) for row in counted)
    passes = 4 if job.method == "dpo" else 3
    of_reference = tokens / sum(row.tokens for row in job.rows)
    total_s = {side: sum(result.seconds[1:]) + of_reference * result.reference_s for side, result in found.items()}
    for side, result in found.items():
        work = 2 * passes * (result.body * (tokens - repeated * (side == OURS)) + result.head * learnt)
        table.add_row(
            job.method,
            job.dtype,
            side,
            f"{total_s[side] / steps:.2f}",
            f"{of_reference * result.reference_s / steps:.2f}" if result.reference_s else "",
            f"{tokens / total_s[side]:.0f}",
            f"{result.peak_gib:.2f}",
            "" if side == OURS else f"{total_s[side] / total_s[OURS]:.2f}x",
            f"{work / total_s[side] / product:.0%}",
        )
        if job.dtype == "float32":
            gaps = [abs(one - other) for one, other in zip(result.losses, found[OURS].losses, strict=True)]
            first, last = result.losses[0], result.losses[-1]
            curves.add_row(job.method, side, f"{first:.5f}", f"{last:.5f}", "" if side == OURS else f"{max(gaps):.1e}")


if __name__ == "__main__":
    main()
