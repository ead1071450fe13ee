"""Put the trained weights of a checkpoint into a whole model, in a process outside all gangs.

The optimizer's states are not read, so the process needs memory only for the model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.frozen_weights import digest_over_ranks, load_initial_copies
from rlhf.engine.partitions import Sharding, elements
from rlhf.engine.resharding import TAG, explains_damage, read_rank, refuse_other_weights, written_partitions
from rlhf.engine.snapshot_checkpoint import SNAPSHOTS, is_of_snapshots, read_snapshot
from rlhf.models.files.loading import architecture_fingerprint
from rlhf.models.files.weights import initial_copies


def load_trained_weights(module: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Replace a model's trained weights, and the frozen copies of the initial adapter, by a checkpoint's.

    folder: the role's folder in the checkpoint, written by any number of ranks at any ZeRO stage. UserError for a
    damaged folder, or a different model. dtype: of the model's weights.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, whose files are read, would search and warn
    saved = EngineRecord.read(folder)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups = [{name: parameter.numel() for name, parameter in trained.items()}]
    changes = {"model": architecture_fingerprint(module.config), "dtype": str(dtype).removeprefix("torch.")}
    own = saved.model_copy(update=changes | {"groups": groups})
    saved.refuse_other(own, folder=folder)
    refuse_other_weights(saved, own, folder)
    saved.refuse_other_base(f"{digest_over_ranks(module, saved.sharding):016x}", folder=folder)
    has_snapshots = is_of_snapshots(folder)
    files = folder / (SNAPSHOTS if has_snapshots else TAG)
    with explains_damage(files, saved), torch.no_grad():
        for rank, partition in enumerate(written_partitions(saved)):
            masters = read_rank(files, saved, rank).masters
            for piece in partition.pieces:
                weight = trained[piece.parameter]
                weight.data = weight.data.contiguous()
                weight.view(-1)[piece.start : piece.end].copy_(elements(masters[piece.master], piece))
        if has_snapshots:
            _load_copies(module, folder, saved.sharding)
    if not has_snapshots:
        load_initial_copies(module, folder)


def _load_copies(module: Any, folder: Path, sharding: Sharding) -> None:
    """Restore the frozen copies from snapshots. At stage 3 each rank has a part of the copies, otherwise the whole."""
    copies = initial_copies(module)
    ranks = range(sharding.ranks if copies and sharding.zero_stage == 3 else min(len(copies), 1))
    snapshots = [read_snapshot(folder, rank).tensors for rank in ranks]
    for name, parameter in copies.items():
        flat = torch.cat([tensors[name].reshape(-1) for tensors in snapshots])  # the last part may be padded
        parameter.copy_(flat[: parameter.numel()].view(parameter.shape))
