"""Join the rows of several clients' calls, and find each call's share of a micro-batch of the joined rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.workers.adapters.client_rows import ScoredRows
from rlhf.workers.microbatches import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A micro-batch of joined rows, in parts by call."""

    whole: Microbatch  # the shortest rows first: the forward pass keeps this order
    owners: Int[Tensor, " n"]  # the number of each token's call
    of_calls: Sequence[tuple[int, Microbatch, Bool[Tensor, " n"]]]  # a call, its rows, and their places


class PackedCalls:
    """The rows of several calls, one call after the other, without the columns of the losses."""

    def __init__(self, calls: Sequence[ScoredRows]) -> None:
        """Join the rows. A call with fewer targets than another gets further targets of token 0."""
        most = max(call.wanted.shape[1] for call in calls)
        are_next = all(call.targets is None for call in calls)
        self.joined = ScoredRows(
            token_ids=torch.cat([call.token_ids for call in calls]),
            lengths=torch.cat([call.lengths for call in calls]),
            mask=torch.cat([call.mask for call in calls]),
            targets=None
            if are_next
            else torch.cat([F.pad(call.wanted, (0, most - call.wanted.shape[1])) for call in calls]),
            columns={},
        )
        self._calls = [index for index, call in enumerate(calls) for _ in call.lengths]  # index of the call of each row
        self._first_rows = list(accumulate((len(call.lengths) for call in calls), initial=0))
        self._first_tokens = list(accumulate((len(call.token_ids) for call in calls), initial=0))

    def parts(self, microbatch: Microbatch) -> Parts:
        """Divide a micro-batch of `joined`."""
        sizes = microbatch.lengths.tolist()
        tokens = microbatch.tokens.split(sizes)
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        whole = Microbatch(
            rows=tuple(microbatch.rows[place] for place in order),
            lengths=microbatch.lengths[order],
            tokens=torch.cat([tokens[place] for place in order]),
            branches=None,
        )
        calls = torch.tensor([self._calls[row] for row in whole.rows])
        owners = calls.repeat_interleave(whole.lengths)
        of_calls = []
        for index in calls.unique().tolist():
            places, first = owners == index, self._first_rows[index]
            part = Microbatch(
                rows=tuple(row - first for row in whole.rows if self._calls[row] == index),
                lengths=whole.lengths[calls == index],
                tokens=whole.tokens[places] - self._first_tokens[index],
                branches=None,
            )
            of_calls.append((index, part, places))
        return Parts(whole=whole, owners=owners, of_calls=of_calls)
