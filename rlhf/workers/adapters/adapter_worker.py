"""One rank of a policy with many adapters, trained by clients with their own loops.

The base model has one physical adapter. Each call first puts the client's adapter there, with optimizer state and
gradient (rlhf.engine.swapping). Calls come to all ranks in the same order; each rank computes its share of the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.adapters import AdamStep, AdapterCall, AdapterShape, LossReport, LossRows, NamedLoss
from rlhf.algorithms.sft import SFT
from rlhf.data.packing import balance
from rlhf.engine.swapping import MOMENTS, Tenant, WholeState
from rlhf.errors import RunError, UserError
from rlhf.models.packed.forward import masked_columns, weighted_cross_entropy
from rlhf.models.packed.row_layout import RowLayout
from rlhf.objectives.client_losses import WEIGHTS, Terms, checked_settings, client_loss
from rlhf.objectives.logprobs import chunked_logprobs_only
from rlhf.workers.adapters.client_rows import ScoredRows, refuse_bad_rows
from rlhf.workers.adapters.packed_calls import PackedCalls
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.model_worker import torch_dtype
from rlhf.workers.trained import TrainedWorker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsReport:
    """The result of a rank's rows."""

    rows: tuple[int, ...]  # indices into the client's rows
    losses: tuple[float, ...]  # for each row
    logprobs: tuple[Float[Tensor, "n K"], ...]  # for each row
    metrics: Mapping[str, float]


Outcome = RowsReport | UserError | RunError


@dataclass(slots=True, kw_only=True)
class HeldAdapter:
    """A client's adapter on this rank."""

    shape: AdapterShape
    tenant: Tenant
    dropped_because: str | None = None  # why the gradient was dropped since the last optimizer step


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedCall:
    """A call of forward_backward with sound rows."""

    adapter: HeldAdapter
    scored: ScoredRows
    loss: str
    settings: Mapping[str, float]


@dataclass(slots=True)
class RowsSums:
    """The results of the passes over a call's rows so far."""

    rows: dict[int, tuple[float, Tensor]] = field(default_factory=dict)  # loss and log-probabilities of each row
    metrics: dict[str, float] = field(default_factory=dict)
    num_nonfinite: int = 0  # micro-batches

    def add(self, microbatch: Microbatch, logprobs: Float[Tensor, "n K"], found: Terms) -> None:
        """Add the terms of a micro-batch of the call. A micro-batch without rows has no effect."""
        values, lengths = found.terms.detach().double().sum(1), microbatch.lengths.tolist()
        self.num_nonfinite += int(not values.isfinite().all())
        of_rows = zip(values.cpu().split(lengths), logprobs.detach().float().cpu().split(lengths), strict=True)
        for row, (losses, columns) in zip(microbatch.rows, of_rows, strict=False):
            self.rows[row] = float(losses.sum()), columns[1:].clone()
        if microbatch.rows:
            _add(self.metrics, tokens=float((found.terms != 0).sum()))
            if found.clipped is not None:
                _add(self.metrics, clipped_tokens=float(found.clipped.sum()))

    def report(self) -> RowsReport:
        losses, columns = zip(*self.rows.values(), strict=True) if self.rows else ((), ())
        return RowsReport(rows=tuple(self.rows), losses=losses, logprobs=columns, metrics=self.metrics)


