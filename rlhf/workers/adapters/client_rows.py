"""Check a client's rows, and align the columns to the scored token, as needed by the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.adapters import LossRows
from rlhf.errors import UserError
from rlhf.objectives.client_losses import BOUNDS, LOSSES, RATIO_MASK, WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """B rows, each followed by one more token, with M = sum(lengths) tokens. Columns are aligned to the scored token.

    The first token of a row is not scored, and no position of an image.
    """

    token_ids: Int[Tensor, " M"]
    lengths: Int[Tensor, " B"]
    mask: Bool[Tensor, " M"]
    targets: Int[Tensor, "M K"] | None  # None: K = 1, and each target is the next token of the row
    columns: Mapping[str, Float[Tensor, "M K"]]

    @classmethod
    def of(cls, rows: LossRows) -> ScoredRows:
        """Move each column by one place. The token after a row is the row's last target."""
        ends = rows.lengths.cumsum(0) - 1
        lengths, count = rows.lengths + 1, len(rows.token_ids)
        row_of = torch.arange(len(lengths)).repeat_interleave(rows.lengths)
        scored = torch.arange(count) + row_of + 1  # the places in the longer rows
        token_ids = torch.empty(count + len(lengths), dtype=torch.int64)
        token_ids[scored - 1] = rows.token_ids.long()
        token_ids[ends + torch.arange(len(lengths)) + 1] = rows.targets[ends, 0].long()
        targets = torch.zeros(len(token_ids), rows.targets.shape[1], dtype=torch.int64)
        targets[scored] = rows.targets.long()
        mask = torch.zeros(len(token_ids), dtype=torch.bool)
        mask[scored] = token_ids[scored] >= 0
        shifted = targets.shape[1] == 1 and bool((targets[mask, 0] == token_ids[mask]).all())
        columns = {}
        for name, values in rows.columns.items():
            columns[name] = torch.zeros(targets.shape)
            columns[name][scored] = values.float()
        return cls(
            token_ids=token_ids, lengths=lengths, mask=mask, targets=None if shifted else targets, columns=columns
        )

    @property
    def wanted(self) -> Int[Tensor, "M K"]:
        """The targets, also if each is the next token."""
        return self.token_ids[:, None] if self.targets is None else self.targets


def refuse_bad_rows(rows: LossRows, loss: str, vocabulary: int) -> None:
    """Raise UserError, with row and column, for rows without a meaning for the loss. Shapes fit each other already."""
    of, lengths = LOSSES[loss], rows.lengths.tolist()
    for name, column in (("tokens", rows.token_ids), ("targets", rows.targets)):
        bad = (column >= vocabulary) | ((column is rows.targets) & (column < 0))  # other ids below 0 are of images
        if bool(bad.any()):
            place, value = _first(bad, column)
            known = f"the model's tokens are 0 to {vocabulary - 1}"
            raise UserError(f"Row {_row(lengths, place)}: {name} has {int(value)}, and {known}.")
    for name in of.columns:
        if name not in rows.columns:
            raise UserError(f"{name}: {loss} needs this column, but the rows lack it. Give the column for every row.")
    for name, column in rows.columns.items():
        if name not in (*of.columns, *of.optional):
            known = ", ".join((*of.columns, *of.optional))
            raise UserError(f"{name}: {loss} does not use this column; it takes {known}. Leave the column out.")
        bad = ~column.isfinite()
        if bool(bad.any()):
            place, value = _first(bad, column)
            raise UserError(f"Row {_row(lengths, place)}: {name} has {float(value)}, expected finite numbers.")
    if BOUNDS[0] in rows.columns and BOUNDS[1] in rows.columns:
        bad = rows.columns[BOUNDS[0]] > rows.columns[BOUNDS[1]]
        if bool(bad.any()):
            place, _ = _first(bad, bad)
            raise UserError(f"Row {_row(lengths, place)}: {BOUNDS[0]} is above {BOUNDS[1]}.")
    _refuse_learnt_images(rows, lengths)
    if loss == "gspo" and rows.targets.shape[1] != 1:
        raise UserError(f"targets: gspo takes one target for each token, not {rows.targets.shape[1]}.")


def _refuse_learnt_images(rows: LossRows, lengths: list[int]) -> None:
    """Raise UserError if a loss counts the place before a position of an image, where no token can be a target."""
    before = torch.zeros(len(rows.token_ids), dtype=torch.bool)
    before[:-1] = rows.token_ids[1:] < 0
    before[rows.lengths.cumsum(0) - 1] = False  # the next row begins there
    factors = [rows.columns[name] for name in (WEIGHTS, "advantages") if name in rows.columns]
    counted = torch.ones(rows.targets.shape) if not factors else torch.stack(list(factors)).prod(0)
    ratios = rows.columns.get(RATIO_MASK, torch.zeros(rows.targets.shape))
    bad = before[:, None] & ((counted != 0) | (ratios != 0))
    if bool(bad.any()):
        place, _ = _first(bad, bad)
        row = _row(lengths, place)
        raise UserError(
            f"Row {row}: the target of token {place - sum(lengths[:row])} is a position of an image, which no model "
            f"learns. Give the target the weight 0, or the advantage 0 (in gspo also {RATIO_MASK})."
        )


def _first(bad: Tensor, column: Tensor) -> tuple[int, Tensor]:
    """Return the first bad place of a column, and the value there."""
    first = int(bad.reshape(-1).int().argmax())
    return first // (bad.numel() // len(bad)), column.reshape(-1)[first]


def _row(lengths: list[int], place: int) -> int:
    return int(torch.searchsorted(torch.tensor(lengths).cumsum(0), place, right=True))
