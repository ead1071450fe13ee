"""Laws of the equations over random ragged batches.

Covered: values under a False mask change nothing; sequences may be permuted, and split into micro-batches and ranks;
the limits in which two estimators are equal; identical policies. Not covered: that a model's forward pass is invariant
to packing (tests of rlhf.models).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.objectives.advantages import gae, group_centered, group_normalized, leave_one_out, reward_to_go
from rlhf.objectives.aggregation import Aggregation, token_weights
from rlhf.objectives.corrections import Level, Statistic, accepted, product_ratio, token_ratio
from rlhf.objectives.kl import kl_k1, kl_k2, kl_k3
from rlhf.objectives.masking import Moments, merge_moments, moments, sequence_means, sequence_sums
from rlhf.objectives.policy_loss import clipped_loss, dual_clipped_loss, importance_ratio, reinforce
from rlhf.objectives.sequence_ratios import geometric_mean_ratio, sequence_ratio, sequence_token_ratio
from rlhf.objectives.supervised import negative_logprob
from rlhf.objectives.value_loss import clipped_value_loss, value_loss
from rlhf.objectives.weighted_loss import cispo, dro, sapo
from tests.plain_logits import dynamic_fine_tuning

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
MODES: tuple[Aggregation, ...] = get_args(Aggregation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Columns of an experience, with holes in the mask."""

    lengths: Tensor
    mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor

    def ratio(self, logprobs: Tensor) -> Tensor:
        return importance_ratio(logprobs, self.old_logprobs, self.mask)

    def rows(self, rows: list[int]) -> Batch:
        """Return the given sequences, in the given order."""
        ends = self.lengths.cumsum(0)
        tokens = torch.cat([torch.arange(int(ends[i] - self.lengths[i]), int(ends[i])) for i in rows])
        columns = ("mask", "logprobs", "old_logprobs", "values", "rewards", "advantages")
        taken = {name: getattr(self, name)[tokens] for name in columns}
        return Batch(lengths=self.lengths[rows], **taken)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw 1 to 6 sequences of 1 to 12 tokens, in float64; at least one token counts."""
    lengths = torch.tensor(draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = int(lengths.sum())
    mask = torch.rand(count, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.1]))
    mask[0] = True
    columns = [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(5)]
    logprobs = -columns[0].abs()
    return Batch(
        lengths=lengths,
        mask=mask,
        logprobs=logprobs,
        old_logprobs=logprobs - 0.5 * columns[1],
        values=columns[2],
        rewards=columns[3],
        advantages=columns[4],
    )


def gspo(batch: Batch, logprobs: Tensor, ratio: Callable[..., Tensor]) -> Tensor:
    columns = (logprobs, batch.old_logprobs, batch.mask, batch.lengths)
    return clipped_loss(ratio(*columns), batch.advantages, batch.mask, **CLIP)


def gmpo(batch: Batch, logprobs: Tensor) -> Tensor:
    columns = (logprobs, batch.old_logprobs, batch.advantages, batch.mask, batch.lengths)
    ratio = geometric_mean_ratio(*columns, **CLIP)
    return torch.where(batch.mask, -ratio * torch.where(batch.mask, batch.advantages, 0.0), 0.0)


TEMPERATURES = {"temperature_positive": 1.0, "temperature_negative": 1.05}
# Every per-token loss of one differentiable column.
LOSSES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "clipped": lambda b, x: clipped_loss(b.ratio(x), b.advantages, b.mask, **CLIP),
    "dual clip": lambda b, x: dual_clipped_loss(b.ratio(x), b.advantages, b.mask, **CLIP, max_ratio=3.0),
    "gspo": lambda b, x: gspo(b, x, sequence_ratio),
    "gspo token": lambda b, x: gspo(b, x, sequence_token_ratio),
    "gmpo": gmpo,
    "reinforce": lambda b, x: reinforce(x, b.advantages, b.mask),
    "cispo": lambda b, x: cispo(b.ratio(x), x, b.advantages, b.mask, min_ratio=0.0, max_ratio=2.0),
    "sapo": lambda b, x: sapo(b.ratio(x), b.advantages, b.mask, **TEMPERATURES),
    "dro": lambda b, x: dro(x, b.old_logprobs, b.advantages, b.mask, beta=0.1),
    "supervised": lambda b, x: negative_logprob(x, b.mask),
    "dft": lambda b, x: dynamic_fine_tuning(x, b.mask),
    "value": lambda b, x: value_loss(x, b.rewards, b.mask),
    "clipped value": lambda b, x: clipped_value_loss(x, b.old_logprobs, b.rewards, b.mask, clip=0.2),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def loss_and_gradient(
    batch: Batch, loss: Callable[[Batch, Tensor], Tensor], mode: Aggregation, step: Batch
) -> tuple[Tensor, Tensor]:
    """Return this batch's share of the loss of the step, and the gradient."""
    logprobs = batch.logprobs.clone().requires_grad_()
    counts = {"num_tokens": int(step.mask.sum()), "num_sequences": len(step.lengths), "max_new_tokens": 12}
    weights = token_weights(batch.mask, batch.lengths, mode=mode, dtype=torch.float64, **counts)
    total = (loss(batch, logprobs) * weights).sum()
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.detach(), gradient


