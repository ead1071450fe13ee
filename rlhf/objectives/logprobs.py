"""Compute log-probabilities of chosen tokens and the entropy of the distributions.

Every loss, KL and importance ratio starts here. The vocabulary head is applied to the hidden states of a few hundred
tokens at a time. The backward pass recomputes the logits, so no [tokens, vocabulary] matrix ever exists. Reductions
happen in float32 (float64 for float64 input). Nothing here knows sequences, masks or shifts by one: row n of `hidden`
predicts `targets[n]`.

The distribution is softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature), with softcap(x) = c *
tanh(x / c) as in Gemma 2 (arXiv:2408.00118, section 2). The temperature may be a single number or a number per row.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.objectives.vocabulary_head import (
    Factors,
    Head,
    HeadOptions,
    ProductGradients,
    chunks,
    widened,
)

_Extra = Literal["entropy", "entropy_grad", "collision"]  # what a pass computes besides logprobs


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves one log-normaliser per row; the backward pass recomputes the logits chunk by chunk.

    `targets` has one or several tokens for each row, [N, m], and so have the log-probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        extras: frozenset[_Extra],
    ) -> tuple[Tensor, Tensor, Tensor]:
        entropy, collision, normaliser = (widened(hidden.new_empty(0)).new_zeros(len(targets)) for _ in range(3))
        logprobs = entropy.new_zeros(targets.shape)
        factors = Factors.of(hidden, weight, bias)
        for rows in chunks(len(targets), head.chunk_size):
            logits = head.logits(factors, rows)
            chosen = logits.gather(-1, targets[rows])
            normaliser[rows] = logits.logsumexp(-1)
            logprobs[rows] = chosen - normaliser[rows, None]
            if extras:
                log_p = logits.sub_(normaliser[rows, None])
                if "collision" in extras:
                    collision[rows] = log_p.mul_(2.0).logsumexp(-1)
                else:
                    entropy[rows] = -torch.linalg.vecdot(log_p.exp(), log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(collision, *(() if "entropy_grad" in extras else (entropy,)))
        return logprobs, entropy, collision

    @staticmethod
    def backward(
        ctx: Any, logprobs_grad: Tensor | None, entropy_grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        head: Head = ctx.head
        factors = Factors.of(hidden, weight, bias)
        gradients = ProductGradients(factors, needed=ctx.needs_input_grad[:3])

        def gradient_of(rows: slice) -> tuple[Tensor, Tensor]:
            logits = head.logits(factors, rows)
            p = (logits - normaliser[rows, None]).exp_()
            slope = torch.zeros_like(p[:, :1])  # grad = -p * slope, and one more entry at the target
            if entropy_grad is not None:  # d entropy / d logit_j = -p_j (log p_j + entropy)
                slope = (logits + (entropy - normaliser)[rows, None]).mul_(entropy_grad[rows, None])
            if logprobs_grad is not None:  # d logprob / d logit_j = 1[j = target] - p_j
                slope += logprobs_grad[rows].sum(-1, keepdim=True)
            grad = p.mul_(slope.neg_())
            if logprobs_grad is not None:
                grad.scatter_add_(-1, targets[rows], logprobs_grad[rows])
            return grad, logits

        gradients.collect(len(targets), head, gradient_of)
        return *gradients.totals(hidden.dtype, weight.dtype), None, None, None


class _WeightedLogprobSum(torch.autograd.Function):
    """Computes sum(weights * logprobs), and already in the forward pass the gradient, from the same logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor,
        head: Head,
        by_probability: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = widened(hidden.new_empty(0)).new_empty(len(targets))
        token_weights = token_weights.to(logprobs.dtype, copy=True)
        is_top1 = torch.empty_like(targets, dtype=torch.bool)
        factors = Factors.of(hidden, weight, bias)
        gradients = ProductGradients(factors, needed=ctx.needs_input_grad[:3])

        def gradient_of(rows: slice) -> tuple[Tensor, Tensor] | None:
            logits = head.logits(factors, rows)
            is_top1[rows] = logits.argmax(-1) == targets[rows]
            log_p = logits.log_softmax(-1)
            logprobs[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
            if by_probability:
                token_weights[rows] *= logprobs[rows].exp()
            if not any(ctx.needs_input_grad[:3]):
                return None
            outer = token_weights[rows, None]
            return log_p.exp_().mul_(-outer).scatter_add_(-1, targets[rows, None], outer), logits

        gradients.collect(len(targets), head, gradient_of)
        ctx.save_for_backward(*gradients.totals(hidden.dtype, weight.dtype))
        ctx.mark_non_differentiable(logprobs, is_top1)
        return torch.dot(logprobs, token_weights), logprobs, is_top1

    @staticmethod
    def backward(
        ctx: Any, outer: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, bias = (g if g is None else g * outer.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None, None


def chunked_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, "N ..."],
    *,
    entropy_grad: bool = False,
    **options: Unpack[HeadOptions],
) -> tuple[Float[Tensor, "N ..."], Float[Tensor, " N"]]:
    """Return (logprobs, entropy) of each row, in nats. logprobs have a gradient; entropy has a gradient only with
    entropy_grad. A row may have m targets: logprobs then have m columns."""
    head = Head(**options)
    extras = frozenset({"entropy", "entropy_grad"} if entropy_grad else {"entropy"})
    columns = targets[:, None] if targets.ndim == 1 else targets
    logprobs, entropy, _ = _ChunkedLogprobs.apply(hidden, weight, head.bias, columns, head, extras)
    return logprobs.view(targets.shape), entropy


def renormalised(
    logprobs: Float[Tensor, "N m"], support: Bool[Tensor, "N k"], mask: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return each token's log-probability among the tokens of its support; 0 outside of mask.

    `logprobs` has the token first and then k candidate tokens. `support` marks the kept candidates, also the token. The
    result is the distribution of a sampler with top-k, top-p or min-p, which normalises over the kept tokens.
    """
    kept = torch.where(support & mask[:, None], logprobs[:, 1:], -torch.inf)
    kept = torch.where(mask[:, None], kept, 0.0)  # no row of -inf alone, which has no gradient
    return torch.where(mask, logprobs[:, 0] - kept.logsumexp(-1), 0.0)


def chunked_logprobs_only(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, "N ..."],
    **options: Unpack[HeadOptions],
) -> Float[Tensor, "N ..."]:
    """Return the logprobs of `chunked_logprobs` without computing the entropy."""
    head = Head(**options)
    columns = targets[:, None] if targets.ndim == 1 else targets
    logprobs: Tensor = _ChunkedLogprobs.apply(hidden, weight, head.bias, columns, head, frozenset())[0]
    return logprobs.view(targets.shape)


def chunked_logprobs_and_collisions(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    **options: Unpack[HeadOptions],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return (logprobs, log of the probability that two draws are equal) of each row. The second has no gradient."""
    head = Head(**options)
    extras: frozenset[_Extra] = frozenset({"collision"})
    logprobs, _, collision = _ChunkedLogprobs.apply(hidden, weight, head.bias, targets[:, None], head, extras)
    return logprobs[:, 0], collision


def weighted_logprob_sum(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
    *,
    by_probability: bool = False,
    **options: Unpack[HeadOptions],
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return (sum of token_weights * logprobs, logprobs, is_top1). Only the sum has a gradient.

    by_probability: each weight is multiplied by the token's probability, without gradient. With negative weights the
    sum is that of dynamic fine-tuning (DFT, arXiv:2508.05629).

    Use this function for losses with weights known beforehand, such as the supervised loss with token_weights = -1 /
    num_step_tokens. The head is applied once, not twice as in `chunked_logprobs`: equally exact, and cheaper by a
    quarter of the head's work. The cost is memory for a gradient of the head's weight between the forward and the
    backward pass.
    """
    head = Head(**options)
    results: tuple[Tensor, Tensor, Tensor] = _WeightedLogprobSum.apply(
        hidden, weight, head.bias, targets, token_weights, head, by_probability
    )
    return results
