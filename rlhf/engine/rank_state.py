"""The state of a rank in DeepSpeed: everything that a checkpoint restores, as tensors to copy and replace.

The state consists of the trained weights in float32 (at stage 0 the weights themselves), the optimizer's states, the
frozen copies of an adapter's initial state, and a self-teacher's copies of the weights. At stages 1 to 3 each rank has
a share. The rest follows from the float32 weights, the settings and the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from rlhf.engine.gathering import whole_numel
from rlhf.engine.partitions import Sharding
from rlhf.engine.randomness import random_state, restore_random_state
from rlhf.engine.shadow_weights import ShadowWeights
from rlhf.errors import RunError
from rlhf.models.files.weights import initial_copies

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # DeepSpeed's


class Sharing(Enum):
    """How the ranks share a field: at these ZeRO stages every rank writes the field, and otherwise rank 0 for all."""

    UPDATED = (1, 2, 3)  # of the elements that the rank updates; a resume copies a tensor element by element
    DIVIDED = (3,)  # the same on all ranks, but at stage 3 each rank has an equal part of the elements
    SAME = ()  # the same on all ranks
    OWN = (0, 1, 2, 3)  # different on each rank; a rank that the checkpoint lacks keeps the field of its start

    def writers(self, sharding: Sharding) -> range:
        """Return the ranks whose files in a checkpoint have the field."""
        return range(sharding.ranks if sharding.zero_stage in self.value else 1)


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a rank's state. Every field is in each snapshot and in each checkpoint."""

    sharing: Sharing
    read: Callable[[RankState], Any]
    restore: Callable[[RankState, Any], None] | None = None  # None: tensors by name, which are replaced in place

    def __post_init__(self) -> None:
        of_tensors, of_values = (Sharing.UPDATED, Sharing.DIVIDED), (Sharing.UPDATED, Sharing.SAME, Sharing.OWN)
        if self.sharing not in (of_tensors if self.restore is None else of_values):
            raise ValueError(f"{self.sharing} has no rule for {'tensors' if self.restore is None else 'values'}")


def sharing_of(name: str) -> Sharing:
    """Return how the ranks share a value, or a tensor whose name begins with the field. RunError: no such field."""
    field = name.partition(" ")[0]
    if field not in FIELDS:
        raise RunError(
            f"{field} is not a field of a rank's state, so no rule says which ranks write it to a checkpoint. Add "
            "the field to FIELDS in rlhf/engine/rank_state.py."
        )
    return FIELDS[field].sharing


