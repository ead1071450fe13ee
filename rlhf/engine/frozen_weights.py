"""Frozen weights of an adapted model in checkpoints: a checksum of the base, and whole copies of the initial adapter.

A resumed run reads the base from the model's folder again. The initial adapter must be stored: computed again on a
different machine, PiSSA's SVD gives other bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.engine.gathering import whole_numel
from rlhf.engine.partitions import Sharding
from rlhf.errors import UserError
from rlhf.models.files.loading import whole
from rlhf.models.files.weights import initial_copies, is_initial_copy
from rlhf.tracking.run_folder.atomic import write_aside

_COPIES = "initial.safetensors"  # file of a checkpoint


def digest_of_base(module: nn.Module) -> int:
    """Return a 48-bit checksum of this rank's frozen weights, or of the rank's shares, without the copies."""
    digest = xxhash.xxh3_64()
    for parameter in _base_weights(module):
        share: Any = getattr(parameter, "ds_tensor", None)  # ZeRO-3's
        if share is None:
            _add(digest, parameter.detach().reshape(-1))
        else:  # without its padding
            _add(digest, share[: max(0, whole_numel(parameter) - dist.get_rank() * share.numel())])
    return _shortened(digest)


def digest_over_ranks(module: nn.Module, sharding: Sharding) -> int:
    """Return the sum of the checksums of all ranks, as ranks with this sharding would compute the sum. Collective."""
    parts = sharding.ranks if sharding.zero_stage == 3 else 1
    digests = [xxhash.xxh3_64() for _ in range(parts)]
    for parameter in _base_weights(module):
        with whole([parameter]):
            weights = parameter.detach().reshape(-1)
            for digest, share in zip(digests, weights.split(-(-weights.numel() // parts)), strict=False):
                _add(digest, share)
    return sum(map(_shortened, digests)) * (sharding.ranks // parts)


def _base_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for name, p in module.named_parameters() if not p.requires_grad and not is_initial_copy(name))


def _add(digest: xxhash.xxh3_64, weights: Tensor) -> None:
    content: Any = weights.contiguous().cpu().view(torch.uint8).numpy()
    digest.update(content)


def _shortened(digest: xxhash.xxh3_64) -> int:
    return digest.intdigest() >> 16  # so that a sum over ranks does not overflow


def save_initial_copies(module: nn.Module, folder: Path) -> None:
    """Write the frozen copies of the initial adapter into a checkpoint, if there are any. Collective."""
    copies = initial_copies(module)
    with whole(list(copies.values())):
        if copies and dist.get_rank() == 0:
            content = {name: p.detach().cpu().contiguous() for name, p in copies.items()}
            write_aside(folder / _COPIES, lambda aside: save_file(content, aside))


def load_initial_copies(module: nn.Module, folder: Path) -> None:
    """Restore the copies. Raise UserError if the file is damaged, or of another adapter. Collective."""
    copies, path = initial_copies(module), folder / _COPIES
    if not copies:
        return
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        message = f"{path} cannot be read: {error}. The file holds the initial weights of the adapter."
        raise UserError(message) from error
    with whole(list(copies.values())), torch.no_grad():
        if {name: copy.shape for name, copy in saved.items()} != {name: copy.shape for name, copy in copies.items()}:
            raise UserError(f"{path} holds the initial weights of another adapter.")
        for name, parameter in copies.items():
            parameter.copy_(saved[name])
