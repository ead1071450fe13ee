"""Replace the policy loss of each token by another algorithm's, or by a function of the user, for a single gradient.

Aggregation, correction, KL penalty and entropy bonus stay those of the configured algorithm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.algorithm import AlgorithmConfig
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import OnlineAlgorithm, unclipped
from rlhf.deferred import torch
from rlhf.errors import UserError
from rlhf.extensions import CodeSource, LoadError, load_code, summarize
from rlhf.types import OwnLoss


def with_own_loss(configured: OnlineAlgorithm, loss: OwnLoss) -> OnlineAlgorithm:
    """Return the configured algorithm with another policy loss. UserError: the function cannot be loaded."""
    replaced: Any = copy.copy(configured)
    if loss.source is None:
        assert isinstance(loss.section, AlgorithmConfig)
        replaced.surrogate = algorithm_of(loss.section, OnlineAlgorithm).surrogate
        return replaced  # type: ignore[no-any-return]
    try:
        function = load_code(loss.source)
    except LoadError as error:
        raise UserError(f"loss: {error}") from error
    replaced.surrogate = partial(_surrogate, function, loss.source)
    return replaced  # type: ignore[no-any-return]


def _surrogate(function: Callable[[PolicyMicrobatch], Any], source: CodeSource, batch: PolicyMicrobatch) -> Surrogate:
    """Return the result of a user's function. UserError: the function raised, or returned no loss of each token."""
    name = source.name.removeprefix("python object ")
    try:
        result = function(batch)
    except Exception as error:
        raise UserError(f"loss: `{name}` raised {summarize(error, source.path)}") from error
    per_token = result.per_token if isinstance(result, Surrogate) else result
    if not isinstance(per_token, torch.Tensor) or per_token.shape != batch.logprobs.shape:
        shape = tuple(per_token.shape) if isinstance(per_token, torch.Tensor) else type(per_token).__name__
        raise UserError(
            f"loss: `{name}` returned {shape}, expected a tensor with the loss of each token, of shape "
            f"{tuple(batch.logprobs.shape)} as batch.logprobs."
        )
    if not per_token.requires_grad:
        raise UserError(f"loss: the result of `{name}` has no gradient. Compute the loss from batch.logprobs.")
    return result if isinstance(result, Surrogate) else unclipped(batch, per_token)
