"""Workers of the frozen teachers: hidden states at the tokens in the loss mask with the vocabulary head, or the largest
log-probabilities.

The student's ranks compute a teacher's logits from states and head, some rows at a time. Logits never leave the
process. A worker holds all teachers of the run, and one of them is on the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema.model import TeacherConfig
from rlhf.engine.distributed import RankContext
from rlhf.models.files.loading import load_model_config
from rlhf.models.packed.forward import learnt_states, learnt_top, lm_head_settings, lm_head_weight
from rlhf.objectives.masking import sequence_means
from rlhf.role_table import Role
from rlhf.types import (
    ONLY_TEACHER,
    Examples,
    LearntStates,
    Rollouts,
    TeacherColumn,
    TokenValues,
    TopLogprobs,
    VocabularyHead,
)
from rlhf.workers.frozen.frozen_worker import FrozenWorker
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.frozen.top_settings import Top
from rlhf.workers.microbatches import Microbatch, SharedPrefixes, shared_prefixes


class StatesWorker(FrozenWorker):
    """Computes what the student compares with, and returns the heads."""

    role: Role = "teacher"

    def __init__(
        self, models: Mapping[str, TeacherConfig], place: RankContext, *, top: Top | None = None, **options: Any
    ) -> None:
        super().__init__(next(iter(models.values())), place, **options)
        self.models, self.top = models, top
        self.parked: dict[str, tuple[Any, list[Tensor]]] = {}  # teachers off the device: model, weights in host memory

    def start(self) -> None:
        """Load all teachers. The last one stays on the device."""
        for number, (name, model) in enumerate(self.models.items()):
            if number:
                self._park()
            self.model_config = model
            super().start()
            self.present = name

    @cached_property
    def student_rows(self) -> int:
        """Return the number of rows of the student's head. Only for teachers that return likeliest tokens."""
        assert self.top is not None
        student = load_model_config(self.top.student.model, trust_remote_code=self.top.student.trust_remote_code)
        rows: int = student.get_text_config().vocab_size
        return rows

    def take_turn(self, teacher: str) -> None:
        """Bring a teacher to the device, in place of the present one."""
        if teacher == self.present:
            return
        self._park()
        self.present, (self.model, self.host_weights) = teacher, self.parked.pop(teacher)
        self.reload()

    def _park(self) -> None:
        self.offload()
        self.parked[self.present] = self.model, self.host_weights

    def head(self, *, teacher: str = ONLY_TEACHER) -> tuple[VocabularyHead, int]:
        self.take_turn(teacher)
        settings = lm_head_settings(self.model)
        weight, bias = lm_head_weight(self.model).detach(), settings["bias"]
        settings["bias"] = bias if bias is None else bias.detach().cpu()
        return VocabularyHead(weight=weight.cpu(), **settings), len(weight)

    def columns_of(
        self, examples: Examples, sizes: Sequence[int], prefixes: SharedPrefixes | None = None
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the examples and, last, the total number of tokens.

        All shares are packed together. `sizes` gives the number of sequences in each share.
        """
        loss_mask = examples.loss_mask
        places = loss_mask.cumsum(0) - 1
        values = self._empty(int(loss_mask.sum()))
        for microbatch, found in self.passes(
            "states", self.split(examples.lengths, prefixes), lambda microbatch: self._of_tokens(examples, microbatch)
        ):
            at = places[microbatch.tokens[loss_mask[microbatch.tokens]]]
            for name, column in found.items():
                values[name][at] = column.to("cpu", values[name].dtype)
        counts = torch.stack([mask.sum() for mask in loss_mask.split(examples.lengths.tolist())]).split(list(sizes))
        totals = [int(of_rows.sum()) for of_rows in counts]
        form: type[TeacherColumn] = LearntStates if self.top is None else TopLogprobs
        columns = [
            form(sequence_ids=ids, lengths=of_rows, **dict(zip(values, map(Tensor.clone, parts), strict=True)))
            for ids, of_rows, *parts in zip(
                examples.sequence_ids.split(list(sizes)),
                counts,
                *(column.split(totals) for column in values.values()),
                strict=True,
            )
        ]
        return (*columns, sum(totals))

    def _of_tokens(self, examples: Examples, microbatch: Microbatch) -> dict[str, Tensor]:
        """Return the values of a micro-batch's tokens in the loss mask, by the column's field."""
        row = (self.model, self.part(examples.token_ids, microbatch), microbatch.lengths.to(self.device))
        options: dict[str, Any] = {
            "mask": self.part(examples.loss_mask, microbatch),
            "branches": microbatch.branches,
        }
        if self.top is None:
            return {"hidden": learnt_states(*row, **options)}
        options |= {"k": self.top.k, "temperature": self.top.temperature, "vocabulary": self.student_rows}
        top = learnt_top(*row, **options)
        return {"ids": top.ids, "logprobs": top.logprobs, "token_logprobs": top.token_logprobs}

    def _empty(self, count: int) -> dict[str, Tensor]:
        weight = lm_head_weight(self.model)
        if self.top is None:
            return {"hidden": weight.new_empty(count, weight.shape[1], device="cpu")}
        shape = count, min(self.top.k, len(weight), self.student_rows)
        ids = torch.empty(shape, dtype=torch.int32)
        return {"ids": ids, "logprobs": torch.empty(shape), "token_logprobs": torch.empty(count)}


class TeacherWorker(StatesWorker):
    """The teachers of a run on fixed data."""

    def load_data(self, *sets: Examples) -> None:
        """Keep the student's data sets, in the student's order."""
        self.sets = sets

    def states(
        self, dataset: int, shares: Sequence[Sequence[int]], *, teacher: str = ONLY_TEACHER
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the rows and, last, the total number of tokens."""
        self.take_turn(teacher)
        examples = self.sets[dataset].take([row for share in shares for row in share])
        return self.columns_of(examples, [len(share) for share in shares])


class OnlineTeacherWorker(StatesWorker, ReferenceWorker):
    """The teachers in on-policy distillation. They also compute the log-probabilities of the sampled tokens."""

    def states(
        self, shares: Sequence[Sequence[int]], *given: Rollouts, teacher: str = ONLY_TEACHER
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the samples and, last, the total number of tokens."""
        self.take_turn(teacher)
        rollouts = Rollouts.gather(given, [i for share in shares for i in share])
        examples = Examples(
            sequence_ids=rollouts.sequence_ids,
            lengths=rollouts.lengths,
            token_ids=rollouts.token_ids,
            loss_mask=rollouts.response_mask,
        )
        prefixes = shared_prefixes(rollouts, samples_per_prompt=self.samples_per_prompt)
        of_samples = Counter(rollouts.sequence_ids.tolist())
        return self.columns_of(examples, [sum(of_samples[i] for i in share) for share in shares], prefixes)

    def logprobs(
        self,
        only: frozenset[int] | None,
        temperatures: Mapping[int, float],
        *given: Rollouts,
        teacher: str = ONLY_TEACHER,
    ) -> tuple[TokenValues | int, ...]:
        """Return a teacher's log-probabilities as ReferenceWorker.logprobs."""
        self.take_turn(teacher)
        return super().logprobs(only, temperatures, *given)

    def mean_logprobs(
        self, temperature: float, samples_per_prompt: int, *given: Rollouts, teacher: str = ONLY_TEACHER
    ) -> Mapping[int, float]:
        """Return the mean log-probability of each sample's sampled tokens, by sequence id."""
        self.take_turn(teacher)
        rollouts, values = self.values_of(given, temperature, {}, samples_per_prompt=samples_per_prompt)
        means = sequence_means(values, rollouts.response_mask, rollouts.sample_lengths)
        return dict(zip(rollouts.sample_ids, means.tolist(), strict=True))
