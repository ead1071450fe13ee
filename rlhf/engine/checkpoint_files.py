"""Read the tensor files of a checkpoint without running code from them.

The loader accepts tensors, plain values and three of DeepSpeed's classes, all plain data. Import this module after
`init_distributed`, like DeepSpeed.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlhf.errors import UserError
from rlhf.tracking.run_folder.atomic import make_folder, write_aside

_HARMLESS = [LossScaler, ZeroStageEnum, fragment_address]


class DataOnlyCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """Writes checkpoint files as DeepSpeed does, without frozen weights. Refuses to run code when reading files."""

    def __init__(self, config: Any, *, frozen: frozenset[str]) -> None:
        super().__init__(config)
        self._frozen = frozen

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file without frozen weights or the extras of 4-bit weights. Wait for room on a full disk."""
        if "module" in state_dict:
            trained = {name: weight for name, weight in state_dict["module"].items() if not self.is_frozen(name)}
            state_dict = {**state_dict, "module": trained}
        save = super().save

        def write(aside: Path) -> None:
            save(state_dict, str(aside))
            with aside.open("rb") as file:
                os.fsync(file.fileno())  # NFS reports a full disk only now

        write_aside(Path(path), write)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder. Wait for room, if there is none."""
        make_folder(Path(path), parents=True, exist_ok=exist_ok)

    def is_frozen(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in self._frozen for end in range(len(parts), 0, -1))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the content of a file. Raise UserError for anything but data."""
        return load_data(Path(path), map_location=map_location)


def load_data(path: Path, *, map_location: Any = None, mapped: bool = False) -> Any:
    """Return a file's content. mapped: tensors stay on the disk. UserError for damage, or anything but data."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu" if mapped else map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or loading it would run code ({_first_line(error)}). Checkpoints hold "
            "tensors and plain values only. Use a checkpoint that this program wrote."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} cannot be read: {type(error).__name__}: {_first_line(error)}. Restore the file from a copy, or "
            "resume from an earlier checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200].rstrip(".")
