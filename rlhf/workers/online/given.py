"""A rank's share of the given responses that are learned beside the rollouts of an optimizer step (CHORD).

Given responses are micro-batches of their own, after those of the rollouts in the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf.types import Examples, GivenBatch, GivenResponse
from rlhf.workers.microbatches import Microbatch

PLACEHOLDER = GivenResponse(token_ids=(0,), loss_mask=(False,))  # stands in on a rank without given responses


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenMinibatch:
    """A rank's given responses of one optimizer step."""

    batch: GivenBatch
    examples: Examples
    microbatches: tuple[Microbatch, ...]  # over the examples' columns


def given_minibatch(batch: GivenBatch | None, split: Callable[..., tuple[Microbatch, ...]]) -> GivenMinibatch | None:
    """Return the given responses of an optimizer step. None: no rank has a given response. Collective.

    `split` divides rows of a batch into micro-batches, as many as on the rank with the most.
    """
    if batch is None or not batch.num_tokens:
        return None
    held = batch.responses or (PLACEHOLDER,)
    lengths = torch.tensor([len(response.token_ids) for response in held])
    examples = Examples(
        sequence_ids=torch.arange(len(held)),
        lengths=lengths,
        token_ids=torch.tensor([token for response in held for token in response.token_ids]),
        loss_mask=torch.tensor([learned for response in held for learned in response.loss_mask]),
    )
    return GivenMinibatch(batch=batch, examples=examples, microbatches=split(lengths, range(len(batch.responses))))
