"""Workers of teachers behind URLs. The workers hold no model and ask the teachers' servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.engine.distributed import RankContext
from rlhf.types import Examples, Rollouts, TeacherColumn, TopLogprobs
from rlhf.workers.frozen.served_model import MAX_TOKENS, ScoredTokens, ServedModel
from rlhf.workers.frozen.teacher import OnlineTeacherWorker, StatesWorker, TeacherWorker
from rlhf.workers.frozen.top_settings import Top
from rlhf.workers.microbatches import SharedPrefixes
from rlhf.workers.model_worker import ModelWorker


class _ServedWorker(StatesWorker):
    """Returns the log-probabilities of each teacher's server, at temperature 1."""

    def __init__(
        self, served: Mapping[str, ServedModel], place: RankContext, *, top: Top | None = None, **_: Any
    ) -> None:
        ModelWorker.__init__(self, place)
        self.served, self.top = served, top
        self.present = next(iter(served))

    def start(self) -> None:
        """Do nothing: the servers hold the models."""

    def offload(self) -> None:
        """Do nothing: the worker has no GPU."""

    def reload(self) -> None:
        """Do nothing: the worker has no GPU."""

    def take_turn(self, teacher: str) -> None:
        self.present = teacher

    def columns_of(
        self, examples: Examples, sizes: Sequence[int], prefixes: SharedPrefixes | None = None
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the examples and, last, the total number of tokens. RunError: no answer."""
        assert self.top is not None  # no server returns states
        scored = self.scored(examples.token_ids, examples.loss_mask, examples.lengths, top_k=self.top.k)
        columns, first = [], 0
        for size in sizes:
            of_share = scored[first : first + size]
            fields = {
                "ids": [one.top_ids for one in of_share],
                "logprobs": [one.top_logprobs for one in of_share],
                "token_logprobs": [one.logprobs for one in of_share],
            }
            empty = {"ids": torch.zeros(0, self.top.k, dtype=torch.int32), "logprobs": torch.zeros(0, self.top.k)}
            empty["token_logprobs"] = torch.zeros(0)
            columns.append(
                TopLogprobs(
                    sequence_ids=examples.sequence_ids[first : first + size],
                    lengths=torch.tensor([len(one.logprobs) for one in of_share], dtype=torch.int64),
                    **{name: torch.cat([empty[name], *parts]) for name, parts in fields.items()},
                )
            )
            first += size
        return (*columns, sum(len(one.logprobs) for one in scored))

    def scored(
        self, token_ids: Int[Tensor, " N"], mask: Bool[Tensor, " N"], lengths: Int[Tensor, " B"], *, top_k: int = 0
    ) -> list[ScoredTokens]:
        """Return the present teacher's values at the tokens in mask, by sequence.

        A sequence is sent up to its last token in `mask`. A sequence without such a token is not sent.
        """
        sizes = lengths.tolist()
        chosen = [of_sequence.nonzero()[:, 0].tolist() for of_sequence in mask.split(sizes)]
        asked = {
            row: (tokens[: places[-1] + 1].tolist(), places)
            for row, (tokens, places) in enumerate(zip(token_ids.split(sizes), chosen, strict=True))
            if places
        }
        served = self.served[self.present]
        rows = self.student_rows if top_k else MAX_TOKENS
        answers = served.scored(*zip(*asked.values(), strict=True), top_k=top_k, vocabulary=rows) if asked else []
        none = ScoredTokens(
            logprobs=torch.zeros(0),
            top_ids=torch.zeros(0, top_k, dtype=torch.int32),
            top_logprobs=torch.zeros(0, top_k),
        )
        by_row = dict(zip(asked, answers, strict=True))
        return [by_row.get(row, none) for row in range(len(sizes))]


class ServedTeacherWorker(_ServedWorker, TeacherWorker):
    """The teachers of a run on fixed data."""


class ServedOnlineTeacherWorker(_ServedWorker, OnlineTeacherWorker):
    """Returns the log-probabilities of each teacher's server on the student's responses."""

    def __init__(
        self,
        served: Mapping[str, ServedModel],
        place: RankContext,
        *,
        samples_per_prompt: int,
        top: Top | None = None,
        **options: Any,
    ) -> None:
        super().__init__(served, place, top=top, **options)
        self.temperature, self.samples_per_prompt = 1.0, samples_per_prompt

    def values_of(
        self,
        parts: Sequence[Rollouts],
        temperature: float,
        by_sequence: Mapping[int, float],
        *,
        samples_per_prompt: int,
    ) -> tuple[Rollouts, Float[Tensor, " N"]]:
        """Return all batches as one batch, and the log-probabilities of the sampled tokens. RunError: no answer."""
        if temperature != 1.0 or by_sequence:
            raise ValueError(f"a server's log-probabilities have temperature 1, not {temperature} or {by_sequence}")
        rollouts = Rollouts.joined(parts)
        values, mask = torch.zeros(len(rollouts.token_ids)), rollouts.response_mask
        scored = self.scored(rollouts.token_ids, mask, rollouts.lengths)
        values[mask] = torch.cat([values[:0], *(of_sequence.logprobs for of_sequence in scored)])
        return rollouts, values
