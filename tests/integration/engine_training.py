"""A gang's ranks train a tiny model by real DeepSpeed engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.optimization import Adafactor

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
    """Return this micro-batch's share of the mean negative log-probability over the step's sampled tokens."""
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
    settings: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule, "offload": offload}
    return engine_of(tiny_model(dtype, **options), stage=stage, dtype=dtype, **settings)


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
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], list[float], bool]:
    """Return weights and norms of a run of three steps, and of a run continued after the first step."""
    settings = replace(OPTIMIZER, name=optimizer)
    engine = make_engine(stage, dtype, optimizer=settings)
    train(engine, rank, world_size, steps=range(1, 2), num_microbatches=1)
    engine.save(folder)
    drawn = torch.rand(3)
    norms = train(engine, rank, world_size, steps=range(2, 4), num_microbatches=1)
    unbroken = weights_of(engine)
    engine.close()
    engine = make_engine(stage, dtype, optimizer=settings)
    engine.load(folder)
    same_draw = torch.equal(drawn, torch.rand(3))
    norms_again = train(engine, rank, world_size, steps=range(2, 4), num_microbatches=1)
    resumed = weights_of(engine)
    engine.close()
    return unbroken, resumed, norms, norms_again, same_draw


def plain_optimizers(name: str, model: Any) -> list[torch.optim.Optimizer]:
    """Return the libraries' own optimizers, each on the right weights."""
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() == 2]
    vectors = {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0}
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, vectors]
    adam: dict[str, Any] = {"lr": OPTIMIZER.lr, "betas": OPTIMIZER.betas}
    if name == "adafactor":
        return [Adafactor(groups, lr=OPTIMIZER.lr, scale_parameter=False, relative_step=False)]
    if name == "adamw_8bit":
        return [AdamW8bit(groups, **adam)]
    if name == "adamw":
        return [torch.optim.AdamW(groups, **adam)]
    blocks = [p for key, p in named.items() if p.dim() == 2 and ".layers." in key]
    outside = [p for p in matrices if not any(p is block for block in blocks)]
    muon: dict[str, Any] = {"weight_decay": OPTIMIZER.weight_decay, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    others = [{"params": outside, "weight_decay": OPTIMIZER.weight_decay}, vectors]
    return [torch.optim.Muon(blocks, lr=OPTIMIZER.lr, **muon), torch.optim.AdamW(others, **adam)]


def plain_training(name: str = "adamw") -> dict[str, Tensor]:
    """Return the weights after training by plain torch on whole batches."""
    model = tiny_model()
    optimizers = plain_optimizers(name, model)
    for step in range(1, STEPS + 1):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = OPTIMIZER.lr * lr_factor(SCHEDULE, step)
            optimizer.step()
    return {key: p.detach().clone() for key, p in model.named_parameters()}
