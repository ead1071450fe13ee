"""One rank of the critic. It values a batch before its update, then regresses on the returns."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.microbatch import StepCounts, ValueMicrobatch
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.config.schema.model import CriticConfig
from rlhf.config.schema.root import Config
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.heads import token_values
from rlhf.models.loading import load_critic
from rlhf.roles import Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import Last, Mean
from rlhf.types import BatchPlan, Rollouts, TokenValues
from rlhf.workers.microbatches import padded, shared_prompts, split_microbatches
from rlhf.workers.online.update_metrics import critic_metrics
from rlhf.workers.rank_context import RankContext
from rlhf.workers.trained import TrainedWorker


class CriticWorker(TrainedWorker):
    """The value model of an online run."""

    role = "critic"

    def __init__(self, config: Config, model: CriticConfig, place: RankContext, *, optimizer_steps: int) -> None:
        assert isinstance(config.algorithm, PPOConfig)
        assert config.rollouts is not None
        super().__init__(
            config,
            model,
            config.cluster.roles.critic,
            place,
            lr=config.algorithm.critic_lr,
            optimizer_steps=optimizer_steps,
        )
        self.algorithm = algorithm_of(config.algorithm, PPO)
        self.max_new_tokens = config.rollouts.max_response_tokens
        self.samples_per_prompt = config.rollouts.samples_per_prompt

    def load_module(self) -> Any:
        """Load a language model's body with a scalar head."""
        return load_critic(self.model_config.model, **self.loading_options())

    def values(self, plan: BatchPlan, *parts: Rollouts) -> tuple[TokenValues, int]:
        """Receive this rank's share of a batch and value its tokens. Return the column and its size. Collective."""
        ids = plan.sequences_of(self.data_rank)
        self.plan = plan
        self.rollouts = Rollouts.gather(parts, ids)
        lengths = self.rollouts.lengths.tolist()
        row_of = {sequence_id: row for row, sequence_id in enumerate(ids)}
        prompts = shared_prompts(self.rollouts, samples_per_prompt=self.samples_per_prompt)
        self.microbatches = []
        for minibatch in plan.minibatches:
            rows = [row_of[i] for i in minibatch.sequences_by_rank[self.data_rank]]
            budget = self.config.train.max_tokens_per_microbatch
            microbatches = split_microbatches(lengths, rows, max_tokens=budget, prompts=prompts, layout=self.layout)
            self.microbatches.append(padded(microbatches, self.engine.max_over_ranks(len(microbatches))))
        self.old_values = torch.zeros(len(self.rollouts.token_ids))
        for microbatches in self.microbatches:
            for microbatch in microbatches:
                with (
                    torch.no_grad(),
                    explains_out_of_memory(
                        role="critic", stage="values", rank=self.place.rank, tokens=len(microbatch.tokens)
                    ),
                ):
                    values = self.engine.forward(
                        token_values,
                        self.rollouts.token_ids[microbatch.tokens].to(self.device),
                        microbatch.lengths.to(self.device),
                        microbatch.branches,
                    )
                self.old_values[microbatch.tokens] = values.cpu()
        column = TokenValues(
            sequence_ids=self.rollouts.sequence_ids, lengths=self.rollouts.lengths, values=self.old_values
        )
        return column, len(self.old_values)

    def prepare(self, *returns: TokenValues) -> None:
        """Receive the regression targets of this rank's share."""
        self.returns: Float[Tensor, " N"] = TokenValues.gather(returns, self.rollouts.sequence_ids.tolist()).values

    def update(self, minibatch: int) -> Metrics:
        """Run one optimizer step on a minibatch of the batch. Collective."""
        plan = self.plan.minibatches[minibatch]
        counts = StepCounts(
            num_tokens=plan.num_tokens, num_sequences=plan.num_sequences, max_new_tokens=self.max_new_tokens
        )
        parts: list[Metrics] = []
        microbatches = self.microbatches[minibatch]
        for index, microbatch in enumerate(microbatches):
            lengths = microbatch.lengths.to(self.device)
            mask = self.rollouts.response_mask[microbatch.tokens].to(self.device)
            with explains_out_of_memory(
                role="critic", stage="update", rank=self.place.rank, tokens=len(microbatch.tokens)
            ):
                values = self.engine.forward(
                    token_values,
                    self.rollouts.token_ids[microbatch.tokens].to(self.device),
                    lengths,
                    microbatch.branches,
                )
                batch = ValueMicrobatch(
                    lengths=lengths,
                    response_mask=mask,
                    values=values,
                    old_values=self.old_values[microbatch.tokens].to(self.device),
                    returns=self.returns[microbatch.tokens].to(self.device),
                )
                terms = self.algorithm.critic_loss(batch, counts)
                self.engine.backward(terms.loss, last=index == len(microbatches) - 1)
            if microbatch.rows:
                clips = self.algorithm.config.value_clip is not None
                parts.append(critic_metrics(terms, sampled=int(mask.sum()), step_tokens=plan.num_tokens, clips=clips))
        report = self.engine.step()
        if self.place.rank == 0:
            parts.append(
                {"update/critic_grad_norm": Mean.of([report.grad_norm]), "update/critic_lr": Last(value=report.lr)}
            )
        return merge_metrics(parts)
