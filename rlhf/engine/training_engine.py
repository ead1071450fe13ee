"""The interface of a training engine: forward, backward, step, weights, snapshot.

Losses are this rank's share of a sum over the whole optimizer step (all ranks, all micro-batches), divided by global
counts beforehand, or by the step's divisor if a count is known only at the end. An engine never averages losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from rlhf.adapters import AdamStep
from rlhf.engine.shadow_weights import ShadowWeights
from rlhf.engine.snapshot_copies import CopyPlace
from rlhf.engine.swapping import Swapping

P = ParamSpec("P")
T = TypeVar("T")


OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings of AdamW (arXiv:1711.05101) or of another optimizer, chosen by name.

    grad_clip is the largest global gradient norm; None: no clipping. Norms and biases do not decay.
    lora_plus_ratio: rate of the B matrices of adapters, as a multiple of lr (LoRA+, arXiv:2402.12354).
    vision_ratio: rate of a vision tower and projector, as a multiple of lr.
    """

    name: OptimizerName = "adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    lora_plus_ratio: float = 1.0
    vision_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """Learning rate over total_steps: a linear rise over warmup_steps, then `kind`, towards min_ratio * lr.

    cycles: falls of cosine_with_restarts. decay_ratio: share of total_steps in which wsd falls. updates_per_step:
    optimizer steps of a training step, to find the place of a resumed run.
    """

    kind: Literal["constant", "linear", "cosine", "cosine_with_restarts", "wsd"]
    warmup_steps: int
    total_steps: int
    updates_per_step: int = 1
    min_ratio: float = 0.0
    cycles: int = 1
    decay_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Report of one optimizer step."""

    grad_norm: float  # norm of the whole gradient before clipping
    lr: float  # with LoRA+ the B matrices have a different rate


class TrainingEngine(Protocol):
    """One rank of a trained model. Methods marked collective are called by all ranks, in the same order."""

    @property
    def module(self) -> Any:
        """The model, for reading the config and for work without gradients of sharded weights."""

    @property
    def device(self) -> torch.device: ...

    def forward(self, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call function(module, ...): a forward pass. Collective where weights are sharded."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the step's loss. last: the step's last micro-batch. Collective."""

    def end_gradient(self) -> None:
        """Complete the gradient over the ranks if no backward pass was marked as the last. Collective.

        The caller has checked that the losses are finite.
        """

    def step(self, divisor: float = 1.0, *, adam: AdamStep | None = None) -> StepReport:
        """Update the weights by the gradient, divided by `divisor` and then clipped. Collective.

        `adam`: settings only for this step, instead of the engine's settings and schedule. Raise RunError, with the
        weights unchanged, if loss or gradient are not finite.
        """

    def open_swapping(self) -> Swapping:
        """Let several tenants share the engine in turns. UserError: the engine cannot exchange its state."""

    def keep_shadow(self, *, average: bool) -> ShadowWeights:
        """Copy the trained weights for a policy that teaches itself. Snapshots and checkpoints hold the copies."""

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum the values over the ranks. Collective."""

    def max_over_ranks(self, value: int) -> int:
        """Return the largest value of any rank, such as the number of micro-batches to run. Collective."""

    def named_weights(self, dtype: torch.dtype, *, with_tower: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield whole weights by their names in files, only parameters in dtype, each until the next. Collective.

        with_tower: False leaves out a frozen vision tower and projector.
        """

    def named_adapter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield only the weights of the LoRA adapter, under peft's names. Collective."""

    def save(self, folder: Path) -> None:
        """Write everything needed for an exact continuation. Collective."""

    def load(self, folder: Path) -> None:
        """Continue from saved files, exactly with equal ranks and stage. Collective. UserError: files do not fit."""

    def open_snapshots(self, folder: Path, copies: CopyPlace | None = None) -> None:
        """Reserve shared memory for two snapshots, or open a predecessor's. UserError if there is too little memory.

        `copies`: the place of copies sent by a predecessor on another node. None: there are no copies.
        """

    def send_snapshots_to(self, place: CopyPlace | None) -> None:
        """Copy the newest snapshot, and from now on every snapshot, to a place on another node. None: stop copying."""

    def take_snapshot(self, step: int) -> str | None:
        """Begin to copy the state after training step `step`, without waiting for the copy. Collective.

        Return why the previous snapshot has no copy on another node. None: a whole copy, or no place for copies. The
        snapshot before the last is overwritten once all ranks have the last, so all ranks have a step in common.
        """

    def newest_snapshot(self) -> int | None:
        """Return the step of the newest whole snapshot of this rank, or None."""

    def restore_snapshot(self, step: int) -> None:
        """Continue exactly from the state at `take_snapshot(step)`, between two optimizer steps. Collective.

        The caller chooses the newest step that all ranks have. Snapshots of all other steps are forgotten.
        """

    def offload_to_host(self) -> None:
        """Leave the GPU to another process. On a CPU this does nothing. Collective."""

    def reload_to_device(self) -> None:
        """Move the states back to the GPU. Collective."""
