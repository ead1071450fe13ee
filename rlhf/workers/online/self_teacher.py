"""The policy's ranks as their own teacher: a pass over privileged prompts with the student's responses.

Only the prompt differs from the student's sequence, so the sampled tokens stand in the same order in both. A pass runs
before the updates of a step, without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms.privileged import SelfTeaching
from rlhf.models.files.loading import whole
from rlhf.models.packed.forward import learnt_states, policy_logprobs_only, vocabulary_head
from rlhf.objectives.masking import moved, sequence_counts, to_tokens
from rlhf.types import BatchPlan, LearntStates, PrivilegedPrompts, Rollouts, VocabularyHead
from rlhf.workers.microbatches import Microbatch, shared_prefixes
from rlhf.workers.online.online_worker import OnlineWorker, Share


class SelfTeacher:
    """The teacher of a rank, with the weights that the section names."""

    def __init__(self, worker: OnlineWorker, section: SelfTeaching) -> None:
        """Copy the weights if needed. The worker's engine must be built, without snapshots yet."""
        self.worker, self.section = worker, section
        kind = section.teacher_weights
        self.shadow = None if kind == "current" else worker.engine.keep_shadow(average=kind == "average")

    def after_update(self) -> None:
        """Move an average of the weights after an optimizer step."""
        if self.shadow is not None and self.section.teacher_weights == "average":
            self.shadow.average(self.section.teacher_rate)

    def logprobs(self, share: Share, prompts: Sequence[PrivilegedPrompts]) -> Float[Tensor, " N"]:
        """Return the teacher's log-probabilities of the sampled tokens: nan without a teacher, and outside the mask.

        Collective.
        """
        taught, mask = self._share(share, prompts)
        with self._weights(share.plan):
            (values,) = self.worker.compute("teacher logprobs", policy_logprobs_only, taught)
        return moved(values, taught.rollouts.response_mask, mask)

    def states(self, share: Share, prompts: Sequence[PrivilegedPrompts]) -> tuple[LearntStates, VocabularyHead]:
        """Return the teacher's hidden states at the sampled tokens, and the teacher's head. Every sequence needs a
        prompt. Collective."""
        worker, (taught, _) = self.worker, self._share(share, prompts)
        rollouts = taught.rollouts
        mask = rollouts.response_mask
        places = mask.cumsum(0) - 1

        def forward(microbatch: Microbatch) -> Tensor:
            token_ids, lengths, learnt = worker.columns(taught, microbatch)
            states: Tensor = worker.engine.forward(
                learnt_states, token_ids, lengths, mask=learnt, branches=microbatch.branches
            )
            return states

        with self._weights(share.plan):
            with whole(list(worker.engine.module.get_output_embeddings().parameters())):
                head = vocabulary_head(worker.engine.module)
            hidden = head.weight.new_empty(int(mask.sum()), head.weight.shape[1], device="cpu")
            for microbatch, states in worker.passes("teacher states", taught.microbatches[0], forward):
                hidden[places[microbatch.tokens[mask[microbatch.tokens]]]] = states.cpu()
        counts = sequence_counts(mask, rollouts.lengths)
        return LearntStates(sequence_ids=rollouts.sequence_ids, lengths=counts, hidden=hidden), head

    @contextmanager
    def _weights(self, plan: BatchPlan) -> Iterator[None]:
        """Use the teacher's weights in the block. The first pass of a period begins with a new snapshot.

        Steps without a taught response make no update, so a later pass of the period copies the same weights.
        """
        if self.shadow is None:
            yield
            return
        every = self.section.teacher_every
        period = 0 if every is None else (plan.step - 1) // every
        if period > self.shadow.period:
            self.shadow.renew()
            self.shadow.period = period
        with self.shadow.in_use():
            yield

    def _share(self, share: Share, prompts: Sequence[PrivilegedPrompts]) -> tuple[Share, Tensor]:
        """Return the share's sequences after their privileged prompts, and the mask of their sampled tokens in the
        share. A sequence without a prompt is left out. Collective."""
        rollouts, worker = share.rollouts, self.worker
        known = {i for part in prompts for i in part.sequence_ids.tolist()}
        is_taught = torch.tensor([bool(share.ids) and i in known for i in share.held])
        mask = rollouts.response_mask & to_tokens(is_taught, rollouts.lengths, num_tokens=len(rollouts.token_ids))
        rows = is_taught.nonzero()[:, 0].tolist()
        if not rows:  # the passes of the ranks are collective: a rank without a sequence passes empty micro-batches
            none = replace(share, rollouts=rollouts.take(()), microbatches=(worker.split(rollouts.lengths, ()),))
            return none, mask
        students = rollouts.take(rows)
        given = PrivilegedPrompts.gather(prompts, students.sequence_ids.tolist())
        sampled = students.response_mask.split(students.lengths.tolist())
        responses = [int(of_row.int().argmax()) for of_row in sampled]  # the first sampled token of each row
        lengths = given.lengths + students.lengths - torch.tensor(responses)

        def column(name: str, of_prompt: Tensor) -> Tensor:
            own = getattr(students, name).split(students.lengths.tolist())
            parts = zip(of_prompt.split(given.lengths.tolist()), own, responses, strict=True)
            return torch.cat([part for prompt, whole, first in parts for part in (prompt, whole[first:])])

        fill = partial(torch.full_like, given.token_ids)
        taught = Rollouts(
            sequence_ids=students.sequence_ids,
            lengths=lengths,
            token_ids=column("token_ids", given.token_ids),
            response_mask=column("response_mask", fill(0).bool()),
            rollout_logprobs=column("rollout_logprobs", fill(0).float()),
            versions=column("versions", fill(-1)),
        )
        temperatures = share.temperatures
        if isinstance(temperatures, Tensor):
            starts = (rollouts.lengths.cumsum(0) - rollouts.lengths)[rows]
            temperatures = to_tokens(temperatures[starts], lengths, num_tokens=len(taught.token_ids))
        prefixes = shared_prefixes(taught, samples_per_prompt=worker.rollouts_config.samples_per_prompt)
        microbatches = worker.split(lengths, range(len(rows)), prefixes)
        return replace(share, rollouts=taught, microbatches=(microbatches,), temperatures=temperatures), mask