class RankState:
    """The state of the rank with the given DeepSpeed engine and optimizer."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, *, zero_stage: int) -> None:
        self._engine, self._optimizer, self._zero_stage = engine, optimizer, zero_stage
        self.shadow: ShadowWeights | None = None  # of a policy that teaches itself

    def create(self) -> None:
        """Create the optimizer's states now, by steps without gradients at a rate of 0, to know the states' size."""
        for index, master in enumerate(self.masters()):
            given, master.grad = master.grad, torch.zeros_like(master)
            self._engine.optimizer._optimizer_step(index) if self._zero_stage == 3 else self._optimizer.step()
            master.grad = given
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0

    def forget_moments(self) -> None:
        """Set the optimizer's states to those before the first step."""
        for state in self.states().values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def masters(self) -> list[Tensor]:
        """Return the tensors updated by the optimizer, in the same order in each process."""
        wrapped = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(wrapped, name):  # at stage 3; at stages 1 and 2; of bfloat16 at stage 1
                return list(getattr(wrapped, name))
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def states(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state of each master, in their order."""
        return {f"state {i}": self._optimizer.state[master] for i, master in enumerate(self.masters())}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors themselves, not copies, under the same names in each process."""
        fields = {name: field.read(self) for name, field in FIELDS.items() if field.restore is None}
        return {f"{name} {key}": tensor.detach() for name, field in fields.items() for key, tensor in field.items()}

    def moments(self) -> dict[str, Tensor]:
        """Return the tensors in the optimizer's states, by the index of the master and the name of the state."""
        values = {f"{name} {key}": value for name, state in self.states().items() for key, value in state.items()}
        return {name.removeprefix("state "): value for name, value in values.items() if torch.is_tensor(value)}

    def initial(self) -> dict[str, Tensor]:
        """Return the copies of an adapter's initial state, or this rank's parts of them."""
        return {name: getattr(p, "ds_tensor", p) for name, p in initial_copies(self._engine.module.module).items()}

    def copies(self) -> dict[str, tuple[Tensor, int]]:
        """Return the tensors with equal parts on the ranks at stage 3, and the elements of each whole tensor.

        The last part is padded. Below stage 3, each rank has all elements.
        """
        numels = {name: whole_numel(p) for name, p in self._engine.module.module.named_parameters()}
        tensors = {name: tensor for name, tensor in self.tensors().items() if sharing_of(name) is Sharing.DIVIDED}
        return {name: (tensor, numels[name.partition(" ")[2]]) for name, tensor in tensors.items()}

    def values(self) -> dict[str, Any]:
        """Return the rest of the state: counters, numbers of the optimizer, random states."""
        return {name: field.read(self) for name, field in FIELDS.items() if field.restore is not None}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Restore the values, after the tensors were replaced. `spread_masters` must follow."""
        for name, field in FIELDS.items():
            if field.restore is not None:
                field.restore(self, values[name])

    def numbers(self) -> dict[str, dict[str, Any]]:
        """Return what the optimizer's states hold besides tensors."""
        return {
            name: {key: value for key, value in state.items() if not torch.is_tensor(value)}
            for name, state in self.states().items()
        }

    def restore_numbers(self, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        for name, state in self.states().items():
            state.update(numbers[name])

    def counters(self) -> dict[str, int]:
        return {name: getattr(self._engine, name) for name in _COUNTERS}

    def restore_counters(self, counters: Mapping[str, int]) -> None:
        for name in _COUNTERS:
            setattr(self._engine, name, counters[name])

    def period(self) -> int:
        return 0 if self.shadow is None else self.shadow.period

    def restore_period(self, period: int) -> None:
        if self.shadow is not None:
            self.shadow.period = period

    def move_rest(self, device: torch.device, *, with_optimizer: bool) -> None:
        """Move what DeepSpeed does not move: at stage 3 the masters and their states, otherwise the frozen weights."""
        if self.shadow is not None:
            self.shadow.move_to(device)
        if self._zero_stage == 3 and with_optimizer:
            for master in self.masters():
                master.data = master.data.to(device)
            for state in self._optimizer.state.values():
                state |= {key: value.to(device) for key, value in state.items() if torch.is_tensor(value)}
        elif self._zero_stage < 3:  # LoRA's base
            for parameter in self._engine.module.module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(device)

    def spread_masters(self) -> None:
        """Set the weights of the passes from the float32 weights, as after an optimizer step."""
        wrapped = self._engine.optimizer
        if self._zero_stage == 3:
            wrapped.checkpoint_event_prologue()
            for index in range(len(self.masters())):
                wrapped._reassign_or_swap_out_partitioned_parameters(index)
            wrapped.checkpoint_event_epilogue()
        elif self._zero_stage > 0:
            wrapped.update_lp_params()
        elif hasattr(wrapped, "fp16_groups"):  # of bfloat16; in float32 the weights are the masters
            for weights, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master.data)


# The declaration of the state, from which snapshots (rlhf.engine.snapshots), the files of checkpoints
# (rlhf.engine.rank_files) and resumes (rlhf.engine.resharding) derive.
FIELDS: Mapping[str, Field] = {
    "master": Field(Sharing.UPDATED, lambda state: {str(index): x for index, x in enumerate(state.masters())}),
    "state": Field(Sharing.UPDATED, RankState.moments),
    "initial": Field(Sharing.DIVIDED, RankState.initial),
    "shadow": Field(Sharing.DIVIDED, lambda state: {} if state.shadow is None else state.shadow.copies),
    "states": Field(Sharing.UPDATED, RankState.numbers, RankState.restore_numbers),
    "counters": Field(Sharing.SAME, RankState.counters, RankState.restore_counters),
    "period": Field(Sharing.SAME, RankState.period, RankState.restore_period),
    "random": Field(Sharing.OWN, lambda _: random_state(), lambda _, states: restore_random_state(states)),
}
