"""Gather the weights of a model sharded by ZeRO-3, a limited number of bytes at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.files.weights import WeightSource

_GATHER_BYTES = 256 * 2**20  # bytes of ZeRO-3 parameters gathered at once


def whole_weights(sources: list[WeightSource], dtype: torch.dtype, *, sharded: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield whole weights under their names, parameters in dtype. Each tensor is valid until the next. Collective."""
    for bucket in _buckets(sources):
        parameters = [p for source in bucket for p in source.parameters]
        with _gathered(parameters) if sharded else nullcontext(), torch.no_grad():
            for source in bucket:
                for name, weight in source.published():
                    yield name, weight.to(dtype) if source.parameters else weight


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    import deepspeed  # slow to import, and an export of whole weights does without

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return gathered


def whole_numel(parameter: nn.Parameter) -> int:
    """Count the elements of the whole parameter, also where this rank has only a share."""
    numel: int = getattr(parameter, "ds_numel", parameter.numel())
    return numel


def _buckets(sources: list[WeightSource]) -> Iterator[list[WeightSource]]:
    bucket: list[WeightSource] = []
    nbytes = 0
    for source in sources:
        size = sum(whole_numel(p) * p.element_size() for p in source.parameters)
        if bucket and nbytes + size > _GATHER_BYTES:
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(source)
        nbytes += size
    if bucket:
        yield bucket
