"""The transport of a LoRA adapter: a small folder in the run folder, written by the policy and loaded by the engines.

The base model's weights never travel, because engines and policy load the same model folder at the start.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from actors.weights.manifest import WeightManifest
from actors.weights.staging import WeightSender
from rlhf.errors import RunError, StorageFull
from rlhf.tracking.run_folder.atomic import write_aside, write_atomic

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's file names


class AdapterSender(WeightSender):
    """The policy's end. `config` is peft's. `base` names the adapted model, to enter the checksum of the adapter."""

    transport = "adapter"

    def __init__(self, folder: Path, config: Mapping[str, Any], *, base: str, rank: int) -> None:
        super().__init__(rank=rank)
        self.metadata = {"base": base}
        self.folder = folder if rank == 0 else None
        if rank == 0:
            folder.mkdir(exist_ok=True)  # a lost rank may have left it
            write_atomic(folder / CONFIG, json.dumps(dict(config)))

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Write the adapter. Returns None on all ranks but 0."""
        whole = torch.contiguous_format
        tensors = {name: w.detach().to("cpu").clone(memory_format=whole) for name, w in named_weights}
        if self.folder is None:
            return None
        path = self.folder / WEIGHTS
        try:
            write_aside(path, lambda aside: save_file(tensors, aside, metadata=self.metadata))
        except StorageFull:
            raise
        except (OSError, SafetensorError) as error:
            raise RunError(f"weight sync: the adapter could not be written to {self.folder}: {error}") from error
        fields = {"folder": str(self.folder)}
        return WeightManifest(version=version, checksum=file_checksum(path), transport=self.transport, fields=fields)

    def close(self) -> None:
        """Remove the folder. Safe to call twice."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def file_checksum(path: Path) -> str:
    return xxhash.xxh3_64(path.read_bytes()).hexdigest()
