"""Calls of several adapters in one pass equal the calls alone, in float64: losses, log-probabilities, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf.adapters import AdapterCall, AdapterShape, LossRows, NamedLoss
from rlhf.engine.swapping import Tenant
from rlhf.errors import RunError, UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.adapters.slot import AdapterSlot
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import row_layout
from rlhf.objectives.client_losses import LOSSES
from rlhf.workers.adapters.adapter_worker import AdapterWorker, HeldAdapter, merged_outcome, merged_report
from tests.fixtures.workers import PLACE, engine_of
from tests.integration.rank_gang import small_config

CPU = torch.device("cpu")
SHAPES = {
    "all": AdapterShape(rank=3, alpha=6.0, seed=1),
    "attention": AdapterShape(rank=4, alpha=32.0, mlp=False, seed=2),
    "mlp": AdapterShape(rank=1, alpha=5.0, attention=False, seed=3),
    "small": AdapterShape(rank=2, alpha=8.0, mlp=False, seed=4),
}
TARGETS = {"all": 1, "attention": 3, "mlp": 1, "small": 1}


class Turns:
    """Swapping without an optimizer: each tenant has weights and a gradient by parameter."""

    can_pack = True

    def __init__(self, model: Any) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients: dict[int, dict[str, Tensor]] = {}

    def weights(self, tenant: Tenant) -> Mapping[str, Tensor]:
        return tenant.tensors

    def use(self, tenant: Tenant) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tenant.tensors[name])
            parameter.grad = self.gradients.setdefault(id(tenant), self._zeros())[name]

    def add_gradient(self, tenant: Tenant, gradient: Mapping[str, Tensor]) -> None:
        total = self.gradients.setdefault(id(tenant), self._zeros())
        for name, values in gradient.items():
            total[name][tuple(map(slice, values.shape))] += values

    def drop_gradient(self, tenant: Tenant) -> None:
        self.gradients[id(tenant)] = self._zeros()

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}


class Worker(AdapterWorker):
    """A worker of a single rank, with the model as the engine and random adapters."""

    def __init__(self, model: Any, *, budget: int) -> None:
        self.config: Any = SimpleNamespace(train=SimpleNamespace(max_tokens_per_microbatch=budget))
        self.model_config: Any = SimpleNamespace(dtype="float64")
        self.place = replace(PLACE, longest_sequence=12)
        self.resources: Any = SimpleNamespace(data_parallel_ranks=1)
        self.data_rank, self.device, self.engine, self.layout = 0, CPU, engine_of(model), row_layout(model)
        self.slot, self.swapping = AdapterSlot(model), Turns(model)  # type: ignore[assignment]
        self.adapters = {}
        torch.manual_seed(4)
        for name, shape in SHAPES.items():
            drawn = {
                n: torch.randn_like(v) * 0.2 for n, v in self.slot.trimmed(shape, self.slot.initial(shape)).items()
            }
            values = {n: v.double() for n, v in self.slot.padded(shape, drawn).items()}
            self.adapters[name] = HeldAdapter(shape=shape, tenant=Tenant(tensors=values))

    def gradient(self, name: str) -> Tensor:
        found = self.swapping.gradients[id(self.adapters[name].tenant)]  # type: ignore[attr-defined]
        return torch.cat([values.flatten() for values in found.values()])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(small_config()), rank=4, alpha=4.0, dropout=0.0).train()
    check_rows(model, CPU)
    return model.double()


def call_of(
    name: str, loss: str, *, seed: int, targets: int = 1, lengths: tuple[int, ...] = (7, 3, 10, 1)
) -> AdapterCall:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), targets)
    tokens, wanted = torch.randint(40, shape[:1], generator=generator), torch.randint(40, shape, generator=generator)
    if seed % 2 and targets == 1:  # each target is the next token
        wanted[:-1, 0] = tokens[1:]
    columns: dict[str, Tensor] = {"weights": torch.rand(shape, generator=generator)}
    if LOSSES[loss].columns:
        columns["advantages"] = torch.rand(shape, generator=generator) - 0.5
        columns["logprobs"] = -torch.rand(shape, generator=generator) * 3.0 - 2.0
    if loss == "gspo":
        columns["sequence_ratio_mask"] = torch.ones(shape)
    rows = LossRows(token_ids=tokens, lengths=torch.tensor(lengths), targets=wanted, columns=columns)
    return AdapterCall(adapter=name, rows=rows, loss=NamedLoss(name=loss))


def assert_as_alone(model: Any, calls: list[AdapterCall], *, budget: int) -> None:
    packed, turns = Worker(model, budget=budget), Worker(model, budget=budget)
    for _ in range(2):  # the second pass adds to the gradients of the first
        outcomes = packed.forward_backward_packed(calls)
        for call, outcome in zip(calls, outcomes, strict=True):
            ours = merged_outcome([outcome])
            theirs = merged_report([turns.forward_backward(call.adapter, call.rows, call.loss)])
            assert not isinstance(ours, UserError | RunError)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
            assert ours.metrics == theirs.metrics
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-6, atol=1e-6)
    for call in calls:
        found, expected = packed.gradient(call.adapter), turns.gradient(call.adapter)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("budget", [1000, 24, 12])
@pytest.mark.parametrize("loss", LOSSES)
def test_packed_calls_equal_calls_alone(model: Any, monkeypatch: pytest.MonkeyPatch, loss: str, budget: int) -> None:
    losses = list(LOSSES)
    others = [losses[(losses.index(loss) + step) % len(losses)] for step in range(len(SHAPES))]
    names = dict(zip(SHAPES, others, strict=True))
    calls = [
        call_of(name, of, seed=seed, targets=1 if of == "gspo" else TARGETS[name])
        for seed, (name, of) in enumerate(names.items())
    ]
    with monkeypatch.context() as patch:
        assert_as_alone(model, calls, budget=budget)
        patch.setattr(Worker, "_alone", None)  # nothing above needs turns
        Worker(model, budget=budget).forward_backward_packed(calls)


def test_the_models_own_adapter_is_there_again_after_a_pass(model: Any) -> None:
    calls = [call_of("attention", "ppo", seed=1), call_of("small", "dro", seed=2, lengths=(5, 5))]
    before = {name: module for name, module in model.named_modules()}
    assert_as_alone(model, calls, budget=1000)
    assert {name: module for name, module in model.named_modules()} == before
    assert all(not layer._disable_adapters for layer in AdapterSlot(model).all_layers.values())


def test_a_failed_call_takes_no_other_call_down(model: Any) -> None:
    good = [call_of("all", "ppo", seed=1), call_of("attention", "cross_entropy", seed=2)]
    sent = call_of("mlp", "importance_sampling", seed=3)
    overflowing = {**sent.rows.columns, "logprobs": torch.full_like(sent.rows.columns["logprobs"], -2e3)}
    for bad, why in (
        (replace(sent, loss=NamedLoss(name="nonsense")), "there is no 'nonsense'"),
        (replace(sent, rows=replace(sent.rows, columns={})), "needs this column"),
        (replace(sent, adapter="nobody"), "There is no adapter nobody"),
        (replace(sent, rows=replace(sent.rows, columns=overflowing)), "is not finite for these rows"),
    ):
        packed, turns = Worker(model, budget=1000), Worker(model, budget=1000)
        first, error, last = packed.forward_backward_packed([good[0], bad, good[1]])
        assert isinstance(error, UserError)
        assert why in str(error)
        if bad.adapter == "mlp":
            assert why in str(packed.adapters["mlp"].dropped_because)
        for call, outcome in zip(good, (first, last), strict=True):
            alone = turns.forward_backward(call.adapter, call.rows, call.loss)
            assert merged_report([outcome]).loss == pytest.approx(merged_report([alone]).loss, rel=1e-9)
            torch.testing.assert_close(packed.gradient(call.adapter), turns.gradient(call.adapter))


def test_weights_that_are_not_finite_stay_with_their_adapter(model: Any) -> None:
    packed, turns = Worker(model, budget=1000), Worker(model, budget=1000)
    for values in packed.adapters["mlp"].tenant.tensors.values():
        values[0] = torch.inf
    calls = [call_of("all", "ppo", seed=1), call_of("mlp", "ppo", seed=2)]
    outcome, error = packed.forward_backward_packed(calls)
    assert "not finite" in str(error)
    turns.forward_backward("all", calls[0].rows, calls[0].loss)
    assert not isinstance(outcome, UserError | RunError)
    torch.testing.assert_close(packed.gradient("all"), turns.gradient("all"))
    assert bool(packed.gradient("all").isfinite().all())


@pytest.mark.parametrize("fault", ["memory", "gradient"])
def test_a_pass_that_fails_is_divided_into_turns(model: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    packed, turns = Worker(model, budget=1000), Worker(model, budget=1000)
    forward, sizes = packed.engine.forward, [0]

    def limited(function: Any, token_ids: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(token_ids))
        if sizes[-1] > 30 and fault == "memory":
            raise torch.OutOfMemoryError("too many tokens")
        return forward(function, token_ids, *args, **options)

    def backward(loss: Tensor, last: bool) -> None:
        (loss * (torch.inf if sizes[-1] > 30 else 1.0)).backward()

    monkeypatch.setattr(packed.engine, "forward", limited)
    monkeypatch.setattr(packed.engine, "backward", backward)
    calls = [call_of("all", "ppo", seed=1), call_of("mlp", "ppo", seed=2)]
    assert all(not isinstance(one, UserError | RunError) for one in packed.forward_backward_packed(calls))
    assert max(sizes) > 30
    for call in calls:
        turns.forward_backward(call.adapter, call.rows, call.loss)
        assert torch.equal(packed.gradient(call.adapter), turns.gradient(call.adapter))
