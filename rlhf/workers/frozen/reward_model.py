"""The reward model of a process that scores responses. It maps tokens to numbers and knows no reward functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.config.schema.model import RewardModelConfig
from rlhf.engine.memory import explains_out_of_memory
from rlhf.models.heads import sequence_scores, token_scores
from rlhf.models.reward_models import load_reward_model
from rlhf.models.row_check import check_rows
from rlhf.models.row_layout import row_layout
from rlhf.objectives.reward_model_loss import combined_steps
from rlhf.types import StepReward
from rlhf.workers.microbatches import Microbatch, split_microbatches
from rlhf.workers.model_worker import torch_dtype


class RewardModel:
    """A frozen sequence-classification model with one label. It is thread-safe and runs one pass at a time."""

    def __init__(
        self, config: RewardModelConfig, device: torch.device, *, max_tokens_per_microbatch: int, rank: int = 0
    ) -> None:
        self.steps = config.steps
        self.device = device
        self.rank = rank
        self.max_tokens = max_tokens_per_microbatch
        self.lock = threading.Lock()
        with explains_out_of_memory(role="reward", stage="start", rank=rank):
            model = load_reward_model(
                config.model, dtype=torch_dtype(config.dtype), trust_remote_code=config.trust_remote_code
            )
            self.model = model.to(device).eval().requires_grad_(False)
            check_rows(self.model, device)

    def scores(
        self, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], step_ends: Bool[Tensor, " N"] | None
    ) -> list[float]:
        """Return one score per sequence.

        Without `step_ends` it is the head's value at the last token. With `step_ends` the values at the marked
        tokens are combined as `config.steps` says.
        """
        scores = [0.0] * len(lengths)
        function = sequence_scores if step_ends is None else token_scores
        for microbatch, outputs in self._passes(function, token_ids, lengths):
            values = outputs
            if step_ends is not None:
                assert self.steps is not None
                values = combined_steps(
                    outputs, step_ends[microbatch.tokens], microbatch.lengths, by=self.steps.combine
                )
            for row, value in zip(microbatch.rows, values.tolist(), strict=True):
                scores[row] = value
        return scores

    def step_rewards(
        self, token_ids: Int[Tensor, " N"], lengths: Int[Tensor, " B"], step_ends: Bool[Tensor, " N"]
    ) -> list[tuple[StepReward, ...]]:
        """Return the probability that each step is right, for each sequence.

        `step_ends` marks the last token of each step.
        """
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
        """Yield the micro-batches of the sequences, each with the output of `function` (from rlhf.models.heads)."""
        sizes = lengths.tolist()
        with self.lock, torch.no_grad():
            layout = row_layout(self.model)
            for microbatch in split_microbatches(sizes, range(len(sizes)), max_tokens=self.max_tokens, layout=layout):
                with explains_out_of_memory(
                    role="reward", stage="score", rank=self.rank, tokens=len(microbatch.tokens)
                ):
                    tokens = token_ids[microbatch.tokens].to(self.device)
                    outputs = function(self.model, tokens, microbatch.lengths.to(self.device)).cpu()
                yield microbatch, outputs