@every_loss
@settings(max_examples=20, deadline=None)
@given(batch=batches(), mode=st.sampled_from(MODES), data=st.data())
def test_gradient_does_not_depend_on_how_the_step_is_split(
    loss: Callable[[Batch, Tensor], Tensor], batch: Batch, mode: Aggregation, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(batch.lengths))))
    cut = data.draw(st.integers(0, len(order)))
    whole, gradient = loss_and_gradient(batch.rows(order), loss, mode, batch)
    parts = [loss_and_gradient(batch.rows(rows), loss, mode, batch) for rows in (order[:cut], order[cut:]) if rows]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).sum(), whole)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


@every_loss
@settings(max_examples=20, deadline=None)
@given(batch=batches(), rubbish=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_is_masked_reaches_neither_loss_nor_gradient(
    loss: Callable[[Batch, Tensor], Tensor], batch: Batch, rubbish: float
) -> None:
    columns = ("logprobs", "old_logprobs", "values", "rewards", "advantages")
    dirty = replace(batch, **{name: torch.where(batch.mask, getattr(batch, name), rubbish) for name in columns})
    clean_loss, clean_gradient = loss_and_gradient(batch, loss, "token_mean", batch)
    dirty_loss, dirty_gradient = loss_and_gradient(dirty, loss, "token_mean", batch)
    assert torch.equal(dirty_loss, clean_loss)
    assert torch.equal(dirty_gradient, clean_gradient)
    assert not dirty_gradient[~batch.mask].any()


@settings(max_examples=50, deadline=None)
@given(batch=batches(), gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0), rubbish=st.sampled_from([math.nan, 1e30]))
def test_gae_is_its_recurrence(batch: Batch, gamma: float, lam: float, rubbish: float) -> None:
    rewards, values = (torch.where(batch.mask, column, rubbish) for column in (batch.rewards, batch.values))
    found, returns = gae(rewards, values, batch.mask, batch.lengths, gamma=gamma, lam=lam)
    expected, start = torch.zeros_like(found), 0
    for length in batch.lengths.tolist():
        next_value = next_advantage = 0.0
        for t in reversed(range(start, start + length)):
            if batch.mask[t]:
                delta = batch.rewards[t].item() + gamma * next_value - batch.values[t].item()
                next_advantage = delta + gamma * lam * next_advantage
                next_value = batch.values[t].item()
                expected[t] = next_advantage
        start += length
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(returns, torch.where(batch.mask, expected + batch.values, 0.0))


@settings(max_examples=50, deadline=None)
@given(batch=batches(), gamma=st.floats(0.5, 1.0))
def test_gae_without_values_is_the_reward_to_go(batch: Batch, gamma: float) -> None:
    zeros = torch.zeros_like(batch.rewards)
    advantages, returns = gae(batch.rewards, zeros, batch.mask, batch.lengths, gamma=gamma, lam=1.0)
    to_go = reward_to_go(batch.rewards, batch.mask, batch.lengths, gamma=gamma)
    assert torch.equal(advantages, to_go)
    assert torch.equal(returns, to_go)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), data=st.data())
def test_permuting_sequences_permutes_advantages(batch: Batch, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch.lengths))))
    permuted = batch.rows(order)
    found, _ = gae(batch.rewards, batch.values, batch.mask, batch.lengths, gamma=0.9, lam=0.8)
    again, _ = gae(permuted.rewards, permuted.values, permuted.mask, permuted.lengths, gamma=0.9, lam=0.8)
    assert torch.equal(again, replace(batch, advantages=found).rows(order).advantages)


@settings(max_examples=30, deadline=None)
@given(batch=batches())
def test_identical_policies(batch: Batch) -> None:
    x, mask, lengths = batch.logprobs, batch.mask, batch.lengths
    assert torch.equal(importance_ratio(x, x, mask), torch.ones_like(x))
    assert torch.equal(sequence_ratio(x, x, mask, lengths), torch.ones_like(x))
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert not estimator(x, x).any()
        if estimator is not kl_k1:
            assert (estimator(x.float(), batch.old_logprobs.float()) >= 0).all()
    assert torch.equal(token_ratio(x, x, mask), mask.double())
    assert torch.equal(product_ratio(x, x, mask, lengths), mask.double())


