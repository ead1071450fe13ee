"""The state of a rank in DeepSpeed: everything that a checkpoint restores, as tensors to copy and replace.

The state consists of the trained weights in float32 (at stage 0 the weights themselves), the optimizer's states, the
frozen copies of an adapter's initial state, and a self-teacher's copies of the weights. At stages 1 to 3 each rank has
a share. The rest follows from the float32 weights, the settings and the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.engine.gathering import whole_numel
from rlhf.engine.randomness import random_state, restore_random_state
from rlhf.engine.shadow_weights import ShadowWeights
from rlhf.models.files.weights import initial_copies

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # DeepSpeed's


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
        masters = {f"master {i}": master for i, master in enumerate(self.masters())}
        values = {f"{name} {key}": value for name, state in self.states().items() for key, value in state.items()}
        states = {name: value for name, value in values.items() if torch.is_tensor(value)}
        copies = {name: copy for name, (copy, _) in self.copies().items()}
        return {name: tensor.detach() for name, tensor in {**masters, **states, **copies}.items()}

    def copies(self) -> dict[str, tuple[Tensor, int]]:
        """Return the copies of an adapter's initial state, and a self-teacher's, and the size of each whole copy.

        At stage 3 each rank has an equal share of the elements, the last share padded. Otherwise each rank has all.
        """
        initial = initial_copies(self._engine.module.module)
        copies = {f"initial {name}": (getattr(p, "ds_tensor", p), whole_numel(p)) for name, p in initial.items()}
        if self.shadow is not None:
            numels = self.shadow.numels()
            copies |= {f"shadow {name}": (copy, numels[name]) for name, copy in self.shadow.copies.items()}
        return copies

    def values(self) -> dict[str, Any]:
        """Return the rest of the state: counters, numbers of the optimizer, random states."""
        states = {
            name: {key: value for key, value in state.items() if not torch.is_tensor(value)}
            for name, state in self.states().items()
        }
        counters = {name: getattr(self._engine, name) for name in _COUNTERS}
        period = 0 if self.shadow is None else self.shadow.period
        return {"states": states, "counters": counters, "random": random_state(), "period": period}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Complete the state after the tensors were replaced. Collective."""
        for name, state in self.states().items():
            state.update(values["states"][name])
        for name, count in values["counters"].items():
            setattr(self._engine, name, count)
        if self.shadow is not None:
            self.shadow.period = values["period"]
        self.spread_masters()
        restore_random_state(values["random"])

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
