"""One rank of a process reward model. A scalar head, read at the end of each step, learns whether the step is right."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.process_reward_model import ProcessRewardModel
from rlhf.models.files.loading import load_critic
from rlhf.models.packed.heads import token_scores
from rlhf.objectives.reward_model_loss import step_cross_entropy
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import LabelledSteps
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.offline_worker import ExamplesWorker, OfflineBatch
from rlhf.workers.trained import Measure


class StepRewardWorker(ExamplesWorker[LabelledSteps]):
    """Cross-entropy of the steps' labels, averaged over the steps of the whole optimizer step."""

    family = ProcessRewardModel
    load_model = staticmethod(load_critic)  # with a head of zeros, unless the checkpoint has one

    def loss(self, batch: OfflineBatch[LabelledSteps], microbatch: Microbatch, shared: None) -> tuple[Tensor, Measure]:
        """Return the cross-entropy, and the number of correctly classified steps."""
        steps, accuracy = batch.examples, "step_accuracy/mean" if torch.is_grad_enabled() else "accuracy"
        scores = self.engine.forward(
            token_scores, self.part(steps.token_ids, microbatch), microbatch.lengths.to(self.device)
        )
        mask, labels = self.part(steps.loss_mask, microbatch), self.part(steps.step_labels, microbatch)
        total = step_cross_entropy(scores, labels.to(scores.dtype), mask).sum()

        def measure() -> Metrics:
            count, right = int(mask.sum()), mask & ((scores.detach() > 0.0) == labels)
            return {
                "loss/mean": Mean(total=float(total.detach()), count=count),
                accuracy: Mean(total=float(right.sum()), count=count),
            }

        return total / batch.plan.num_tokens, measure