class AdapterWorker(TrainedWorker):
    """Trains the adapter named by each call. UserErrors are raised on all ranks alike, before any rank computes."""

    role = "policy"
    family = SFT  # only for the configuration; each call names its loss

    def build(self) -> str:
        from rlhf.models.adapters.slot import AdapterSlot  # with peft, which takes seconds

        fingerprint = super().build()
        self.slot = AdapterSlot(self.engine.module)
        self.swapping = self.engine.open_swapping()
        self.adapters: dict[str, HeldAdapter] = {}
        return fingerprint

    def create(self, name: str, shape: AdapterShape) -> None:
        """Make a new adapter. UserError: the name is taken, or the shape does not fit."""
        if name in self.adapters:
            raise UserError(f"There is an adapter {name} already. Choose another name.")
        weights = self.slot.initial(shape)
        zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
        state = WholeState(weights=weights, moments=dict.fromkeys(MOMENTS, zeros), steps=0)
        self.adapters[name] = HeldAdapter(shape=shape, tenant=self.swapping.made(state))

    def remove(self, name: str) -> None:
        self.swapping.forget(self._adapter(name).tenant)
        del self.adapters[name]

    def forward_backward(self, name: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False) -> RowsReport:
        """Add the gradient of a loss to the adapter's gradient. Return the results of this rank's rows. Collective."""
        adapter = self._adapter(name)
        try:
            with torch.set_grad_enabled(not forward_only):
                return self._forward(self._checked(adapter, rows, loss))
        except (UserError, RunError) as error:
            if not forward_only:  # otherwise the gradient would lack a part of the batch
                self._drop(adapter, str(error))
            raise

    def can_pack(self) -> bool:
        """Return whether one pass can serve several adapters: at ZeRO stage 0, if the model takes packed rows."""
        return self.swapping.can_pack and self.layout is not RowLayout.ONE_BY_ONE

    def forward_backward_packed(self, calls: Sequence[AdapterCall]) -> list[Outcome]:
        """Carry out calls for different adapters in one pass over all rows. Collective; `can_pack` must be true.

        Return for each call the result of this rank's rows, or the error of this call. A pass with a number that is
        not finite, or without enough memory, has no effect: the calls are then carried out one by one.
        """
        checked: dict[int, CheckedCall] = {}
        for index, call in enumerate(calls):
            with suppress(UserError):  # raised again below
                checked[index] = self._checked(self._adapter(call.adapter), call.rows, call.loss)
        reports = self._pack(list(checked.values())) if len(checked) > 1 else ()
        packed: dict[int, Outcome] = dict(zip(checked, reports, strict=False))
        return [packed[index] if index in packed else self._alone(call) for index, call in enumerate(calls)]

    def drop_gradient(self, name: str, reason: str) -> None:
        """Drop the gradient. The next optimizer step fails with this reason, since its batch would lack a part."""
        self._drop(self._adapter(name), reason)

    def step_adapter(self, name: str, step: AdamStep) -> float:
        """Update the adapter, and return the gradient's norm. UserError: there is no gradient to use."""
        adapter = self._adapter(name)
        reason, adapter.dropped_because = adapter.dropped_because, None
        if reason is not None:
            self.swapping.drop_gradient(adapter.tenant)
            raise UserError(
                f"The gradient was dropped, because a part of the batch failed: {reason} Send the whole batch again."
            )
        if not adapter.tenant.has_gradient:
            raise UserError("There is no gradient: call forward_backward before optim_step.")
        self._use(adapter)
        self.engine.end_gradient()
        try:
            return self.engine.step(adam=step).grad_norm
        except RunError as error:
            raise UserError("The gradient is not finite: it was dropped, and the weights are as before.") from error
        finally:
            self.swapping.changed()
            self.swapping.drop_gradient(adapter.tenant)

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write a checkpoint of the adapter. Rank 0 writes. Collective."""
        from rlhf.workers.adapters.adapter_files import write_adapter_state  # with peft, which takes seconds

        adapter = self._adapter(name)
        state = self.swapping.whole(adapter.tenant)
        if self.place.rank == 0:
            write_adapter_state(folder, state, adapter.shape, slot=self.slot, model=self.engine.module)

    def load_adapter(self, name: str, folder: Path, *, optimizer: bool) -> None:
        """Restore a checkpoint of an adapter of the same shape, and drop the gradient."""
        from rlhf.workers.adapters.adapter_files import read_adapter_state

        adapter = self._adapter(name)
        options: dict[str, Any] = {"slot": self.slot, "model": self.engine.module, "optimizer": optimizer}
        state = read_adapter_state(folder, adapter.shape, **options)
        self.swapping.forget(adapter.tenant)
        adapter.tenant, adapter.dropped_because = self.swapping.made(state), None

    def export_adapter(self, name: str, folder: Path) -> None:
        """Write the adapter as peft's folder, in the model's dtype. Rank 0 writes. Collective."""
        from rlhf.workers.adapters.adapter_files import write_export

        adapter, dtype = self._adapter(name), torch_dtype(self.model_config.dtype)
        state = self.swapping.whole(adapter.tenant)
        if self.place.rank == 0:
            write_export(folder, state, adapter.shape, slot=self.slot, dtype=dtype)

    def probe_adapter(self, name: str | None, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of token_ids[1:] at temperature 1. None: of the base model. Collective."""
        from rlhf.models.adapters.lora import adapter_disabled

        if name is not None:
            self._use(self._adapter(name))
            return self.probe(token_ids)
        with adapter_disabled(self.engine.module):
            return self.probe(token_ids)

    def _adapter(self, name: str) -> HeldAdapter:
        if name not in self.adapters:
            raise UserError(f"There is no adapter {name}. Create it first.")
        return self.adapters[name]

    def _use(self, adapter: HeldAdapter) -> None:
        self.swapping.use(adapter.tenant)
        self.slot.scale(adapter.shape)

    def _drop(self, adapter: HeldAdapter, reason: str) -> None:
        self.swapping.drop_gradient(adapter.tenant)
        adapter.dropped_because = reason

    def _checked(self, adapter: HeldAdapter, rows: LossRows, loss: NamedLoss) -> CheckedCall:
        settings = checked_settings(loss.name, loss.settings)
        refuse_bad_rows(rows, loss.name, self.engine.module.config.get_text_config().vocab_size)
        return CheckedCall(adapter=adapter, scored=ScoredRows.of(rows), loss=loss.name, settings=settings)

    def _alone(self, call: AdapterCall) -> Outcome:
        try:
            return self.forward_backward(call.adapter, call.rows, call.loss)
        except (UserError, RunError) as error:
            return error

    def _own(self, scored: ScoredRows) -> list[int]:
        """Return the rows of this rank."""
        return balance(scored.lengths.tolist(), self.resources.data_parallel_ranks)[self.data_rank]

    def _forward(self, call: CheckedCall) -> RowsReport:
        own = self._own(call.scored)
        self._use(call.adapter)
        trains = torch.is_grad_enabled()
        sums = RowsSums()
        for microbatch in self.split(call.scored.lengths, own):
            with self.explaining("update", microbatch):
                found, logprobs = self._terms(call, microbatch)
                if trains:
                    call.adapter.tenant.has_gradient = True
                    self.engine.backward(found.terms.sum(), last=False)
            sums.add(microbatch, logprobs, found)
        if self._is_anywhere(sums.num_nonfinite > 0):
            raise UserError(f"The loss {call.loss} is not finite for these rows. Check their columns and the adapter.")
        return sums.report()

    def _pack(self, calls: Sequence[CheckedCall]) -> Sequence[RowsReport]:
        """Compute the calls in one pass, and divide the gradient among the adapters. Empty: the pass had no effect."""
        from rlhf.models.adapters.stack import AdapterStack  # with peft, which takes seconds

        weights = [(call.adapter.shape, self.swapping.weights(call.adapter.tenant)) for call in calls]
        stack = AdapterStack(self.slot, weights, dtype=torch_dtype(self.model_config.dtype), device=self.device)
        packed = PackedCalls([call.scored for call in calls])
        sums = [RowsSums() for _ in calls]
        has_failed = False
        for microbatch in self.split(packed.joined.lengths, self._own(packed.joined)):
            if has_failed or not microbatch.rows:
                continue
            parts = packed.parts(microbatch)
            try:
                with self.explaining("update", parts.whole), stack.computing(parts.owners.to(self.device)):
                    logprobs = self._logprobs(packed.joined, parts.whole)
                    total = logprobs.new_zeros(())
                    for index, part, places in parts.of_calls:
                        own = logprobs[places.to(self.device), : calls[index].scored.wanted.shape[1]]
                        found = self._loss(calls[index], part, own)
                        sums[index].add(part, own, found)
                        total = total + found.terms.sum()
                    self.engine.backward(total, last=False)
            except RunError:  # this rank lacks memory, and the other ranks continue
                has_failed = True
        has_failed = has_failed or any(one.num_nonfinite for one in sums) or not stack.has_finite_gradient()
        if self._is_anywhere(has_failed):
            logger.warning("A pass for %d adapters failed, or was not finite: they now take turns.", len(calls))
            return ()
        for index, call in enumerate(calls):
            self.swapping.add_gradient(call.adapter.tenant, stack.gradient(index))
        return [one.report() for one in sums]

    def _is_anywhere(self, fact: bool) -> bool:
        """Return whether a fact is true on any rank. Collective."""
        return bool(self.engine.all_reduce_sum(torch.tensor(int(fact), device=self.device)))

    def _logprobs(self, scored: ScoredRows, microbatch: Microbatch) -> Float[Tensor, "n K"]:
        """Return the log-probabilities of the targets of a micro-batch's tokens."""
        targets = None if scored.targets is None else self.part(scored.targets, microbatch)
        (logprobs,) = self.engine.forward(
            masked_columns,
            self.part(scored.token_ids, microbatch),
            microbatch.lengths.to(self.device),
            mask=self._mask(scored, microbatch),
            of_rows=chunked_logprobs_only,
            targets=targets,
        )
        return logprobs[:, None] if logprobs.ndim == 1 else logprobs

    def _mask(self, scored: ScoredRows, microbatch: Microbatch) -> Bool[Tensor, " n"]:
        """Return which tokens of a micro-batch are scored: none of a micro-batch without rows."""
        mask = self.part(scored.mask, microbatch)
        return mask if microbatch.rows else torch.zeros_like(mask)

    def _terms(self, call: CheckedCall, microbatch: Microbatch) -> tuple[Terms, Float[Tensor, "n K"]]:
        """Return the terms of the call's loss and the log-probabilities of a micro-batch of the call."""
        if call.loss == "cross_entropy" and call.scored.targets is None and torch.is_grad_enabled():
            return self._cross_entropy(call.scored, microbatch)
        logprobs = self._logprobs(call.scored, microbatch)
        return self._loss(call, microbatch, logprobs), logprobs

    def _loss(self, call: CheckedCall, microbatch: Microbatch, logprobs: Float[Tensor, "n K"]) -> Terms:
        """Return the terms of the call's loss for tokens of the call, with these log-probabilities."""
        return client_loss(
            call.loss,
            logprobs,
            {name: self.part(column, microbatch) for name, column in call.scored.columns.items()},
            mask=self._mask(call.scored, microbatch),
            lengths=microbatch.lengths.to(self.device),
            settings=call.settings,
        )

    def _cross_entropy(self, scored: ScoredRows, microbatch: Microbatch) -> tuple[Terms, Float[Tensor, "n 1"]]:
        """Return what `_terms` returns, with the gradient of a supervised run bit for bit: of the terms' sum alone."""
        mask, given = self._mask(scored, microbatch), scored.columns.get(WEIGHTS)
        weights = mask.float() if given is None else torch.where(mask, self.part(given, microbatch)[:, 0], 0.0)
        token_ids, lengths = self.part(scored.token_ids, microbatch), microbatch.lengths.to(self.device)
        loss, logprobs = self.engine.forward(weighted_cross_entropy, token_ids, lengths, mask=mask, weights=weights)
        terms = -weights * logprobs
        terms[0] += loss - loss.detach()
        return Terms(terms=terms[:, None]), logprobs[:, None]


def merged_report(reports: Sequence[RowsReport]) -> LossReport:
    """Return the result of all ranks, with the log-probabilities in the order of the client's rows."""
    parts = [part for one in reports for part in zip(one.rows, one.losses, one.logprobs, strict=True)]
    parts.sort(key=lambda part: part[0])
    metrics: dict[str, float] = {}
    for one in reports:
        _add(metrics, **one.metrics)
    return LossReport(
        loss=sum(loss for _, loss, _ in parts),
        logprobs=torch.cat([logprobs for _, _, logprobs in parts]),
        metrics=metrics,
    )


def merged_outcome(outcomes: Sequence[Outcome]) -> LossReport | UserError | RunError:
    """Return the result of all ranks, or the first error."""
    reports = [one for one in outcomes if isinstance(one, RowsReport)]
    errors = (one for one in outcomes if not isinstance(one, RowsReport))
    return next(errors, None) or merged_report(reports)


def _add(metrics: dict[str, float], **values: float) -> None:
    for name, value in values.items():
        metrics[name] = metrics.get(name, 0.0) + value
