"""One rank of a model trained on fixed examples with cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.sft import SFT
from rlhf.models.packed.forward import supervised_loss
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import ExpMean, Mean
from rlhf.types import Examples
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.offline_worker import ExamplesWorker, OfflineBatch
from rlhf.workers.trained import Measure


class SupervisedWorker(ExamplesWorker[Examples]):
    """Cross-entropy on the tokens in the loss mask, averaged over the whole optimizer step."""

    family = SFT
    algorithm: SFT

    def loss(self, batch: OfflineBatch[Examples], microbatch: Microbatch, shared: None) -> tuple[Tensor, Measure]:
        """Return the cross-entropy, and the number of tokens with the largest probability."""
        config, trains, num_tokens = self.algorithm.config, torch.is_grad_enabled(), batch.plan.num_tokens
        mask = batch.examples.loss_mask[microbatch.tokens]
        loss, logprobs, is_top1 = self.engine.forward(
            supervised_loss,
            self.part(batch.examples.token_ids, microbatch),
            microbatch.lengths.to(self.device),
            mask=mask.to(self.device),
            token_weight=1.0 / num_tokens,
            by_probability=trains and config.loss == "dft",
            noise_alpha=config.neftune_alpha if trains else None,
        )

        def measure() -> Metrics:
            count, nll = int(mask.sum()), -float(logprobs.sum())
            total = float(loss.detach()) * num_tokens if trains else nll
            perplexity = {} if trains else {"perplexity": ExpMean(total=nll, count=count)}
            hits = {} if is_top1 is None else {"token_accuracy/mean": Mean(total=float(is_top1.sum()), count=count)}
            return {"loss/mean": Mean(total=total, count=count), **perplexity, **hits}

        return loss, measure
