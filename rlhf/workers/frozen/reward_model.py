"""The reward model of a scoring process. The model maps tokens to numbers and knows no reward functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.config.schema.model import RewardModelConfig
from rlhf.engine.distributed import RankContext
from rlhf.models.packed.heads import sequence_scores, token_scores
from rlhf.models.reward_models import load_reward_model
from rlhf.objectives.reward_model_loss import combined_steps, ensemble_scores
from rlhf.types import StepReward
from rlhf.workers.frozen.frozen_worker import FrozenWorker
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.model_worker import torch_dtype


class RewardModel(FrozenWorker):
    """A frozen sequence-classification model with one label. The class is thread-safe and runs one pass at a time."""

    role = "reward"

    def __init__(self, config: RewardModelConfig, place: RankContext, *, max_tokens_per_microbatch: int) -> None:
        super().__init__(config, place, max_tokens_per_microbatch=max_tokens_per_microbatch)
        self.steps = config.steps
        self.lock = threading.Lock()
        self.become(config.model)

    def load_module(self, model: str) -> Any:
        config = self.model_config
        return load_reward_model(model, dtype=torch_dtype(config.dtype), trust_remote_code=config.trust_remote_code)

    def scores(
        self, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], step_ends: Bool[Tensor, " N"] | None
    ) -> list[float]:
        """Return one score per sequence.

        Without `step_ends` the score is the head's value at the last token. With `step_ends` the values at the marked
        tokens are combined as in `config.steps`.
        """
        scores = [0.0] * len(lengths)
        function = sequence_scores if step_ends is None else token_scores
        for microbatch, values in self._passes(function, token_ids, lengths):
            if step_ends is not None:
                assert self.steps is not None
                ends = step_ends[microbatch.tokens]
                values = combined_steps(values, ends, microbatch.lengths, by=self.steps.combine)
            for row, value in zip(microbatch.rows, values.tolist(), strict=True):
                scores[row] = value
        return scores

    def step_rewards(
        self, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], step_ends: Bool[Tensor, " N"]
    ) -> list[tuple[StepReward, ...]]:
        """Return each sequence's probabilities of the steps being right. `step_ends` marks a step's last token."""
        rewards: list[tuple[StepReward, ...]] = [()] * len(lengths)
        for microbatch, outputs in self._passes(token_scores, token_ids, lengths):
            sizes = microbatch.lengths.tolist()
            columns = outputs.sigmoid().split(sizes), step_ends[microbatch.tokens].split(sizes)
            for row, values, ends in zip(microbatch.rows, *columns, strict=True):
                ends_and_values = zip(ends.nonzero().flatten().tolist(), values[ends].tolist(), strict=True)
                rewards[row] = tuple(StepReward(end=end, value=value) for end, value in ends_and_values)
        return rewards

    def _passes(
        self, function: Callable[..., Tensor], token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"]
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """Yield the micro-batches of the sequences, each with the output of `function` (of models.packed.heads)."""

        def forward(microbatch: Microbatch) -> Tensor:
            tokens = self.part(token_ids, microbatch)
            outputs: Tensor = function(self.model, tokens, microbatch.lengths.to(self.device)).cpu()
            return outputs

        with self.lock:
            yield from self.passes("score", self.split(lengths), forward)


class RewardEnsemble:
    """The reward models of a worker. All models score every response, one model after another."""

    def __init__(self, config: RewardModelConfig, place: RankContext, *, max_tokens_per_microbatch: int) -> None:
        self.steps, self.coef = config.steps, config.disagreement_coef
        limit = max_tokens_per_microbatch
        self.models = [RewardModel(model, place, max_tokens_per_microbatch=limit) for model in config.models.values()]

    def scores(
        self, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], step_ends: Bool[Tensor, " N"] | None
    ) -> tuple[list[float], list[float]]:
        """Return a score per sequence as RewardModel.scores, and the models' deviation: empty for a single model."""
        by_model = [model.scores(token_ids, lengths, step_ends) for model in self.models]
        return (by_model[0], []) if len(by_model) == 1 else self._combined(by_model)

    def step_rewards(
        self, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], step_ends: Bool[Tensor, " N"]
    ) -> tuple[list[tuple[StepReward, ...]], list[float]]:
        """Return the steps of each sequence as RewardModel.step_rewards, and the mean deviation over its steps."""
        by_model = [model.step_rewards(token_ids, lengths, step_ends) for model in self.models]
        if len(by_model) == 1:
            return by_model[0], []
        rewards, deviations = [], []
        for responses in zip(*by_model, strict=True):  # the steps end at the same tokens for all models
            values, stds = self._combined([[step.value for step in steps] for steps in responses])
            rewards.append(
                tuple(StepReward(end=step.end, value=value) for step, value in zip(responses[0], values, strict=True))
            )
            deviations.append(sum(stds) / len(stds) if stds else 0.0)
        return rewards, deviations

    def _combined(self, by_model: list[list[float]]) -> tuple[list[float], list[float]]:
        scores, stds = ensemble_scores(torch.tensor(by_model, dtype=torch.float64), coef=self.coef)
        return scores.tolist(), stds.tolist()
