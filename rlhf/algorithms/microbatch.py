"""Micro-batches of an update, what a loss reads of them, and what it returns. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What the losses of one optimizer step are divided by: over all its ranks and micro-batches."""

    num_tokens: int
    num_sequences: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """All sampled tokens of one optimizer step, over its ranks and micro-batches, before its update. No gradient.

    They stand in the order of their sequences' ids, so that nothing depends on the ranks that hold them.
    """

    old_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    order: Float[Tensor, " N"]  # a random number for each, the same whenever the step is repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMicrobatch:
    """One micro-batch of the policy in flat columns. Only logprobs and entropy carry a gradient."""

    lengths: Int[Tensor, " B"]
    response_mask: Bool[Tensor, " N"]
    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    old_logprobs: Float[Tensor, " N"]
    rollout_logprobs: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"] | None  # None: the run has no reference
    advantages: Float[Tensor, " N"]
    high_entropy: Bool[Tensor, " N"] | None = None  # tokens that are trained on; None: all
    selected: Bool[Tensor, " N"] | None = None  # what the algorithm treats apart; None: nothing
    entropy_coef: float = 0.0  # of the bonus, in force


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueMicrobatch:
    """One micro-batch of the critic in flat columns. Only values carries a gradient."""

    lengths: Int[Tensor, " B"]
    response_mask: Bool[Tensor, " N"]
    values: Float[Tensor, " N"]
    old_values: Float[Tensor, " N"]
    returns: Float[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """The policy's term of each token, zero where it was not sampled, and what the metrics say of it."""

    per_token: Float[Tensor, " N"]  # with its graph
    ratio: Float[Tensor, " N"]  # the importance ratio that it reads
    clipped: Bool[Tensor, " N"]  # where the algorithm holds the ratio back
    capped: Bool[Tensor, " N"] | None = None  # where the dual clip does; None: the algorithm has none set


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """This micro-batch's share of the step's loss, and sums over its tokens for the metrics."""

    loss: Float[Tensor, ""]  # with its graph
    surrogate: Float[Tensor, ""]  # its part without KL and entropy, detached
    kl_loss: Float[Tensor, ""]  # its KL part, before the coefficient, detached
    clipped_tokens: Float[Tensor, ""]
    capped_tokens: Float[Tensor, ""] | None
    kl_old_sum: Float[Tensor, ""]
    entropy_sum: Float[Tensor, ""]
    ratio_max: Float[Tensor, ""]
    ratio_counts: Float[Tensor, " n"]  # of the sampled tokens, between rlhf.tracking.metrics.histograms.RATIO_EDGES
    correction: Correction | None  # None: the run has none


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLossTerms:
    """The same for a critic."""

    loss: Float[Tensor, ""]  # with its graph
    clipped_tokens: Float[Tensor, ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """The factors, zero outside response_mask, and where they are not the ratio itself."""

    weights: Float[Tensor, " N"]
    truncated: Bool[Tensor, " N"]  # held at a bound
    masked: Bool[Tensor, " N"]  # zero because the ratio is out of bounds
    rejected: Bool[Tensor, " N"]