@settings(max_examples=60, deadline=None)
@given(
    batch=batches(),
    statistic=st.sampled_from(get_args(Statistic)),
    level=st.sampled_from(get_args(Level)),
    data=st.data(),
)
def test_whether_a_token_is_accepted_depends_on_its_own_sequence_alone(
    batch: Batch, statistic: Statistic, level: Level, data: st.DataObject
) -> None:
    bounds = {"low": 0.7, "high": 1.4} if statistic == "ratio" else {"low": -0.3, "high": 0.3}
    order = data.draw(st.permutations(range(len(batch.lengths))))

    def of(one: Batch, rubbish: float = 0.0) -> Tensor:
        old, rollout = (torch.where(one.mask, x, rubbish) for x in (one.logprobs, one.old_logprobs))
        return accepted(old, rollout, one.mask, one.lengths, statistic=statistic, level=level, **bounds)

    whole = of(batch)
    assert torch.equal(of(batch, math.nan), whole)
    assert not whole[~batch.mask].any()
    alone = [of(batch.rows([i])) for i in range(len(batch.lengths))]
    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(of(batch.rows(order)), torch.cat([alone[i] for i in order]))


@settings(max_examples=30, deadline=None)
@given(batch=batches(), mode=st.sampled_from(MODES))
def test_every_ratio_loss_begins_as_reinforce(batch: Batch, mode: Aggregation) -> None:
    flat = sequence_means(batch.advantages, batch.mask, batch.lengths).repeat_interleave(batch.lengths)
    fresh = replace(batch, old_logprobs=batch.logprobs, advantages=flat)  # one advantage a sequence, old is current
    _, expected = loss_and_gradient(fresh, LOSSES["reinforce"], mode, fresh)
    for name in ("clipped", "dual clip", "gspo", "gspo token", "gmpo", "cispo", "sapo", "dro"):
        _, gradient = loss_and_gradient(fresh, LOSSES[name], mode, fresh)
        torch.testing.assert_close(gradient, expected, msg=name)


@settings(max_examples=50, deadline=None)
@given(groups=st.integers(1, 5), group_size=st.integers(2, 6), shift=st.floats(-5, 5), seed=st.integers(0, 2**31))
def test_group_advantages(groups: int, group_size: int, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups * group_size, generator=generator, dtype=torch.float64)
    centered = group_centered(scores, group_size=group_size)
    assert centered.view(groups, group_size).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(group_centered(scores + shift, group_size=group_size), centered)
    torch.testing.assert_close(leave_one_out(scores, group_size=group_size), centered * group_size / (group_size - 1))
    normalized = group_normalized(scores, group_size=group_size, eps=0.0)
    torch.testing.assert_close(group_normalized(3.0 * scores + shift, group_size=group_size, eps=0.0), normalized)
    order = torch.randperm(group_size, generator=generator)
    shuffled = scores.view(groups, group_size)[:, order].flatten()
    torch.testing.assert_close(
        group_centered(shuffled, group_size=group_size), centered.view(groups, group_size)[:, order].flatten()
    )


@settings(max_examples=50, deadline=None)
@given(batch=batches(), cut=st.integers(0, 72))
def test_moments_of_ranks_merge(batch: Batch, cut: int) -> None:
    whole = moments(batch.rewards, batch.mask)
    merged = merge_moments(
        [moments(batch.rewards[part], batch.mask[part]) for part in (slice(None, cut), slice(cut, None))]
    )
    assert isinstance(merged, Moments)
    assert merged.count == whole.count
    assert math.isclose(merged.mean, whole.mean, rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(merged.squared_deviation, whole.squared_deviation, rel_tol=1e-9, abs_tol=1e-12)


@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_each_aggregation_weighs_a_constant_loss_as_it_says(batch: Batch) -> None:
    tokens, sequences = int(batch.mask.sum()), len(batch.lengths)
    counts = {"num_tokens": tokens, "num_sequences": sequences, "max_new_tokens": 12, "dtype": torch.float64}
    totals = {mode: token_weights(batch.mask, batch.lengths, mode=mode, **counts).sum().item() for mode in MODES}
    sampled = int((sequence_sums(batch.mask.double(), batch.lengths) > 0).sum())
    assert totals["token_mean"] == pytest.approx(1.0)
    assert totals["sequence_mean_token_mean"] == pytest.approx(sampled / sequences)
    assert totals["sequence_mean_token_sum"] == pytest.approx(tokens / sequences)
    assert totals["token_sum_norm"] == pytest.approx(tokens / sequences / 12)
