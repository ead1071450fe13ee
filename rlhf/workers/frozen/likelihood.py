"""A worker measuring the likelihood of examples: the forward pass of supervised training, without an update."""

from __future__ import annotations

from torch import Tensor

from rlhf.evaluation.results import ExampleResult
from rlhf.models.packed.forward import supervised_loss
from rlhf.types import Examples
from rlhf.workers.frozen.frozen_worker import FrozenWorker
from rlhf.workers.microbatches import Microbatch


class LikelihoodWorker(FrozenWorker):
    """Measures examples, distributed over the workers."""

    role = "policy"

    def measure(self, examples: Examples) -> tuple[ExampleResult, ...]:
        results: dict[int, ExampleResult] = {}

        def forward(microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            return supervised_loss(
                self.model,
                self.part(examples.token_ids, microbatch),
                microbatch.lengths.to(self.device),
                mask=self.part(examples.loss_mask, microbatch),
                token_weight=1.0,
            )

        for microbatch, (_, logprobs, is_top1) in self.passes("eval", self.split(examples.lengths), forward):
            sizes, mask = microbatch.lengths.tolist(), examples.loss_mask[microbatch.tokens]
            columns = (mask.split(sizes), logprobs.double().split(sizes), is_top1.split(sizes))
            for row, learnt, logprob, top1 in zip(microbatch.rows, *columns, strict=True):
                results[row] = ExampleResult(
                    num_tokens=int(learnt.sum()), logprob=float(logprob.sum()), num_top1=int(top1.sum())
                )
        return tuple(results[row] for row in range(len(examples.lengths)))
