"""One rank of a policy learning from single responses, each labelled desirable or undesirable.

The second sequence of a row is its prompt with another row's response. It runs without a gradient before the update and
measures the divergence of the policy from the reference. Losses are sums over rows, divided by the rows of the whole
step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.kto import KTO
from rlhf.config.schema.root import Config
from rlhf.engine.memory import explains_out_of_memory
from rlhf.objectives.masking import sequence_sums
from rlhf.objectives.unpaired_loss import mismatched_kl
from rlhf.roles import Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import DifferenceOfMeans, Last, Mean, Sum
from rlhf.types import MinibatchPlan
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.base import Batch
from rlhf.workers.offline.referenced import ReferencedPolicy
from rlhf.workers.rank_context import RankContext

RESPONSE, MISMATCHED = (0,), (1,)  # sides of a row


class UnpairedWorker(ReferencedPolicy):
    """Turns rows into log-ratios, log-ratios into losses, and losses into updates and metrics."""

    def __init__(self, config: Config, place: RankContext, *, optimizer_steps: int) -> None:
        super().__init__(config, place, optimizer_steps=optimizer_steps)
        self.algorithm = algorithm_of(config.algorithm, KTO)

    def update_on(self, plan: MinibatchPlan) -> Metrics:
        """Run one optimizer step on the plan's rows of the training set. Collective."""
        compared = self._compared(0, plan)
        parts: list[Metrics] = []
        batch = self.batch(0, plan, sides=RESPONSE)
        for index, microbatch in enumerate(batch.microbatches):
            with explains_out_of_memory(
                role="policy", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                loss, metrics = self._loss(batch, microbatch, plan, compared=compared, name="preference/{}/mean")
                self.engine.backward(loss, last=index == len(batch.microbatches) - 1)
            if microbatch.rows:
                total = Mean(total=float(loss.detach()) * plan.num_sequences, count=len(microbatch.rows))
                parts += [
                    {"update/loss/mean": total, "update/tokens/total": Sum(total=len(microbatch.tokens))},
                    metrics,
                ]
        parts.append(self.step_metrics(self.engine.step()))
        if self.place.rank == 0 and self.algorithm.config.compares_with == "divergence":
            parts.append({"preference/mismatched_kl": Last(value=compared)})
        return merge_metrics(parts)

    def evaluate(self, dataset: int, name: str, plan: MinibatchPlan) -> Metrics:
        """Measure loss and accuracy on the plan's rows, with the divergence of the same rows. Collective."""
        parts: list[Metrics] = []
        with torch.no_grad():
            compared = self._compared(dataset, plan)
            batch = self.batch(dataset, plan, sides=RESPONSE)
            for microbatch in batch.microbatches:
                with explains_out_of_memory(
                    role="policy", stage="eval", rank=self.place.rank, tokens=len(microbatch.tokens)
                ):
                    loss, metrics = self._loss(batch, microbatch, plan, compared=compared, name=f"eval/{name}/{{}}")
                if microbatch.rows:
                    total = Mean(total=float(loss) * plan.num_sequences, count=len(microbatch.rows))
                    parts += [{f"eval/{name}/loss": total}, metrics]
        return merge_metrics(parts)

    def _log_ratios(self, batch: Batch, microbatch: Microbatch) -> Float[Tensor, " b"]:
        examples = batch.pairs.examples
        assert batch.reference is not None
        mask = examples.loss_mask[microbatch.tokens].to(self.device)
        reference = batch.reference.values[microbatch.tokens].to(self.device)
        return sequence_sums(
            torch.where(mask, self.logprobs(examples, microbatch) - reference, 0.0), microbatch.lengths.to(self.device)
        )

    def _compared(self, dataset: int, plan: MinibatchPlan) -> float:
        """Return the reference point of the log-ratios, over all rows of the plan. Collective."""
        of = self.algorithm.config.compares_with
        if of == "zero":
            return 0.0
        batch = self.batch(dataset, plan, sides=MISMATCHED if of == "divergence" else RESPONSE)
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for microbatch in batch.microbatches:
                log_ratios = self._log_ratios(batch, microbatch)
                if microbatch.rows:
                    total += log_ratios.double().sum().cpu()
        whole = float(self.engine.all_reduce_sum(total.to(self.device))) / self.resources.sequence_parallel
        num_rows = sum(map(len, plan.sequences_by_rank))  # in an evaluation, the rows of this call
        return mismatched_kl(whole, num_rows) if of == "divergence" else whole / num_rows

    def _loss(
        self, batch: Batch, microbatch: Microbatch, plan: MinibatchPlan, *, compared: float, name: str
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Return a micro-batch's share of the step's loss, and metrics of its rewards against their labels."""
        log_ratios = self._log_ratios(batch, microbatch)
        if not microbatch.rows:
            return log_ratios.sum() * 0.0, {}
        labels = batch.pairs.labels[batch.places(microbatch)].to(self.device)
        losses = self.algorithm.losses(log_ratios, labels, compared=compared)
        with torch.no_grad():
            rewards = self.algorithm.config.beta * log_ratios
            good, bad = rewards[labels], rewards[~labels]
            right = ((rewards > self.algorithm.config.beta * compared) == labels).sum()
            sums = torch.stack([right.to(rewards.dtype), good.sum(), bad.sum()]).tolist()
        of_good, of_bad = Mean(total=sums[1], count=len(good)), Mean(total=sums[2], count=len(bad))
        metrics: Metrics = {
            name.format("accuracy"): Mean(total=sums[0], count=len(labels)),
            name.format("margin"): DifferenceOfMeans(left=of_good, right=of_bad),
            name.format("chosen_reward"): of_good,
            name.format("rejected_reward"): of_bad,
        }
        return losses.sum() / plan.num_sequences, metrics
