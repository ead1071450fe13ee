"""One rank of a student learning a frozen teacher's distributions on fixed examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms.distillation import Distillation
from rlhf.models.packed.forward import distillation_loss
from rlhf.objectives.distillation import weighted_divergence_sum
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import Examples, LearntStates, VocabularyHead
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.offline_worker import ExamplesWorker, OfflineBatch
from rlhf.workers.trained import Measure


class DistillationWorker(ExamplesWorker[Examples]):
    """Divergence from the teacher at the tokens in the loss mask, averaged over the whole optimizer step."""

    family = Distillation
    algorithm: Distillation

    def take_teacher(self, head: VocabularyHead) -> None:
        """Keep the teacher's vocabulary head. Called once, before the first step."""
        self.teacher = head.to(self.device)

    def shared(self, batch: OfflineBatch[Examples], states: Sequence[LearntStates]) -> Float[Tensor, "n K"]:
        if not batch.rows:
            return states[0].hidden[:0]
        hidden, num_tokens = LearntStates.gather(states, batch.rows).hidden, int(batch.examples.loss_mask.sum())
        if len(hidden) != num_tokens:
            raise ValueError(f"the teacher returned {len(hidden)} states for {num_tokens} tokens in the loss mask")
        return hidden

    def loss(
        self, batch: OfflineBatch[Examples], microbatch: Microbatch, shared: Float[Tensor, "n K"]
    ) -> tuple[Tensor, Measure]:
        """Return the divergence from the teacher, plus any cross-entropy of the algorithm."""
        config, trains, num_tokens = self.algorithm.config, torch.is_grad_enabled(), batch.plan.num_tokens
        whole_mask = batch.examples.loss_mask
        mask = whole_mask[microbatch.tokens]
        places = whole_mask.cumsum(0)[microbatch.tokens[mask]] - 1
        loss, *columns = self.engine.forward(
            distillation_loss,
            self.part(batch.examples.token_ids, microbatch),
            microbatch.lengths.to(self.device),
            mask=mask.to(self.device),
            teacher=shared[places].to(self.device),
            head=self.teacher,
            divergence_sum=partial(weighted_divergence_sum, self.algorithm.divergence, sft_coef=config.sft_coef),
            temperature=config.temperature,
            token_weight=1.0 / num_tokens,
        )

        def measure() -> Metrics:
            count = int(mask.sum())
            totals = torch.stack([column.sum() for column in columns]).tolist()  # synchronizes the device once
            divergence, logprob, top1 = (Mean(total=total, count=count) for total in totals)
            total = Mean(total=float(loss.detach()) * num_tokens, count=count)
            losses = {"loss/mean": total, "divergence/mean": divergence} if trains else {"loss/mean": divergence}
            return {**losses, "nll/mean": Mean(total=-logprob.total, count=count), "token_accuracy/mean": top1}

        return loss, measure
