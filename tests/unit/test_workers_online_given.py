"""Given responses have their share of the gradient of an optimizer step, however the step is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.routers.recording import RoutingRecord, routers_of
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.types import BatchPlan, GivenBatch, GivenResponse, MinibatchPlan
from tests.fixtures.workers import assert_same_gradient, gradient, make_update, rollouts_of
from tests.tiny_architectures import tiny_model
from tests.unit.test_workers_online_policy import StreamedWorker, worker_of

RESPONSES = (
    GivenResponse(token_ids=(1, 2, 20, 21, 22), loss_mask=(False, False, True, True, True)),
    GivenResponse(token_ids=(5, 6, 7), loss_mask=(False, True, True)),
    GivenResponse(token_ids=(8, 9, 10, 11), loss_mask=(False, False, False, True)),
)
ADVANTAGES = {0: 2.0, 1: -1.0}


def plan(samples: tuple[tuple[int, ...], ...] = ((0, 1),)) -> BatchPlan:
    whole = MinibatchPlan(sequences_by_rank=samples, num_tokens=5, num_sequences=2)
    return BatchPlan(step=1, minibatches=(whole,), scores=dict(ADVANTAGES), kl_coef=0.0)


def given(responses: tuple[GivenResponse, ...] = RESPONSES, *, num_tokens: int = 6) -> GivenBatch:
    return GivenBatch(share=0.25, num_tokens=num_tokens, responses=responses)


def rollouts() -> Any:
    return rollouts_of((0, (1, 2, 3, 4, 5), (2, 3, 4)), (1, (1, 2, 6, 7), (2, 3)))


def updated(
    model: Any, plan: BatchPlan, batch: GivenBatch | None, *, tokens: int = 100, rank: int = 0, **algorithm: Any
) -> dict[str, Any]:
    """Add the gradient of an update to the model's, and return the metrics."""
    worker = worker_of(model, tokens=tokens, name="chord", **algorithm)
    worker.data_rank = rank
    worker.prepare(plan.for_rank(rank), rollouts())
    worker.set_advantages(ADVANTAGES)
    return dict(make_update(worker, 0, batch))


def by_hand(model: Any, *, by_uncertainty: bool) -> torch.Tensor:
    """Return 0.75 of the policy gradient and 0.25 of the mean loss of the six given tokens."""
    batch = rollouts()
    for row, advantage in enumerate(ADVANTAGES.values()):
        alone = batch.take([row])
        logprobs = policy_logprobs_only(model, alone.token_ids, alone.lengths, mask=alone.response_mask)
        (-0.75 * advantage / 5 * logprobs.sum()).backward()
    for response in RESPONSES:
        ids, mask = torch.tensor(response.token_ids), torch.tensor(response.loss_mask)
        logprobs = policy_logprobs_only(model, ids, torch.tensor([len(ids)]), mask=mask)[mask]
        p = logprobs.detach().exp()
        weights = p * (1.0 - p) if by_uncertainty else torch.ones_like(p)
        (-0.25 / 6 * (weights * logprobs).sum()).backward()
    return gradient(model)


@pytest.mark.parametrize("tokens", [100, 9])
@pytest.mark.parametrize("by_uncertainty", [True, False])
def test_the_gradient_is_that_of_a_plain_loop(by_uncertainty: bool, tokens: int) -> None:
    model = tiny_model("llama").double()
    metrics = results(updated(model, plan(), given(), tokens=tokens, by_uncertainty=by_uncertainty))
    found = gradient(model)
    model.zero_grad(set_to_none=True)
    assert_same_gradient(found, by_hand(model, by_uncertainty=by_uncertainty))
    assert metrics["update/given_share"] == 0.25
    assert metrics["update/given_nll/mean"] > metrics["update/given_loss/mean"] * (2 if by_uncertainty else 0.99)


def test_ranks_share_the_given_responses() -> None:
    """A rank without a given response, or without a rollout, adds nothing and still takes part."""
    model = tiny_model("llama").double()
    updated(model, plan(), given())
    whole = gradient(model).clone()
    for samples in (((0,), (1,)), ((0, 1), ())):
        for shares in ((RESPONSES[:2], RESPONSES[2:]), ((), RESPONSES)):
            model.zero_grad(set_to_none=True)
            parts = [updated(model, plan(samples), given(own), rank=rank) for rank, own in enumerate(shares)]
            assert_same_gradient(gradient(model), whole)
            assert results(merge_metrics(parts))["update/given_share"] == 0.25


