"""Put the trained weights of a checkpoint into a whole model, in a process outside all gangs.

The optimizer's states are not read, so the process needs memory only for the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.frozen_weights import digest_over_ranks
from rlhf.engine.partitions import elements
from rlhf.engine.rank_files import read_rank
from rlhf.engine.rank_state import Sharing
from rlhf.engine.resharding import copy_shared, explains_damage, refuse_other_weights, written_partitions
from rlhf.models.files.loading import architecture_fingerprint
from rlhf.models.files.weights import initial_copies


def load_trained_weights(module: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Replace a model's trained weights, and the frozen copies of the initial adapter, by a checkpoint's.

    folder: the role's folder in the checkpoint, written by any number of ranks at any ZeRO stage. UserError for a
    damaged folder, or a different model. dtype: of the model's weights.
    """
    saved = EngineRecord.read(folder)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups = [{name: parameter.numel() for name, parameter in trained.items()}]
    changes = {"model": architecture_fingerprint(module.config), "dtype": str(dtype).removeprefix("torch.")}
    own = saved.model_copy(update=changes | {"groups": groups})
    saved.refuse_other(own, folder=folder)
    refuse_other_weights(saved, own, folder)
    saved.refuse_other_base(f"{digest_over_ranks(module, saved.sharding):016x}", folder=folder)
    with explains_damage(folder, saved), torch.no_grad():
        for rank, partition in enumerate(written_partitions(saved)):
            saved_tensors = read_rank(folder, rank).tensors
            for piece in partition.pieces:
                weight = trained[piece.parameter]
                weight.data = weight.data.contiguous()
                weight.view(-1)[piece.start : piece.end].copy_(elements(saved_tensors[f"master {piece.master}"], piece))
        if copies := initial_copies(module):
            files = [read_rank(folder, rank).tensors for rank in Sharing.DIVIDED.writers(saved.sharding)]
            for name, copy in copies.items():
                copy_shared([file[f"initial {name}"] for file in files], copy.numel(), begin=0, target=copy)
