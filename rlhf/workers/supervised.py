"""One rank of a model that is trained on fixed examples."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config.root import Config
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.loading import load_causal_lm
from rlhf.models.packed import supervised_loss
from rlhf.roles import Metrics
from rlhf.tracking.metrics import merge
from rlhf.tracking.reductions import Last, Mean, Reduction, Sum
from rlhf.types import Examples, MinibatchPlan
from rlhf.workers.place import RankPlace
from rlhf.workers.ragged import Slice, padded, slices
from rlhf.workers.trained import TrainedWorker


class SupervisedWorker(TrainedWorker):
    """Cross-entropy on the tokens to be learnt, as a mean over those of the whole optimizer step."""

    role = "policy"

    def __init__(self, config: Config, place: RankPlace, *, optimizer_steps: int) -> None:
        super().__init__(
            config,
            config.policy,
            config.cluster.roles.policy,
            place,
            lr=config.train.lr,
            optimizer_steps=optimizer_steps,
        )

    def load_module(self) -> Any:
        """The language model."""
        return load_causal_lm(self.model_config.model, **self.loading_options())

    def load_examples(self, *examples: Examples) -> None:
        """The data sets: the training set first. A plan's sequence ids are rows of the set it is used on."""
        self.examples = examples

    def update_on(self, plan: MinibatchPlan) -> Metrics:
        """One optimizer step on the named rows of the training set. Collective."""
        parts: list[Metrics] = []
        cut = self._cut(self.examples[0], plan)
        for index, piece in enumerate(cut):
            with explains_out_of_memory(role="policy", stage="update", rank=self.place.rank, tokens=len(piece.tokens)):
                loss, _, correct = self._forward(self.examples[0], piece, token_weight=1.0 / plan.num_tokens)
                self.engine.backward(loss, last=index == len(cut) - 1)
            learnt = int(self.examples[0].loss_mask[piece.tokens].sum())
            found: dict[str, Reduction] = {
                "update/loss/mean": Mean(total=float(loss.detach()) * plan.num_tokens, count=learnt),
                "update/token_accuracy/mean": Mean(total=correct, count=learnt),
                "update/tokens/total": Sum(total=len(piece.tokens) if piece.rows else 0),
            }
            parts.append(found)
        report = self.engine.step()
        if self.place.rank == 0:
            parts.append({"update/grad_norm": Mean.of([report.grad_norm]), "update/lr": Last(value=report.lr)})
        return merge(parts)

    def evaluate(self, dataset: int, name: str, plan: MinibatchPlan) -> Metrics:
        """Loss and accuracy on the named rows of a data set. Collective."""
        parts: list[Metrics] = []
        examples = self.examples[dataset]
        for piece in self._cut(examples, plan):
            with (
                torch.no_grad(),
                explains_out_of_memory(role="policy", stage="eval", rank=self.place.rank, tokens=len(piece.tokens)),
            ):
                _, logprob_sum, correct = self._forward(examples, piece, token_weight=1.0)
            learnt = int(examples.loss_mask[piece.tokens].sum())
            found: dict[str, Reduction] = {
                f"eval/{name}/loss": Mean(total=-logprob_sum, count=learnt),
                f"eval/{name}/token_accuracy": Mean(total=correct, count=learnt),
            }
            parts.append(found)
        return merge(parts)

    def _cut(self, examples: Examples, plan: MinibatchPlan) -> list[Slice]:
        rows = plan.sequences_by_rank[self.data_rank]
        cut = slices(examples.lengths.tolist(), rows, max_tokens=self.config.train.max_tokens_per_microbatch)
        return padded(cut, self.engine.max_over_ranks(len(cut)))

    def _forward(
        self, examples: Examples, piece: Slice, *, token_weight: float
    ) -> tuple[Float[Tensor, ""], float, float]:
        """(weighted loss, sum of log-probabilities, how many are the likeliest) of the tokens to be learnt."""
        loss, logprobs, is_top1 = self.engine.forward(
            supervised_loss,
            examples.token_ids[piece.tokens].to(self.device),
            piece.lengths.to(self.device),
            mask=examples.loss_mask[piece.tokens].to(self.device),
            token_weight=token_weight,
        )
        return loss, float(logprobs.sum()), float(is_top1.sum())