def test_without_given_responses_the_update_is_grpos() -> None:
    model = tiny_model("llama").double()
    metrics = results(updated(model, plan(), None))
    found = gradient(model).clone()
    model.zero_grad(set_to_none=True)
    worker = worker_of(model, name="grpo")
    worker.prepare(plan(), rollouts())
    worker.set_advantages(ADVANTAGES)
    make_update(worker, 0)
    assert torch.equal(found, gradient(model))
    assert "update/given_share" not in metrics


def test_without_given_responses_in_a_step_the_rollouts_keep_their_share() -> None:
    model = tiny_model("llama").double()
    updated(model, plan(), None)
    whole = gradient(model).clone()
    model.zero_grad(set_to_none=True)
    metrics = results(updated(model, plan(), given((), num_tokens=0)))
    assert_same_gradient(gradient(model), 0.75 * whole)
    assert "update/given_share" not in metrics


@pytest.mark.parametrize("responses", [RESPONSES, ()])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
def test_a_streamed_batch_has_the_gradient_of_the_whole_batch(
    aggregation: str, responses: tuple[GivenResponse, ...]
) -> None:
    model, batch = tiny_model("llama").double(), given(responses, num_tokens=6 if responses else 0)
    whole = results(updated(model, plan(), batch, aggregation=aggregation))
    expected = gradient(model).clone()
    model.zero_grad(set_to_none=True)
    worker: Any = worker_of(model, kind=StreamedWorker, name="chord", aggregation=aggregation)
    divisors: list[float] = []
    step = worker.engine.step

    def divided(divisor: float) -> Any:
        divisors.append(divisor)
        return step(divisor)

    worker.engine.step = divided
    for portion, (sequence_id, num_tokens) in enumerate(((0, 3), (1, 2))):
        part = MinibatchPlan(sequences_by_rank=((sequence_id,),), num_tokens=num_tokens, num_sequences=1)
        of_portion = {sequence_id: ADVANTAGES[sequence_id]}
        worker.prepare(
            replace(plan(), minibatches=(part,), portion=portion, scores=of_portion),
            rollouts().of_samples([sequence_id]),
        )
        worker.set_advantages(of_portion)
        worker.forward_backward(0, ends=False)
    found = results(make_update(worker, 0, batch))
    assert_same_gradient(gradient(model) / divisors[0], expected)
    names = ["update/loss/mean", *["update/given_loss/mean", "update/given_nll/mean"] * bool(responses)]
    assert [found[name] for name in names] == pytest.approx([whole[name] for name in names], rel=1e-4)


def test_the_load_balancing_loss_is_one_mean_over_all_sequences() -> None:
    model = tiny_model("qwen3_moe")
    counts, gradients = [], []
    for coef in (0.0, 0.5):
        model.zero_grad(set_to_none=True)
        worker = worker_of(model, name="chord")
        worker.model_config = worker.model_config.model_copy(update={"router_balance_coef": coef})
        worker.prepare(plan(), rollouts())
        worker.set_advantages(ADVANTAGES)
        metrics: Any = make_update(worker, 0, given())
        counts.append(metrics["update/router_balance_loss"].count if coef else 0)
        gradients.append(gradient_of_all(model))
    assert counts == [0, 5]
    model.zero_grad(set_to_none=True)
    rows = [
        *rollouts().token_ids.split(rollouts().lengths.tolist()),
        *(torch.tensor(one.token_ids) for one in RESPONSES),
    ]
    for ids in rows:
        routing, lengths = RoutingRecord(torch.tensor([len(ids)]), None), torch.tensor([len(ids)])
        with routing.of(routers_of(model), in_order=True):
            policy_logprobs_only(model, ids, lengths, mask=torch.arange(len(ids)) > 0)
        balance = routing.balance_loss()
        assert balance is not None
        (0.5 / 5 * balance).backward()
    assert_same_gradient(gradients[1], gradients[0] + gradient_of_all(model))


def gradient_of_all(model: Any) -> torch.Tensor:
    """Return the gradient of all parameters, 0 for those without one."""
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in model.parameters()]
    )
