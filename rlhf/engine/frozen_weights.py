"""A checksum of an adapted model's frozen base, for checkpoints: a resumed run reads the base from its folder again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from rlhf.engine.gathering import whole_numel
from rlhf.engine.partitions import Sharding
from rlhf.models.files.loading import whole
from rlhf.models.files.weights import is_initial_copy


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
