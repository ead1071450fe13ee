"""One rank of the critic. A rank values a batch before the update, then regresses on the returns."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms.microbatch import ValueMicrobatch
from rlhf.algorithms.ppo import PPO
from rlhf.config.schema.model import CriticConfig
from rlhf.config.schema.root import Config
from rlhf.engine.distributed import RankContext
from rlhf.models.files.loading import load_critic
from rlhf.models.packed.heads import token_values
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import BatchPlan, Rollouts, TokenValues
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.online.online_worker import OnlineWorker
from rlhf.workers.trained import Measure


class CriticWorker(OnlineWorker):
    """The value model of an online run."""

    role = "critic"
    family = PPO
    algorithm: PPO
    step_metric = "update/critic_{}"
    load_model = staticmethod(load_critic)

    def __init__(self, config: Config, model: CriticConfig, place: RankContext, *, optimizer_steps: int) -> None:
        super().__init__(config, place, optimizer_steps=optimizer_steps, model=model)
        self.lr = self.algorithm.config.critic_lr

    def values(self, plan: BatchPlan, *parts: Rollouts) -> tuple[TokenValues, int]:
        """Receive this rank's share of a batch and value the tokens. Return the column and the size. Collective."""
        self.share, _ = self.receive(plan, parts, {})
        (self.old_values,) = self.compute("values", _values, self.share)
        column = self.share.column(self.old_values)
        return column, len(column.values)

    def prepare(self, *returns: TokenValues) -> None:
        held = self.share.plan.received_by(self.data_rank)
        self.returns: Float[Tensor, " N"] = TokenValues.gather(returns, held).values

    def forward_backward(self, minibatch: int) -> Metrics:
        """Compute the gradient of a minibatch of the batch, unless no token is trained. Collective."""
        plan = self.share.plan.minibatches[minibatch]
        if not plan.num_tokens:
            return {}
        counts, clips = self.counts(plan), self.algorithm.config.value_clip is not None

        def compute(microbatch: Microbatch) -> tuple[Tensor, Measure]:
            _, lengths, mask = self.columns(self.share, microbatch)
            batch = ValueMicrobatch(
                lengths=lengths,
                response_mask=mask,
                values=self.forward(_values, self.share, microbatch),
                old_values=self.part(self.old_values, microbatch),
                returns=self.part(self.returns, microbatch),
                sample_tokens=self.sample_tokens(self.share, microbatch),
            )
            terms = self.algorithm.critic_loss(batch, counts)

            def measure() -> Metrics:
                sampled = int(mask.sum())
                loss, clipped = torch.stack([terms.loss.detach(), terms.clipped_tokens]).tolist()
                metrics = {"update/value_loss/mean": Mean(total=loss * plan.num_tokens, count=sampled)}
                fraction = {"update/value_clip_fraction/mean": Mean(total=clipped, count=sampled)}
                return metrics | fraction if clips else metrics

            return terms.loss, measure

        return self.whole_gradient(self.share.microbatches[minibatch], compute)


def _values(model: Any, token_ids: Tensor, lengths: Tensor, *, branches: Any, **_: Any) -> Tensor:
    """Return the values of all tokens, independent of mask and temperature."""
    return token_values(model, token_ids, lengths, branches)
