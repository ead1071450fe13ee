"""A client's loss through packed rows equals a plain loop over single rows, in float64, with its gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf.adapters import LossReport, LossRows, NamedLoss
from rlhf.errors import UserError
from rlhf.models.packed.row_check import check_rows
from rlhf.objectives.client_losses import LOSSES, checked_settings, client_loss
from rlhf.workers.adapters.adapter_worker import RowsReport, merged_report
from tests.fixtures.adapter_rank import OnlyRank, with_adapter
from tests.integration.rank_gang import small_config

CPU = torch.device("cpu")
LENGTHS = [7, 3, 11, 5, 1]


def adapted() -> Any:
    """Return a model with a slot of rank 4 that holds a random adapter of rank 3."""
    torch.manual_seed(0)
    return with_adapter(LlamaForCausalLM(small_config()))


def drawn(loss: str, *, targets: int, shifted: bool) -> LossRows:
    generator = torch.Generator().manual_seed(3)
    shape = (sum(LENGTHS), targets)
    tokens = torch.randint(40, shape[:1], generator=generator)
    wanted = torch.randint(40, shape, generator=generator)
    if shifted:
        ends = torch.tensor(LENGTHS).cumsum(0) - 1
        inside = [place for place in range(shape[0]) if place not in ends.tolist()]
        wanted[inside, 0] = tokens[[place + 1 for place in inside]]
    columns: dict[str, Tensor] = {"weights": torch.rand(shape, generator=generator)}
    if LOSSES[loss].columns:
        columns["advantages"] = torch.rand(shape, generator=generator) - 0.5
        columns["logprobs"] = -torch.rand(shape, generator=generator) * 3.0 - 2.0
    if loss == "gspo":
        columns["sequence_ratio_mask"] = torch.ones(shape)
    return LossRows(token_ids=tokens, lengths=torch.tensor(LENGTHS), targets=wanted, columns=columns)


def plain_logprobs(model: Any, rows: LossRows) -> list[Tensor]:
    """Return the log-probabilities of the targets of each row, computed alone by the model's own forward pass."""
    found, begin = [], 0
    for length in LENGTHS:
        own = slice(begin, begin + length)
        logits = model(input_ids=rows.token_ids[own][None], use_cache=False).logits[0]
        found.append(logits.log_softmax(-1).gather(-1, rows.targets[own]))
        begin += length
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Return the model for packed rows, and a copy for single rows."""
    plain = adapted()
    packed = copy.deepcopy(plain)
    check_rows(packed, CPU)
    return packed.double(), plain.double()


def assert_equal(report: LossReport, packed: Any, loss: Tensor, logprobs: list[Tensor], plain: Any) -> None:
    assert report.loss == pytest.approx(float(loss), rel=1e-9)
    torch.testing.assert_close(report.logprobs, torch.cat(logprobs).float(), rtol=1e-6, atol=1e-6)
    loss.backward()
    ours, theirs = gradients(packed), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 7 * 2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3


@pytest.mark.parametrize(
    ("loss", "targets", "shifted", "budget"),
    [
        (loss, *case)
        for loss in LOSSES
        for case in ((1, True, 1000), (1, False, 14), (3, False, 20))
        if (loss, case[0]) != ("gspo", 3)
    ],  # whose ratio is of a sequence
)
def test_every_loss_and_its_gradient_equal_a_loop_over_single_rows(
    models: tuple[Any, Any], loss: str, targets: int, shifted: bool, budget: int
) -> None:
    packed, plain = models
    rows = drawn(loss, targets=targets, shifted=shifted)
    report = merged_report([OnlyRank(packed, budget=budget).forward_backward("mine", rows, NamedLoss(name=loss))])
    logprobs, total, begin = plain_logprobs(plain, rows), torch.zeros((), dtype=torch.float64), 0
    for length, own in zip(LENGTHS, logprobs, strict=True):
        columns = {name: column[begin : begin + length] for name, column in rows.columns.items()}
        options: dict[str, Any] = {"mask": torch.ones(length, dtype=torch.bool), "lengths": torch.tensor([length])}
        total = total + client_loss(loss, own, columns, settings=checked_settings(loss, {}), **options).terms.sum()
        begin += length
    assert_equal(report, packed, total, [one.detach() for one in logprobs], plain)


def test_a_custom_loss_by_log_probabilities_out_and_gradients_in(models: tuple[Any, Any]) -> None:
    packed, plain = models
    rows = replace(drawn("cross_entropy", targets=1, shifted=True), columns={})
    worker = OnlyRank(packed, budget=30)

    def custom(logprobs: list[Tensor]) -> Tensor:  # couples the rows
        sums = torch.stack([one.sum() for one in logprobs])
        return -torch.nn.functional.logsigmoid(0.1 * (sums[0] - sums[1:])).sum() + sums.var()

    first = merged_report([worker.forward_backward("mine", rows, NamedLoss(name="cross_entropy"), forward_only=True)])
    assert not gradients(packed)
    given = first.logprobs.double().requires_grad_()
    custom(list(given.split(LENGTHS))).backward()
    assert given.grad is not None
    weighted = replace(rows, columns={"weights": -given.grad})
    worker.forward_backward("mine", weighted, NamedLoss(name="cross_entropy"))
    custom(plain_logprobs(plain, rows)).backward()
    ours, theirs = gradients(packed), gradients(plain)
    error = torch.nn.utils.get_total_norm([ours[name] - gradient for name, gradient in theirs.items()])
    assert error < 1e-6 * torch.nn.utils.get_total_norm(theirs.values())  # log-probabilities and weights are float32


def test_padding_of_the_slot_has_no_gradient(models: tuple[Any, Any]) -> None:
    packed, _ = models
    OnlyRank(packed, budget=30).forward_backward("mine", drawn("ppo", targets=1, shifted=True), NamedLoss(name="ppo"))
    found = gradients(packed)
    assert all(not bool(g[3:].any()) for name, g in found.items() if ".lora_A." in name)
    assert all(not bool(g[:, 3:].any()) for name, g in found.items() if ".lora_B." in name)


def test_a_failed_part_of_a_batch_drops_the_whole_batch(models: tuple[Any, Any]) -> None:
    packed, _ = models
    worker, good, loss = (
        OnlyRank(packed, budget=30),
        drawn("ppo", targets=1, shifted=True),
        NamedLoss(name="ppo"),
    )
    overflowing = dict(good.columns) | {"logprobs": torch.full_like(good.columns["logprobs"], -2e3)}
    is_loss = NamedLoss(name="importance_sampling")
    worker.forward_backward("mine", good, loss)
    with pytest.raises(UserError, match="importance_sampling is not finite for these rows"):
        worker.forward_backward("mine", replace(good, columns=overflowing), is_loss)
    assert not gradients(packed)
    assert worker.adapters["mine"].dropped_because is not None
    with pytest.raises(UserError, match="no 'nonsense' here"):
        worker.forward_backward("mine", good, NamedLoss(name="nonsense"), forward_only=True)
    assert "not finite" in worker.adapters["mine"].dropped_because


def test_reports_of_ranks_are_joined_in_the_order_of_the_rows() -> None:
    one = RowsReport(rows=(0, 3), losses=(1.0, 8.0), logprobs=(torch.ones(2, 1), torch.full((1, 1), 4.0)), metrics={})
    two = RowsReport(rows=(1, 2), losses=(2.0, 4.0), logprobs=(torch.zeros(1, 1),) * 2, metrics={"tokens": 3.0})
    idle = RowsReport(rows=(), losses=(), logprobs=(), metrics={})
    report = merged_report([one, idle, two])
    assert report.loss == 15.0
    assert report.logprobs[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 4.0]
    assert report.metrics == {"tokens": 3.0}
