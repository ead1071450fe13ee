"""A second copy of a rank's trained weights, for a policy that teaches itself: a moving average or a snapshot.

Under ZeRO-3 a rank copies its shares. With LoRA only the adapter is trained, so only the adapter is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.engine.gathering import whole_numel
from rlhf.errors import UserError
from rlhf.tracking.run_folder.atomic import write_aside

_PERIOD = "period"  # in the metadata of a file
_FILE = "teacher_{:05d}.safetensors"  # in a checkpoint, by rank; below stage 3 rank 0 writes for all


class ShadowWeights:
    """Copies of the trained weights, to take the weights' place for a pass."""

    def __init__(self, engine: Any, *, sharded: bool, average: bool) -> None:
        """Copy the present weights of a DeepSpeed engine. An average is kept in float32."""
        module: nn.Module = engine.module.module
        self.period = 0  # number of the period that the copies belong to, for a user with periods
        self._optimizer, self._sharded = engine.optimizer, sharded
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.copies = {
            name: _share(p).detach().to(torch.float32 if average else p.dtype, copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """Move the copies towards the weights by a share of the difference."""
        for name, parameter in self._parameters.items():
            self.copies[name].lerp_(_share(parameter).detach().to(torch.float32), rate)

    @torch.no_grad()
    def renew(self) -> None:
        """Replace the copies by the weights."""
        for name, parameter in self._parameters.items():
            self.copies[name].copy_(_share(parameter))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let passes without a gradient use the copies. The weights themselves stay untouched. Collective."""
        weights = {name: _share(parameter).data for name, parameter in self._parameters.items()}
        self._exchange(self.copies)
        try:
            yield
        finally:
            self._exchange(weights)

    def _exchange(self, tensors: dict[str, Tensor]) -> None:
        if self._sharded:
            self._optimizer.checkpoint_event_prologue()  # releases the small weights that stay gathered
        for name, parameter in self._parameters.items():
            share = _share(parameter)
            share.data = tensors[name].to(device=share.device, dtype=share.dtype)
        if self._sharded:
            self._optimizer.checkpoint_event_epilogue()  # gathers the small weights again

    def move_to(self, device: torch.device) -> None:
        """Move the copies. The tensors keep their identity."""
        for copy in self.copies.values():
            copy.data = copy.data.to(device)

    def save(self, folder: Path) -> None:
        """Write this rank's copies into a checkpoint."""
        rank = dist.get_rank()
        if self._sharded or rank == 0:
            content = {name: copy.cpu().contiguous() for name, copy in self.copies.items()}
            period = {_PERIOD: str(self.period)}
            write_aside(folder / _FILE.format(rank), lambda aside: save_file(content, aside, metadata=period))

    def load(self, folder: Path) -> None:
        """Restore the copies, also from a checkpoint of other ranks. Raise UserError if a file is damaged.

        One weight at a time is read from the files, since all ranks of a node read the files of all ranks.
        """
        paths = sorted(folder.glob(_FILE.format(0).replace("00000", "*")))
        try:
            parts = [safe_open(path, framework="pt") for path in paths]
            self._copy_from(parts, folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"The teacher's weights in {folder} cannot be read: {error}.") from error

    def _copy_from(self, parts: Sequence[Any], folder: Path) -> None:
        """Copy the weights from the opened files of all ranks."""
        if not parts or any(set(part.keys()) != self.copies.keys() for part in parts):
            raise UserError(
                f"The checkpoint {folder} has no weights of the teacher for this run. Resume with the saved values of "
                "algorithm.teacher_weights and policy.lora, or start a new run."
            )
        self.period = int((parts[0].metadata() or {}).get(_PERIOD, 0))
        for name, copy in self.copies.items():
            tensors = [part.get_tensor(name).flatten() for part in parts]
            whole = torch.cat(tensors)[: whole_numel(self._parameters[name])]
            if self._sharded:
                whole = whole[dist.get_rank() * copy.numel() :][: copy.numel()]
                copy.zero_().flatten()[: len(whole)].copy_(whole)
            else:
                copy.copy_(whole.view_as(copy))


def _share(parameter: nn.Parameter) -> Any:
    """Return the rank's share of a parameter: the parameter itself below ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter)
