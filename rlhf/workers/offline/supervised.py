"""One rank of a model trained on fixed examples with cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms.sft import SFTConfig
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import supervised_loss
from rlhf.roles import Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import ExpMean, Mean, Reduction, Sum
from rlhf.types import Examples, MinibatchPlan
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.base import ExamplesWorker


class SupervisedWorker(ExamplesWorker[Examples]):
    """Cross-entropy on the tokens in the loss mask, averaged over the whole optimizer step."""

    def load_module(self) -> Any:
        """Load the language model without an adapter."""
        return load_causal_lm(self.model_config.model, **self.loading_options())

    def update_on(self, plan: MinibatchPlan) -> Metrics:
        """Run one optimizer step on the plan's rows of the training set. Collective."""
        parts: list[Metrics] = []
        examples, microbatches = self.split(0, plan)
        for index, microbatch in enumerate(microbatches):
            with explains_out_of_memory(
                role="policy", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                loss, _, correct = self._forward(examples, microbatch, token_weight=1.0 / plan.num_tokens, trains=True)
                self.engine.backward(loss, last=index == len(microbatches) - 1)
            learnt = int(examples.loss_mask[microbatch.tokens].sum())
            metrics: dict[str, Reduction] = {
                "update/loss/mean": Mean(total=float(loss.detach()) * plan.num_tokens, count=learnt),
                "update/token_accuracy/mean": Mean(total=correct, count=learnt),
                "update/tokens/total": Sum(total=len(microbatch.tokens) if microbatch.rows else 0),
            }
            parts.append(metrics)
        parts.append(self.step_metrics(self.engine.step()))
        return merge_metrics(parts)

    def evaluate(self, dataset: int, name: str, plan: MinibatchPlan) -> Metrics:
        """Measure loss and accuracy on the plan's rows of a data set. Collective."""
        parts: list[Metrics] = []
        examples, microbatches = self.split(dataset, plan)
        for microbatch in microbatches:
            with (
                torch.no_grad(),
                explains_out_of_memory(
                    role="policy", stage="eval", rank=self.place.rank, tokens=len(microbatch.tokens)
                ),
            ):
                _, logprob_sum, correct = self._forward(examples, microbatch, token_weight=1.0)
            learnt = int(examples.loss_mask[microbatch.tokens].sum())
            metrics: dict[str, Reduction] = {
                f"eval/{name}/loss": Mean(total=-logprob_sum, count=learnt),
                f"eval/{name}/perplexity": ExpMean(total=-logprob_sum, count=learnt),
                f"eval/{name}/token_accuracy": Mean(total=correct, count=learnt),
            }
            parts.append(metrics)
        return merge_metrics(parts)

    def _forward(
        self, examples: Examples, microbatch: Microbatch, *, token_weight: float, trains: bool = False
    ) -> tuple[Float[Tensor, ""], float, float]:
        """Return the weighted loss, the summed log-probabilities and the number of top-1 hits in the loss mask."""
        config = self.config.algorithm
        assert isinstance(config, SFTConfig)
        loss, logprobs, is_top1 = self.engine.forward(
            supervised_loss,
            examples.token_ids[microbatch.tokens].to(self.device),
            microbatch.lengths.to(self.device),
            mask=examples.loss_mask[microbatch.tokens].to(self.device),
            token_weight=token_weight,
            by_probability=trains and config.loss == "dft",
            noise_alpha=config.neftune_alpha if trains else None,
        )
        return loss, float(logprobs.sum()), float(is_top1.sum())
