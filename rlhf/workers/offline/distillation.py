"""One rank of a student learning the distributions of frozen teachers on fixed examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms.distillation import Distillation
from rlhf.config.derive import has_named_teachers
from rlhf.models.packed.forward import distillation_loss
from rlhf.objectives.distillation import weighted_divergence_sum
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Mean, Reduction
from rlhf.types import Examples, TeacherColumn
from rlhf.workers.lessons import Lesson, by_teacher, lessons_of
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.offline_worker import ExamplesWorker, OfflineBatch
from rlhf.workers.taught import TaughtWorker
from rlhf.workers.trained import Measure


class DistillationWorker(TaughtWorker, ExamplesWorker[Examples]):
    """Divergence from each row's teacher at the tokens in the loss mask, averaged over the whole optimizer step."""

    family = Distillation
    algorithm: Distillation

    def shared(self, batch: OfflineBatch[Examples], states: Sequence[TeacherColumn]) -> list[Lesson]:
        if not batch.rows:
            return []
        examples = batch.examples
        return lessons_of(batch.plan, batch.rows, states, batch=examples, mask=examples.loss_mask)

    def loss(
        self, batch: OfflineBatch[Examples], microbatch: Microbatch, shared: Sequence[Lesson]
    ) -> tuple[Tensor, Measure]:
        """Return the divergence from the teachers, plus any cross-entropy of the algorithm."""
        config, trains, num_tokens = self.algorithm.config, torch.is_grad_enabled(), batch.plan.num_tokens
        mask = batch.examples.loss_mask[microbatch.tokens]
        loss, *columns = self.engine.forward(
            distillation_loss,
            self.part(batch.examples.token_ids, microbatch),
            microbatch.lengths.to(self.device),
            mask=mask.to(self.device),
            taught=self.taught(shared, microbatch, batch.examples.loss_mask),
            divergence_sum=partial(weighted_divergence_sum, self.algorithm.divergence, sft_coef=config.sft_coef),
            temperature=config.temperature,
            token_weight=1.0 / num_tokens,
        )

        def measure() -> Metrics:
            count = int(mask.sum())
            totals = torch.stack([column.sum() for column in columns]).tolist()  # synchronizes the device once
            divergence, logprob, top1 = (Mean(total=total, count=count) for total in totals)
            total = Mean(total=float(loss.detach()) * num_tokens, count=count)
            losses: dict[str, Reduction] = {"loss/mean": total if trains else divergence}
            if trains:
                losses["divergence/mean"] = divergence
            losses |= self.compared(shared, microbatch)
            if has_named_teachers(self.config):
                losses |= by_teacher("divergence_by_teacher", columns[0].cpu(), shared, microbatch)
            return {**losses, "nll/mean": Mean(total=-logprob.total, count=count), "token_accuracy/mean": top1}

        return loss, measure
