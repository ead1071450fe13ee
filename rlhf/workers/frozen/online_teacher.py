"""A worker of the frozen teacher of a student that learns on its own responses.

It says how likely the sampled tokens are to it, or gives the hidden states in which it predicts them; from these and
its vocabulary head the student's ranks make its distributions. No logits leave the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.models.row_layout import row_layout
from rlhf.objectives.masking import sequence_means
from rlhf.types import Examples, LearntStates, Role, Rollouts, VocabularyHead
from rlhf.workers.frozen.reference import ReferenceWorker
from rlhf.workers.frozen.teacher import in_shares, states_of, vocabulary_head
from rlhf.workers.microbatches import shared_prompts, slices


class OnlineTeacherWorker(ReferenceWorker):
    """A reference that has states and a head too; a prompt is computed once for its responses."""

    role: Role = "teacher"

    def head(self) -> tuple[VocabularyHead, int]:
        """What makes logits of the states, and the tokens of its vocabulary."""
        return vocabulary_head(self.model)

    def states(self, shares: Sequence[Sequence[int]], *given: Rollouts) -> tuple[LearntStates | int, ...]:
        """Of each share of the batch's sequences one column, computed packed together; last, the states in all."""
        rollouts = Rollouts.gather(given, [i for share in shares for i in share])
        lengths = rollouts.lengths.tolist()
        prompts = shared_prompts(rollouts, samples_per_prompt=self.samples_per_prompt)
        layout = row_layout(self.model)
        cut = slices(lengths, range(len(lengths)), max_tokens=self.max_tokens, prompts=prompts, layout=layout)
        examples = Examples(
            sequence_ids=rollouts.sequence_ids,
            lengths=rollouts.lengths,
            token_ids=rollouts.token_ids,
            loss_mask=rollouts.response_mask,
        )
        hidden = states_of(self.model, examples, cut, place=self.place)
        return (*in_shares(examples, hidden, [len(share) for share in shares]), len(hidden))

    def mean_logprobs(self, temperature: float, samples_per_prompt: int, *given: Rollouts) -> Mapping[int, float]:
        """Of each sequence, over its sampled tokens."""
        values = self.values_of(given, temperature=temperature, temperatures={}, samples_per_prompt=samples_per_prompt)
        rollouts = Rollouts.gather(given, [i for part in given for i in part.sequence_ids.tolist()])
        means = sequence_means(values, rollouts.response_mask, rollouts.lengths)
        return dict(zip(rollouts.sequence_ids.tolist(), means.tolist(), strict=True))
