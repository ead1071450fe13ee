"""Workers of the frozen teacher: hidden states at the tokens in the loss mask, and the vocabulary head.

The student's ranks compute the teacher's logits from both, some rows at a time. Logits never leave the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.models.packed.forward import learnt_states, lm_head_settings, lm_head_weight
from rlhf.objectives.masking import sequence_means
from rlhf.role_table import Role
from rlhf.types import Examples, LearntStates, Rollouts, VocabularyHead
from rlhf.workers.frozen.frozen_worker import FrozenWorker
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.microbatches import Microbatch, SharedPrefixes, shared_prefixes


class _StatesWorker(FrozenWorker):
    """Computes hidden states and returns the head."""

    role: Role = "teacher"

    def head(self) -> tuple[VocabularyHead, int]:
        settings = lm_head_settings(self.model)
        weight, bias = lm_head_weight(self.model).detach(), settings["bias"]
        settings["bias"] = bias if bias is None else bias.detach().cpu()
        return VocabularyHead(weight=weight.cpu(), **settings), len(weight)

    def states_of(
        self, examples: Examples, sizes: Sequence[int], prefixes: SharedPrefixes | None = None
    ) -> tuple[LearntStates | int, ...]:
        """Return a column of hidden states for each share of the examples and, last, the total number of states.

        All shares are packed together. `sizes` gives the number of sequences in each share.
        """
        loss_mask = examples.loss_mask
        places = loss_mask.cumsum(0) - 1
        weight = lm_head_weight(self.model)
        hidden = weight.new_empty(int(loss_mask.sum()), weight.shape[1], device="cpu")

        def forward(microbatch: Microbatch) -> Tensor:
            return learnt_states(
                self.model,
                self.part(examples.token_ids, microbatch),
                microbatch.lengths.to(self.device),
                mask=self.part(loss_mask, microbatch),
                branches=microbatch.branches,
            )

        for microbatch, states in self.passes("states", self.split(examples.lengths, prefixes), forward):
            hidden[places[microbatch.tokens[loss_mask[microbatch.tokens]]]] = states.cpu()
        counts = torch.stack([mask.sum() for mask in loss_mask.split(examples.lengths.tolist())]).split(list(sizes))
        parts = hidden.split([int(of_rows.sum()) for of_rows in counts])
        columns = [
            LearntStates(sequence_ids=ids, lengths=of_rows, hidden=part.clone())
            for ids, of_rows, part in zip(examples.sequence_ids.split(list(sizes)), counts, parts, strict=True)
        ]
        return (*columns, len(hidden))


class TeacherWorker(_StatesWorker):
    """The teacher of a run on fixed data."""

    def load_data(self, *sets: Examples) -> None:
        """Keep the student's data sets, in the student's order."""
        self.sets = sets

    def states(self, dataset: int, shares: Sequence[Sequence[int]]) -> tuple[LearntStates | int, ...]:
        """Return a column for each share of the rows and, last, the total number of states."""
        examples = self.sets[dataset].take([row for share in shares for row in share])
        return self.states_of(examples, [len(share) for share in shares])


class OnlineTeacherWorker(_StatesWorker, ReferenceWorker):
    """The teacher in on-policy distillation. The teacher also computes the log-probabilities of the sampled tokens."""

    def states(self, shares: Sequence[Sequence[int]], *given: Rollouts) -> tuple[LearntStates | int, ...]:
        """Return a column for each share of the sequences and, last, the total number of states."""
        rollouts = Rollouts.gather(given, [i for share in shares for i in share])
        examples = Examples(
            sequence_ids=rollouts.sequence_ids,
            lengths=rollouts.lengths,
            token_ids=rollouts.token_ids,
            loss_mask=rollouts.response_mask,
        )
        prefixes = shared_prefixes(rollouts, samples_per_prompt=self.samples_per_prompt)
        of_samples = Counter(rollouts.sequence_ids.tolist())
        return self.states_of(examples, [sum(of_samples[i] for i in share) for share in shares], prefixes)

    def mean_logprobs(self, temperature: float, samples_per_prompt: int, *given: Rollouts) -> Mapping[int, float]:
        """Return the mean log-probability of each sequence's sampled tokens, by sequence id."""
        rollouts, values = self.values_of(given, temperature, {}, samples_per_prompt=samples_per_prompt)
        means = sequence_means(values, rollouts.response_mask, rollouts.sample_lengths)
        return dict(zip(rollouts.sample_ids, means.tolist(), strict=True))
