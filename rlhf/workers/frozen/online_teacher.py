"""A worker of the frozen teacher in on-policy distillation.

It computes log-probabilities of the sampled tokens, or the hidden states predicting them. The student's ranks turn
hidden states into distributions with the teacher's vocabulary head. Logits never leave the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.models.row_layout import row_layout
from rlhf.objectives.masking import sequence_means
from rlhf.role_table import Role
from rlhf.types import Examples, LearntStates, Rollouts, VocabularyHead
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.frozen.teacher import in_shares, states_of, vocabulary_head
from rlhf.workers.microbatches import shared_prompts, split_microbatches


class OnlineTeacherWorker(ReferenceWorker):
    """A reference model that also returns hidden states and its head.

    Responses share the computation of their prompt.
    """

    role: Role = "teacher"

    def head(self) -> tuple[VocabularyHead, int]:
        """Return the vocabulary head and the size of its vocabulary."""
        return vocabulary_head(self.model)

    def states(self, shares: Sequence[Sequence[int]], *given: Rollouts) -> tuple[LearntStates | int, ...]:
        """Return one column of hidden states for each share of the sequences and, last, the total number of states.

        All shares are packed together.
        """
        rollouts = Rollouts.gather(given, [i for share in shares for i in share])
        lengths = rollouts.lengths.tolist()
        prompts = shared_prompts(rollouts, samples_per_prompt=self.samples_per_prompt)
        layout = row_layout(self.model)
        microbatches = split_microbatches(
            lengths, range(len(lengths)), max_tokens=self.max_tokens, prompts=prompts, layout=layout
        )
        examples = Examples(
            sequence_ids=rollouts.sequence_ids,
            lengths=rollouts.lengths,
            token_ids=rollouts.token_ids,
            loss_mask=rollouts.response_mask,
        )
        hidden = states_of(self.model, examples, microbatches, place=self.place)
        return (*in_shares(examples, hidden, [len(share) for share in shares]), len(hidden))

    def mean_logprobs(self, temperature: float, samples_per_prompt: int, *given: Rollouts) -> Mapping[int, float]:
        """Return the mean log-probability of each sequence's sampled tokens, by sequence id."""
        values = self.values_of(given, temperature=temperature, temperatures={}, samples_per_prompt=samples_per_prompt)
        rollouts = Rollouts.gather(given, [i for part in given for i in part.sequence_ids.tolist()])
        means = sequence_means(values, rollouts.response_mask, rollouts.lengths)
        return dict(zip(rollouts.sequence_ids.tolist(), means.tolist(), strict=True))
