"""A worker of the reward role: turns responses into scores, and into text for the samples file.

Functions run in processes of their own (rlhf.rewards); the reward model, if the run has one, is held here. The only
role besides the engines that knows the tokenizer's text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf.config.model import RewardModelConfig
from rlhf.engine.memory import explains_out_of_memory, peak_memory
from rlhf.evaluation.voting import AnswerForm, answer_of
from rlhf.models.heads import sequence_scores
from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.rewards.scoring import RewardSet, RewardSpec
from rlhf.roles import MemoryReport
from rlhf.rollouts.texts import response_texts, turns_of
from rlhf.rollouts.turns import PLACEHOLDER
from rlhf.tracking.samples import SampleRecord, write_samples
from rlhf.types import GroupScores, Prompt, Rollouts
from rlhf.workers.place import RankPlace, torch_dtype
from rlhf.workers.ragged import slices


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """What a reward worker is made of."""

    specs: tuple[RewardSpec, ...]
    tokenizer: str  # folder or name of the policy's
    trust_remote_code: bool
    model: RewardModelConfig | None  # None: no reward uses a model
    timeout_s: float
    processes: int
    memory_gib: float
    max_tokens_per_microbatch: int


class RewardWorker:
    """Scores groups, several at once; groups are dealt out among the workers."""

    def __init__(self, settings: RewardSettings, place: RankPlace) -> None:
        self.settings = settings
        self.place = place
        self.device = place.torch_device()
        self.model_lock = threading.Lock()
        torch.set_num_threads(place.threads)

    def start(self) -> None:
        """Start the reward processes and load the model, if any."""
        settings = self.settings
        self.tokenizer = load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
        self.rewards = RewardSet(
            settings.specs,
            timeout_s=settings.timeout_s,
            processes=settings.processes,
            memory_gib=settings.memory_gib,
        )
        if settings.model is not None:
            with explains_out_of_memory(role="reward", stage="start", rank=self.place.rank):
                model = load_reward_model(
                    settings.model.model,
                    dtype=torch_dtype(settings.model.dtype),
                    trust_remote_code=settings.model.trust_remote_code,
                )
                self.model = model.to(self.device).eval().requires_grad_(False)

    def score(
        self,
        prompt: Prompt,
        rollouts: Rollouts,
        truncated: Sequence[bool],
        environment_rewards: Sequence[float | None] = (),
    ) -> GroupScores:
        """Scores of one group's responses, of which some may have been cut. environment_rewards: where there is an
        environment, the rewards that it gave."""
        models = [spec.name for spec in self.settings.specs if spec.function is None and not spec.from_environment]
        by_model: dict[str, Sequence[float]] = {
            spec.name: [reward for reward in environment_rewards if reward is not None]
            for spec in self.settings.specs
            if spec.from_environment
        }
        if models:
            numbers = self._model_scores(rollouts)
            by_model |= {name: numbers for name in models}
        if PLACEHOLDER in prompt.text:
            prompt = replace(prompt, text=turns_of(rollouts, self.tokenizer)[0][0].text)
        return self.rewards.score(prompt, self.texts(rollouts), truncated=truncated, model_scores=by_model)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """Each response as text, without the special tokens that end it."""
        return response_texts(rollouts, self.tokenizer)

    def answers(self, rollouts: Rollouts, form: AnswerForm) -> tuple[str | None, ...]:
        """What each response answers, by which responses vote; None: nothing."""
        return tuple(answer_of(text, form) for text in self.texts(rollouts))

    def _model_scores(self, rollouts: Rollouts) -> list[float]:
        """The reward model's score of each prompt with its response, as the policy's tokens."""
        lengths = rollouts.lengths.tolist()
        scores = [0.0] * len(lengths)
        with self.model_lock, torch.no_grad():
            for piece in slices(lengths, range(len(lengths)), max_tokens=self.settings.max_tokens_per_microbatch):
                with explains_out_of_memory(
                    role="reward", stage="score", rank=self.place.rank, tokens=len(piece.tokens)
                ):
                    found = sequence_scores(
                        self.model, rollouts.token_ids[piece.tokens].to(self.device), piece.lengths.to(self.device)
                    )
                for row, value in zip(piece.rows, found.tolist(), strict=True):
                    scores[row] = value
        return scores

    def write_samples(self, path: Path, records: Sequence[tuple[SampleRecord, ...]], *rollouts: Rollouts) -> None:
        """Give each group's records their responses, of conversations also the turns, and write the step's file."""
        whole = []
        for group, columns in zip(records, rollouts, strict=True):
            texts, turns = self.texts(columns), turns_of(columns, self.tokenizer)
            for record in group:
                record = replace(record, response=texts[record.sample])
                if record.turns is not None:
                    said = turns[record.sample]
                    record = replace(record, prompt=said[0].text, turns=said)
                whole.append(record)
        write_samples(path, whole)

    def memory(self) -> MemoryReport:
        """Peaks of this process; the reward processes are not in it."""
        peak = peak_memory()
        return MemoryReport(rss_gib=peak.rss_gib, gpu_gib=peak.gpu_gib)

    def stop(self) -> None:
        """End the reward processes."""
        self.rewards.close()
