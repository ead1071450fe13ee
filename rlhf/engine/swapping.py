"""Let several tenants share an engine in turns: exchange the trained weights, the optimizer's states and the gradient.

DeepSpeed knows a single set of trained weights. A tenant's state is everything in this rank's masters and optimizer
states, copied bit for bit. A tenant's gradient is the sum of the tenant's backward passes. At stage 0 the gradient is
this rank's part of the sum over ranks until the optimizer step; at stage 3 each pass reduces the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.engine.partitions import Groups, Partition, Piece, Sharding, elements, partitions_of
from rlhf.engine.rank_state import RankState
from rlhf.errors import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's states with a value for each weight


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeState:
    """Trained weights and moments of a tenant, whole, in float32 on the host, by the names of the parameters."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]  # by the names in MOMENTS
    steps: int  # optimizer steps so far


@dataclass(slots=True, kw_only=True)
class Tenant:
    """The part of a rank in a tenant's state, while another tenant may use the engine."""

    tensors: dict[str, Tensor]  # by the names of RankState.tensors
    gradient: list[Tensor] | None = None  # while another tenant uses the engine
    has_gradient: bool = False


class Swapping:
    """Loads the state of one tenant after another into the engine of a rank. All ranks make the same calls in the same
    order."""

    def __init__(self, engine: Any, state: RankState, *, groups: Groups, zero_stage: int) -> None:
        """Keep the engine's division into ranks. `groups`: sizes of the trained weights."""
        self._engine, self._state, self._stage = engine, state, zero_stage
        self._parameters = {n: p for n, p in engine.module.module.named_parameters() if p.requires_grad}
        self._shapes = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in self._parameters.items()}
        ranks = dist.get_world_size()
        parts = partitions_of(groups, Sharding(ranks=ranks, zero_stage=zero_stage))
        self._partition: Partition = parts[dist.get_rank()]
        self._device = next(iter(self._parameters.values())).device
        if tuple(master.numel() for master in state.masters()) != self._partition.sizes:
            raise RunError("DeepSpeed divides the trained weights in another way than this program expects.")
        self._present: Tenant | None = None
        self._is_changed = False  # whether the engine's weights differ from the tensors of the present tenant

    def made(self, state: WholeState) -> Tenant:
        """Return a new tenant with this rank's part of a state."""
        own = self._state.tensors()
        tensors = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in own.items()}
        whole = {"master": state.weights, **{f"state {name}": of for name, of in state.moments.items()}}
        for kind, values in whole.items():
            for piece in self._partition.pieces:
                target = elements(tensors[_name_of(kind, piece)], piece)
                target.copy_(values[piece.parameter].reshape(-1)[piece.start : piece.end])
        for name in tensors:
            if name.endswith(" step"):
                tensors[name].fill_(state.steps)
        return Tenant(tensors=tensors)

    def whole(self, tenant: Tenant) -> WholeState:
        """Return the whole state of a tenant, on each rank. Collective."""
        self._save_present()
        masters, *moments = (self._gathered(tenant, kind) for kind in ("master", *(f"state {m}" for m in MOMENTS)))
        steps = next(int(tensor) for name, tensor in tenant.tensors.items() if name.endswith(" step"))
        return WholeState(weights=masters, moments=dict(zip(MOMENTS, moments, strict=True)), steps=steps)

    def only(self) -> Tenant:
        """Return the tenant of the state that is in the engine, without a copy: no other tenant may come."""
        tenant = Tenant(tensors={})
        self._present, self._is_changed = tenant, False
        return tenant

    def restart(self, module: nn.Module | None) -> None:
        """Forget the optimizer's states, and take the trained weights of a module, if given.

        module: loaded like the engine's, at stage 3 in parts.
        """
        self._state.forget_moments()
        if module is None:
            return
        masters, loaded = self._state.masters(), dict(module.named_parameters())
        with torch.no_grad():
            for piece in self._partition.pieces:
                weight: Any = loaded[piece.parameter]
                at_3 = self._stage == 3
                part = weight.ds_tensor[: piece.numel] if at_3 else weight.reshape(-1)[piece.start : piece.end]
                elements(masters[piece.master], piece).copy_(part)
        self._state.spread_masters()

    def use(self, tenant: Tenant) -> None:
        """Put a tenant into the engine, and keep the state of the present tenant. Collective at stage 3."""
        if tenant is self._present:
            return
        self._save_present()
        if self._present is not None:
            self._present.gradient = self._taken_gradient() if self._present.has_gradient else None
        with torch.no_grad():
            for name, tensor in self._state.tensors().items():
                tensor.copy_(tenant.tensors[name])
        self._state.spread_masters()
        self._put_gradient(tenant.gradient)
        self._present, tenant.gradient = tenant, None

    @property
    def can_pack(self) -> bool:
        """Whether a pass outside of the engine's weights can serve tenants: each rank has all weights and gradients."""
        return self._stage == 0

    def weights(self, tenant: Tenant) -> dict[str, Tensor]:
        """Return the trained weights of a tenant by parameter, in float32. Only at stage 0; nothing is copied."""
        self._save_present()
        pieces = self._partition.pieces
        masters = {piece.parameter: elements(tenant.tensors[_name_of("master", piece)], piece) for piece in pieces}
        return {name: values.view(self._shapes[name]) for name, values in masters.items()}

    def add_gradient(self, tenant: Tenant, gradient: Mapping[str, Tensor]) -> None:
        """Add this rank's part of a gradient, computed outside of the engine, to a tenant's gradient. Only at stage 0.

        `gradient`: the first rows and columns of some parameters, as scaled by the engine; the others have none.
        """
        if tenant is self._present:
            total = self._taken_gradient()
        else:
            total = tenant.gradient or [torch.zeros_like(parameter) for parameter in self._parameters.values()]
        for name, values in zip(self._parameters, total, strict=True):
            if name in gradient:
                own = gradient[name]
                values[tuple(map(slice, own.shape))] += own
        if tenant is self._present:
            for parameter, values in zip(self._parameters.values(), total, strict=True):
                parameter.grad = values
        else:
            tenant.gradient = total
        tenant.has_gradient = True

    def changed(self) -> None:
        """Note a change of the present tenant's state by an optimizer step."""
        self._is_changed = True

    def drop_gradient(self, tenant: Tenant) -> None:
        """Forget the gradient of a tenant."""
        tenant.gradient, tenant.has_gradient = None, False
        if tenant is self._present:
            self._put_gradient(None)

    def forget(self, tenant: Tenant) -> None:
        """Forget a tenant. The engine keeps the tenant's weights until the next tenant comes."""
        self.drop_gradient(tenant)
        if tenant is self._present:
            self._present, self._is_changed = None, False

    def _save_present(self) -> None:
        if self._present is not None and self._is_changed:
            for name, tensor in self._state.tensors().items():
                self._present.tensors[name].copy_(tensor)
        self._is_changed = False

    def _gathered(self, tenant: Tenant, kind: str) -> dict[str, Tensor]:
        flat = {name: torch.zeros(shape.numel(), device=self._device) for name, shape in self._shapes.items()}
        for piece in self._partition.pieces:
            source = elements(tenant.tensors[_name_of(kind, piece)], piece)
            flat[piece.parameter][piece.start : piece.end] = source.to(self._device)
        if self._stage == 3:  # each element is of one rank; the others add zero
            for values in flat.values():
                dist.all_reduce(values)
        return {name: values.view(self._shapes[name]).cpu() for name, values in flat.items()}

    def _taken_gradient(self) -> list[Tensor]:
        if self._stage == 3:
            return [self._engine.optimizer.grad_partitions_flat_buffer.clone()]
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters.values()]

    def _put_gradient(self, gradient: list[Tensor] | None) -> None:
        """Replace the engine's gradient. None: the next backward pass begins a new sum."""
        self._engine.optimizer.zero_grad()
        if self._stage == 3:
            optimizer = self._engine.optimizer
            buffer = optimizer.grad_partitions_flat_buffer
            if gradient is None:
                buffer.zero_()
            else:
                buffer.copy_(gradient[0])
                optimizer.micro_step_id = 1  # the next pass adds to the buffer
            return
        for index, parameter in enumerate(self._parameters.values()):
            parameter.grad = None if gradient is None else gradient[index]


def _name_of(kind: str, piece: Piece) -> str:
    """Return the name of a tensor in RankState.tensors. kind: `master`, or `state` with the name of a moment."""
    word, _, moment = kind.partition(" ")
    return f"{word} {piece.master} {moment}".rstrip()
