"""One rank of a student learning a frozen teacher's distributions on fixed examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.distillation import Distillation
from rlhf.config.schema.root import Config
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import distillation_loss
from rlhf.roles import Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Mean, Reduction, Sum
from rlhf.types import Examples, LearntStates, MinibatchPlan, VocabularyHead
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.base import ExamplesWorker
from rlhf.workers.rank_context import RankContext


class DistillationWorker(ExamplesWorker[Examples]):
    """Divergence from the teacher at the tokens in the loss mask, averaged over the whole optimizer step."""

    def __init__(self, config: Config, place: RankContext, *, optimizer_steps: int) -> None:
        super().__init__(config, place, optimizer_steps=optimizer_steps)
        self.algorithm = algorithm_of(config.algorithm, Distillation)

    def load_module(self) -> Any:
        """Load the language model without an adapter."""
        return load_causal_lm(self.model_config.model, **self.loading_options())

    def take_teacher(self, head: VocabularyHead) -> None:
        """Keep the teacher's vocabulary head. Called once, before the first step."""
        self.teacher = head.to(self.device)

    def update_on(self, plan: MinibatchPlan, *states: LearntStates) -> Metrics:
        """Run one optimizer step on the plan's training rows. `states` are the teacher's hidden states. Collective."""
        parts: list[Metrics] = []
        examples, microbatches = self.split(0, plan)
        hidden = self._hidden(plan, states)
        for index, microbatch in enumerate(microbatches):
            with explains_out_of_memory(
                role="policy", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                loss, *columns = self._forward(examples, microbatch, hidden, token_weight=1.0 / plan.num_tokens)
                self.engine.backward(loss, last=index == len(microbatches) - 1)
            learnt = int(examples.loss_mask[microbatch.tokens].sum())
            divergence, logprob, top1 = _totals(columns)
            metrics: dict[str, Reduction] = {
                "update/loss/mean": Mean(total=float(loss.detach()) * plan.num_tokens, count=learnt),
                "update/divergence/mean": Mean(total=divergence, count=learnt),
                "update/nll/mean": Mean(total=-logprob, count=learnt),
                "update/token_accuracy/mean": Mean(total=top1, count=learnt),
                "update/tokens/total": Sum(total=len(microbatch.tokens) if microbatch.rows else 0),
            }
            parts.append(metrics)
        parts.append(self.step_metrics(self.engine.step()))
        return merge_metrics(parts)

    def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, *states: LearntStates) -> Metrics:
        """Measure divergence, likelihood and accuracy on the plan's rows of a data set. Collective."""
        parts: list[Metrics] = []
        examples, microbatches = self.split(dataset, plan)
        hidden = self._hidden(plan, states)
        for microbatch in microbatches:
            with (
                torch.no_grad(),
                explains_out_of_memory(
                    role="policy", stage="eval", rank=self.place.rank, tokens=len(microbatch.tokens)
                ),
            ):
                _, *columns = self._forward(examples, microbatch, hidden, token_weight=1.0)
            learnt = int(examples.loss_mask[microbatch.tokens].sum())
            divergence, logprob, top1 = _totals(columns)
            metrics: dict[str, Reduction] = {
                f"eval/{name}/loss": Mean(total=divergence, count=learnt),
                f"eval/{name}/nll": Mean(total=-logprob, count=learnt),
                f"eval/{name}/token_accuracy": Mean(total=top1, count=learnt),
            }
            parts.append(metrics)
        return merge_metrics(parts)

    def _hidden(self, plan: MinibatchPlan, states: tuple[LearntStates, ...]) -> Float[Tensor, "n K"]:
        """Concatenate the teacher's states of this rank's rows."""
        rows = plan.sequences_by_rank[self.data_rank]
        return LearntStates.gather(states, rows).hidden if rows else states[0].hidden[:0]

    def _forward(
        self, examples: Examples, microbatch: Microbatch, hidden: Float[Tensor, "n K"], *, token_weight: float
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"], Bool[Tensor, " N"]]:
        """Return a micro-batch's weighted loss, divergences, log-probabilities, and top-1 hits."""
        config = self.algorithm.config
        mask = examples.loss_mask[microbatch.tokens]
        places = examples.loss_mask.cumsum(0)[microbatch.tokens[mask]] - 1
        return self.engine.forward(
            distillation_loss,
            examples.token_ids[microbatch.tokens].to(self.device),
            microbatch.lengths.to(self.device),
            mask=mask.to(self.device),
            teacher=hidden[places].to(self.device),
            head=self.teacher,
            divergence=self.algorithm.divergence,
            temperature=config.temperature,
            token_weight=token_weight,
            sft_coef=config.sft_coef,
        )


def _totals(columns: Sequence[Tensor]) -> list[float]:
    """Sum each column over the tokens. The device is synchronized once."""
    totals: list[float] = torch.stack([column.sum() for column in columns]).tolist()
    return totals
