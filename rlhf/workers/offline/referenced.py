"""A policy trained on pairs of sequences against a reference: the policy's log-probabilities before training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.types import Examples, MinibatchPlan, TokenValues
from rlhf.workers.microbatches import Microbatch, split_microbatches
from rlhf.workers.model_worker import torch_dtype
from rlhf.workers.offline.offline_worker import PairsWorker
from rlhf.workers.offline.reference_cache import read_columns, reference_key, write_columns

T = TypeVar("T")

# Mean |difference| per token between stored values and values from different kernels.
SPOT_CHECK_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}


class ReferencedPolicy(PairsWorker):
    """The language model, with the reference's log-probabilities."""

    def reference_key(self, dataset: int) -> str:
        dtype = torch_dtype(self.model_config.dtype)
        return reference_key(self.fingerprint, self.engine.named_weights(dtype), self.sets[dataset].examples)

    def reference_logprobs(self, dataset: int, plan: MinibatchPlan) -> tuple[TokenValues, int]:
        """Return the log-probabilities of the rows' tokens under the current weights, and their number. Collective."""
        batch = self.batch(dataset, plan)
        examples = batch.examples
        values = torch.zeros(len(examples.token_ids))
        for microbatch, logprobs in self.passes("reference", batch.microbatches, partial(self.logprobs, examples)):
            values[microbatch.tokens] = logprobs.float().cpu()
        column = TokenValues(sequence_ids=examples.sequence_ids, lengths=examples.lengths, values=values)
        return (column, len(values)) if batch.rows else (column.take(()), 0)

    def store_reference(self, dataset: int, path: Path, *columns: TokenValues) -> None:
        """Store the columns computed by all ranks. The first rank writes the columns to the cache."""
        examples = self.sets[dataset].examples
        self.references[dataset] = TokenValues.gather(columns, examples.sequence_ids.tolist())
        if self.place.rank == 0:
            write_columns(path, self.references[dataset])

    def read_reference(self, dataset: int, path: Path, *, compare: bool = True) -> bool:
        """Read stored columns. False: they are damaged or, with `compare`, disagree with the weights. Collective."""
        examples = self.sets[dataset].examples
        cached = read_columns(path, examples)
        if not compare:
            self.references |= {} if cached is None else {dataset: cached}
            return cached is not None
        lengths = examples.lengths.tolist()
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        (microbatch,) = split_microbatches(lengths, [longest], max_tokens=lengths[longest])
        with torch.no_grad():
            logprobs = self.logprobs(examples, microbatch).float().cpu()
        if cached is None:
            return False
        count = int(examples.loss_mask[microbatch.tokens].sum())
        difference = float((logprobs - cached.values[microbatch.tokens]).abs().sum()) / count
        if not difference <= SPOT_CHECK_TOLERANCE[self.model_config.dtype]:
            return False
        self.references[dataset] = cached
        return True

    def logprobs(self, examples: Examples, microbatch: Microbatch) -> Float[Tensor, " n"]:
        """Return the log-probabilities of the tokens in the loss mask, 0 elsewhere."""
        return self.forward(policy_logprobs_only, examples, microbatch)

    def forward(self, function: Callable[..., T], examples: Examples, microbatch: Microbatch) -> T:
        return self.engine.forward(
            function,
            self.part(examples.token_ids, microbatch),
            microbatch.lengths.to(self.device),
            mask=self.part(examples.loss_mask, microbatch),
            branches=microbatch.branches,
            temperature=self.temperature(examples, microbatch),
        )

    def temperature(self, examples: Examples, microbatch: Microbatch) -> float | Float[Tensor, " n"]:
        """Return the temperature of the log-probabilities, 1 for fixed data."""
        return 1.0
