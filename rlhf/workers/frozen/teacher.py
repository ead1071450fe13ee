"""Workers of the frozen teachers: hidden states at the tokens in the loss mask with the vocabulary head, or the largest
log-probabilities.

The student's ranks compute a teacher's logits from states and head, some rows at a time. Logits never leave the
process. A worker holds all teachers of the run, and one of them is on the device. A teacher with another tokenizer
reads the student's texts in the teacher's own tokens, and returns the states at the ends of spans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema.model import TeacherConfig
from rlhf.data.spans import Span, Translator
from rlhf.engine.distributed import RankContext
from rlhf.errors import RunError
from rlhf.models.files.loading import load_model_config
from rlhf.models.packed.forward import (
    learnt_states,
    learnt_top,
    lm_head_settings,
    lm_head_weight,
    state_logprobs,
)
from rlhf.objectives.masking import sequence_counts, sequence_means
from rlhf.role_table import Role
from rlhf.types import (
    ONLY_TEACHER,
    Examples,
    LearntStates,
    Rollouts,
    SpanStates,
    TeacherColumn,
    TeacherPrompt,
    TokenValues,
    TopLogprobs,
    VocabularyHead,
)
from rlhf.workers.frozen.frozen_worker import FrozenWorker
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.frozen.top_settings import Spans, Top
from rlhf.workers.frozen.translators import translator_of
from rlhf.workers.microbatches import Microbatch, SharedPrefixes, shared_prefixes


class StatesWorker(FrozenWorker):
    """Computes the teachers' predictions for the student, and returns the teachers' heads."""

    role: Role = "teacher"
    translators: Mapping[str, Translator] = {}  # by teacher; none for the student's tokenizer

    def __init__(
        self,
        models: Mapping[str, TeacherConfig],
        place: RankContext,
        *,
        top: Top | None = None,
        spans: Spans | None = None,
        **options: Any,
    ) -> None:
        super().__init__(next(iter(models.values())), place, **options)
        self.models, self.top, self.spans = models, top, spans
        self.parked: dict[str, tuple[Any, list[Tensor]]] = {}  # teachers off the device: model, weights in host memory

    def start(self) -> None:
        """Load all teachers. The last teacher stays on the device."""
        translators = {}
        for number, (name, model) in enumerate(self.models.items()):
            if number:
                self._park()
            self.model_config, self.longest_sequence = model, self.place.longest_sequence
            translator = None
            if self.spans is not None:
                translator = translator_of(self.spans, model, max_tokens=self.max_tokens)
            if translator is not None:
                translators[name], self.longest_sequence = translator, translator.max_tokens
            super().start()
            self.present = name
        self.translators = translators

    @cached_property
    def student_rows(self) -> int:
        """Return the number of rows of the student's head. Only for teachers compared by token ids."""
        settings = self.top or self.spans
        assert settings is not None
        student = settings.student
        shape = load_model_config(student.model, trust_remote_code=student.trust_remote_code)
        rows: int = shape.get_text_config().vocab_size
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
        if teacher in self.translators:  # a head may lack rows for the last tokens of a tokenizer
            pairs = [(i, j) for i, j in self.translators[teacher].pairs if i < self.student_rows and j < len(weight)]
            settings["pairs"] = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return VocabularyHead(weight=weight.cpu(), **settings), len(weight)

    def columns_of(
        self, examples: Examples, sizes: Sequence[int], prefixes: SharedPrefixes | None = None
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the examples and, last, the total number of tokens.

        All shares are packed together. `sizes` gives the number of sequences in each share.
        """
        values = self._values(examples, prefixes)
        return _by_share(LearntStates if self.top is None else TopLogprobs, examples, sizes, values)

    def span_columns(
        self, examples: Examples, translated: Examples, sizes: Sequence[int], prefixes: SharedPrefixes | None = None
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the examples, with the spans, and the total number of tokens.

        `translated` and `prefixes` are the examples and their prefixes in the teacher's tokens.
        """
        values = self._values(translated, prefixes)
        sums = torch.nn.functional.pad(values["logprobs"].double().cumsum(0), (1, 0))
        spans = list(self._all_spans(examples, translated))
        at = [span.student[1] - 1 for span in spans]
        first, stop = torch.tensor([span.teacher for span in spans], dtype=torch.int64).view(-1, 2).unbind(-1)
        count = int(examples.loss_mask.sum())
        column = SpanStates.columns()
        empty: dict[str, Tensor] = {name: torch.zeros(count) for name in column}
        empty["hidden"] = values["hidden"].new_zeros(count, values["hidden"].shape[1])
        empty["num_tokens"] = torch.zeros(count, dtype=torch.int32)
        empty["hidden"][at] = values["hidden"][stop - 1]
        empty["before"][at] = (sums[stop - 1] - sums[first]).float()
        empty["logprobs"][at] = (sums[stop] - sums[first]).float()
        empty["num_tokens"][at] = torch.tensor([b - a for a, b in (span.student for span in spans)], dtype=torch.int32)
        return _by_share(SpanStates, examples, sizes, empty)

    def _all_spans(self, examples: Examples, translated: Examples) -> Iterator[Span]:
        """Yield the spans of all sequences, counted from the first token in the mask of the first sequence."""
        translator, ours, theirs = self.translators[self.present], 0, 0
        sides = (
            (x.token_ids.split(x.lengths.tolist()), x.loss_mask.split(x.lengths.tolist()))
            for x in (examples, translated)
        )
        (ids, masks), (other_ids, other_masks) = sides
        for row in zip(ids, masks, other_ids, other_masks, strict=True):
            for span in translator.spans(*(column.tolist() for column in row)):
                yield span.moved(ours, theirs)
            ours, theirs = ours + int(row[1].sum()), theirs + int(row[3].sum())

    def _values(self, examples: Examples, prefixes: SharedPrefixes | None) -> dict[str, Tensor]:
        """Return the values of the tokens in the loss mask, by the column's field. All rows are packed together."""
        loss_mask = examples.loss_mask
        places = loss_mask.cumsum(0) - 1
        values = self._empty(int(loss_mask.sum()))
        for microbatch, found in self.passes(
            "states", self.split(examples.lengths, prefixes), lambda microbatch: self._of_tokens(examples, microbatch)
        ):
            at = places[microbatch.tokens[loss_mask[microbatch.tokens]]]
            for name, column in found.items():
                values[name][at] = column.to("cpu", values[name].dtype)
        return values

    def _of_tokens(self, examples: Examples, microbatch: Microbatch) -> dict[str, Tensor]:
        """Return the values of a micro-batch's tokens in the loss mask, by the column's field."""
        token_ids = self.part(examples.token_ids, microbatch)
        row = (self.model, token_ids, microbatch.lengths.to(self.device))
        options: dict[str, Any] = {
            "mask": self.part(examples.loss_mask, microbatch),
            "branches": microbatch.branches,
        }
        if self.present in self.translators:
            assert self.spans is not None
            hidden, targets = learnt_states(*row, **options), token_ids[options["mask"]]
            logprobs = state_logprobs(self.model, hidden, targets, temperature=self.spans.temperature)
            return {"hidden": hidden, "logprobs": logprobs}
        if self.top is None:
            return {"hidden": learnt_states(*row, **options)}
        options |= {"k": self.top.k, "temperature": self.top.temperature, "vocabulary": self.student_rows}
        top = learnt_top(*row, **options)
        return {"ids": top.ids, "logprobs": top.logprobs, "token_logprobs": top.token_logprobs}

    def _empty(self, count: int) -> dict[str, Tensor]:
        weight = lm_head_weight(self.model)
        if self.top is None:
            hidden = {"hidden": weight.new_empty(count, weight.shape[1], device="cpu")}
            return hidden | ({"logprobs": torch.empty(count)} if self.present in self.translators else {})
        shape = count, min(self.top.k, len(weight), self.student_rows)
        ids = torch.empty(shape, dtype=torch.int32)
        return {"ids": ids, "logprobs": torch.empty(shape), "token_logprobs": torch.empty(count)}


def _by_share(
    form: type[TeacherColumn], examples: Examples, sizes: Sequence[int], values: Mapping[str, Tensor]
) -> tuple[TeacherColumn | int, ...]:
    """Divide the values of the tokens in the loss mask into columns. Return the columns and the number of tokens."""
    counts = sequence_counts(examples.loss_mask, examples.lengths).split(list(sizes))
    totals = [int(of_rows.sum()) for of_rows in counts]
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


class TeacherWorker(StatesWorker):
    """The teachers of a run on fixed data."""

    def load_data(self, *sets: Examples) -> None:
        """Keep the student's data sets, in the student's order."""
        self.sets = sets

    def load_translations(self, *sets: Examples) -> None:
        """Keep the data sets in the tokens of each row's teacher."""
        self.translations = sets

    def states(
        self, dataset: int, shares: Sequence[Sequence[int]], *, teacher: str = ONLY_TEACHER
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the rows and, last, the total number of tokens."""
        self.take_turn(teacher)
        rows, sizes = [row for share in shares for row in share], [len(share) for share in shares]
        examples = self.sets[dataset].take(rows)
        if teacher in self.translators:
            return self.span_columns(examples, self.translations[dataset].take(rows), sizes)
        return self.columns_of(examples, sizes)


class OnlineTeacherWorker(StatesWorker, ReferenceWorker):
    """The teachers in on-policy distillation. They also compute the log-probabilities of the sampled tokens.

    `prompts` are in the tokens of teachers with another tokenizer, by sequence id.
    """

    def states(
        self,
        shares: Sequence[Sequence[int]],
        *given: Rollouts,
        teacher: str = ONLY_TEACHER,
        prompts: Mapping[int, TeacherPrompt] | None = None,
    ) -> tuple[TeacherColumn | int, ...]:
        """Return a column for each share of the samples and, last, the total number of tokens."""
        self.take_turn(teacher)
        rollouts = Rollouts.gather(given, [i for share in shares for i in share])
        of_samples = Counter(rollouts.sequence_ids.tolist())
        sizes = [sum(of_samples[i] for i in share) for share in shares]
        translated = self._translated(rollouts, prompts or {}) if teacher in self.translators else rollouts
        prefixes = shared_prefixes(translated, samples_per_prompt=self.samples_per_prompt)
        if translated is rollouts:
            return self.columns_of(_examples(rollouts), sizes, prefixes)
        return self.span_columns(_examples(rollouts), _examples(translated), sizes, prefixes)

    def _translated(self, rollouts: Rollouts, prompts: Mapping[int, TeacherPrompt]) -> Rollouts:
        """Return the responses after the teacher's prompts, in the teacher's tokens. RunError: a response has several
        turns."""
        given = [prompts[i] for i in rollouts.sequence_ids.tolist()]
        sizes = rollouts.lengths.tolist()
        if any(int((mask[1:] & ~mask[:-1]).sum()) > 1 for mask in rollouts.response_mask.split(sizes)):
            raise RunError(
                "column `completion`: a given response has several turns, and a teacher with another tokenizer reads "
                "responses of a single turn. Remove such rows, or name a teacher with the policy's tokenizer."
            )
        sampled = zip(rollouts.token_ids.split(sizes), rollouts.response_mask.split(sizes), strict=True)
        written = self.translators[self.present].responses(
            [prompt.token_ids for prompt in given],
            [ids[mask].tolist() for ids, mask in sampled],
            [prompt.end for prompt in given],
        )
        token_ids = torch.tensor([i for ids, _ in written for i in ids], dtype=torch.int64)
        return Rollouts(
            sequence_ids=rollouts.sequence_ids,
            lengths=torch.tensor([len(ids) for ids, _ in written], dtype=torch.int64),
            token_ids=token_ids,
            response_mask=torch.tensor([value for _, mask in written for value in mask], dtype=torch.bool),
            rollout_logprobs=torch.zeros(len(token_ids)),
            versions=torch.full_like(token_ids, -1),
        )

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
        self,
        temperature: float,
        samples_per_prompt: int,
        *given: Rollouts,
        teacher: str = ONLY_TEACHER,
        prompts: Mapping[int, TeacherPrompt] | None = None,
    ) -> Mapping[int, float]:
        """Return the mean log-probability of each sample's sampled tokens, by sequence id.

        With another tokenizer, the log-probability of all spans is divided by the number of the student's tokens in the
        spans. A sample without a span is left out.
        """
        self.take_turn(teacher)
        options = {"samples_per_prompt": samples_per_prompt}
        if teacher not in self.translators:
            rollouts, values = self.values_of(given, temperature, {}, **options)
            means = sequence_means(values, rollouts.response_mask, rollouts.sample_lengths)
            return dict(zip(rollouts.sample_ids, means.tolist(), strict=True))
        rollouts = Rollouts.joined(given)
        translated, values = self.values_of([self._translated(rollouts, prompts or {})], temperature, {}, **options)
        sums = torch.nn.functional.pad(values[translated.response_mask].double().cumsum(0), (1, 0))
        owners = rollouts.sequence_ids.repeat_interleave(rollouts.lengths)[rollouts.response_mask].tolist()
        totals: dict[int, float] = {}
        counts: dict[int, int] = {}
        for span in self._all_spans(_examples(rollouts), _examples(translated)):
            owner, (first, stop) = owners[span.student[0]], span.teacher
            totals[owner] = totals.get(owner, 0.0) + float(sums[stop] - sums[first])
            counts[owner] = counts.get(owner, 0) + span.student[1] - span.student[0]
        return {i: total / counts[i] for i, total in totals.items()}


def _examples(rollouts: Rollouts) -> Examples:
    """Return the rollouts with the sampled tokens in the loss mask."""
    return Examples(
        sequence_ids=rollouts.sequence_ids,
        lengths=rollouts.lengths,
        token_ids=rollouts.token_ids,
        loss_mask=rollouts.response_mask,
    )
