"""One rank of a process reward model. A scalar head, read at the end of each step, learns whether the step is right."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.heads import token_scores
from rlhf.models.loading import load_critic
from rlhf.objectives.reward_model_loss import step_cross_entropy
from rlhf.roles import Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Mean, Sum
from rlhf.types import LabelledSteps, MinibatchPlan
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.base import ExamplesWorker


class StepRewardWorker(ExamplesWorker[LabelledSteps]):
    """Cross-entropy of the steps' labels, averaged over the steps of the whole optimizer step."""

    def load_module(self) -> Any:
        """Load the language model with a head of zeros. A checkpoint with a head keeps it."""
        return load_critic(self.model_config.model, **self.loading_options())

    def update_on(self, plan: MinibatchPlan) -> Metrics:
        """Run one optimizer step on the plan's rows of the training set. Collective."""
        parts: list[Metrics] = []
        steps, microbatches = self.split(0, plan)
        for index, microbatch in enumerate(microbatches):
            with explains_out_of_memory(
                role="policy", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                total, right = self._loss(steps, microbatch)
                self.engine.backward(total / plan.num_tokens, last=index == len(microbatches) - 1)
            count = int(steps.loss_mask[microbatch.tokens].sum())
            parts.append({"update/loss/mean": Mean(total=float(total.detach()), count=count)})
            parts.append({"update/step_accuracy/mean": Mean(total=right, count=count)})
            parts.append({"update/tokens/total": Sum(total=len(microbatch.tokens) if microbatch.rows else 0)})
        parts.append(self.step_metrics(self.engine.step()))
        return merge_metrics(parts)

    def evaluate(self, dataset: int, name: str, plan: MinibatchPlan) -> Metrics:
        """Measure loss and accuracy on the plan's rows of a data set. Collective."""
        parts: list[Metrics] = []
        steps, microbatches = self.split(dataset, plan)
        for microbatch in microbatches:
            with (
                torch.no_grad(),
                explains_out_of_memory(
                    role="policy", stage="eval", rank=self.place.rank, tokens=len(microbatch.tokens)
                ),
            ):
                total, right = self._loss(steps, microbatch)
            count = int(steps.loss_mask[microbatch.tokens].sum())
            parts.append({f"eval/{name}/loss": Mean(total=float(total), count=count)})
            parts.append({f"eval/{name}/accuracy": Mean(total=right, count=count)})
        return merge_metrics(parts)

    def _loss(self, steps: LabelledSteps, microbatch: Microbatch) -> tuple[Float[Tensor, ""], float]:
        """Return the summed cross-entropy of a micro-batch's steps, and the number of correctly classified steps."""
        scores = self.engine.forward(
            token_scores, steps.token_ids[microbatch.tokens].to(self.device), microbatch.lengths.to(self.device)
        )
        mask = steps.loss_mask[microbatch.tokens].to(self.device)
        labels = steps.step_labels[microbatch.tokens].to(self.device)
        losses = step_cross_entropy(scores, labels.to(scores.dtype), mask)
        right = mask & ((scores.detach() > 0.0) == labels)
        return losses.sum(), float(right.sum())
