"""A gang's ranks train a tiny model by real DeepSpeed engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf.engine.deepspeed import DeepSpeedEngine, Offload
from rlhf.engine.schedule import lr_factor
from rlhf.engine.training_engine import OptimizerName, OptimizerSettings, ScheduleSettings
from rlhf.models.packed.forward import policy_logprobs
from tests.integration.rank_gang import engine_of, small_config

OPTIMIZER = OptimizerSettings(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, grad_clip=0.5)


SCHEDULE = ScheduleSettings(kind="linear", warmup_steps=2, total_steps=5)


LENGTHS = (5, 2, 7, 4)


STEPS = 3


def tiny_model(dtype: torch.dtype = torch.float32, *, tied: bool = True) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(small_config(tie_word_embeddings=tied)).to(dtype).train()


def batch(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(40, (length,), generator=generator) for length in LENGTHS]


def loss_of(model: Any, sequences: list[Tensor]) -> Tensor:
    """This micro-batch's share of the mean negative logprob over the step's sampled tokens."""
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.cat([torch.arange(len(s)) > 0 for s in sequences])
    logprobs, _ = policy_logprobs(model, torch.cat(sequences), lengths, mask=mask)
    return -logprobs.sum() / (sum(LENGTHS) - len(LENGTHS))


def make_engine(
    stage: int,
    dtype: torch.dtype = torch.float32,
    *,
    offload: Offload = frozenset(),
    optimizer: OptimizerSettings = OPTIMIZER,
    schedule: ScheduleSettings = SCHEDULE,
    **options: Any,
) -> DeepSpeedEngine:
    return engine_of(
        tiny_model(dtype, **options),
        stage=stage,
        dtype=dtype,
        optimizer=optimizer,
        schedule=schedule,
        offload=offload,
    )


def train(engine: DeepSpeedEngine, rank: int, world_size: int, *, steps: range, num_microbatches: int) -> list[float]:
    norms = []
    for step in steps:
        mine = batch(step)[rank::world_size]
        size = len(mine) // num_microbatches
        for i in range(num_microbatches):
            loss = engine.forward(loss_of, mine[i * size : (i + 1) * size])
            engine.backward(loss, last=i == num_microbatches - 1)
        norms.append(engine.step().grad_norm)
    return norms


def weights_of(engine: DeepSpeedEngine, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.named_weights(dtype)}


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([one[name] - two[name] for name in one]))


def interrupt_and_resume(
    rank: int,
    world_size: int,
    *,
    stage: int,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerName = "adamw",
    other_stage: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], list[float], bool]:
    """Return weights and norms of a run of three steps, and of a run continued elsewhere after the first step."""
    settings = replace(OPTIMIZER, name=optimizer)
    engine = make_engine(stage, dtype, optimizer=settings)
    train(engine, rank, world_size, steps=range(1, 2), num_microbatches=1)
    engine.save(folder)
    drawn = torch.rand(3)
    norms = train(engine, rank, world_size, steps=range(2, 4), num_microbatches=1)
    unbroken = weights_of(engine)
    engine.close()
    engine = make_engine(stage if other_stage is None else other_stage, dtype, optimizer=settings)
    engine.load(folder)
    same_draw = torch.equal(drawn, torch.rand(3))
    norms_again = train(engine, rank, world_size, steps=range(2, 4), num_microbatches=1)
    resumed = weights_of(engine)
    engine.close()
    return unbroken, resumed, norms, norms_again, same_draw


def plain_training() -> dict[str, Tensor]:
    model = tiny_model()
    decaying = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * lr_factor(SCHEDULE, step)
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}
