"""What a training engine is: forward, backward, step, weights, snapshot. Another backend could stand behind it.

Workers hold one engine and never ask which one. Losses are this rank's share of a sum over the whole optimizer step
(all ranks, all micro-batches), normalised beforehand by global counts; an engine must never average them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101) or another optimizer by its name. grad_clip is the largest global gradient norm; None:
    no clipping. Norms and biases do not decay.

    lora_plus_ratio: rate of the B matrices of adapters, as a multiple of lr (LoRA+, arXiv:2402.12354).
    """

    name: OptimizerName = "adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    lora_plus_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """Learning rate over a run of total_steps: a linear rise over warmup_steps, then kind, towards min_ratio * lr.

    cycles: falls of cosine_with_restarts. decay_ratio: share of total_steps in which wsd falls.
    """

    kind: Literal["constant", "linear", "cosine", "cosine_with_restarts", "wsd"]
    warmup_steps: int
    total_steps: int
    min_ratio: float = 0.0
    cycles: int = 1
    decay_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step. The norm is that of the whole gradient before clipping, the rate the one that was used
    (of all but B, with LoRA+)."""

    grad_norm: float
    lr: float


class TrainingEngine(Protocol):
    """One rank of a trained model. Methods marked collective are called by all ranks, in the same order."""

    @property
    def module(self) -> Any:
        """The model itself, for its config and for what needs no gradient of sharded weights."""
        ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """function(module, ...): a forward pass, with or without gradients. Collective where weights are sharded."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the step's loss. last: the step's last micro-batch. Collective."""
        ...

    def step(self) -> StepReport:
        """Update the weights. RunError, with the weights unchanged, if loss or gradient are not finite. Collective."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks. Collective."""
        ...

    def max_over_ranks(self, value: int) -> int:
        """The largest, such as the number of micro-batches that all ranks must run. Collective."""
        ...

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Weights under their Hugging Face names, whole, each valid until the next is asked for. Collective."""
        ...

    def named_adapter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Weights of the LoRA adapter alone, under the names that peft saves. Collective."""
        ...

    def save(self, folder: Path) -> None:
        """Everything an exact continuation needs. The caller renames the folder once all ranks are done. Collective."""
        ...

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called. UserError if it was another layout of ranks. Collective."""
        ...

    def offload_to_host(self) -> None:
        """Leave the GPU to another process (nothing to do on a CPU). Collective."""
        ...

    def reload_to_device(self) -> None:
        """Take the GPU back. Collective."""
        ...
