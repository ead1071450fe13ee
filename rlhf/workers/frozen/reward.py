"""A worker of the reward role, for scoring responses and decoding responses for the samples file.

Reward functions run in separate processes, and services are called over the network (rlhf.rewards). The reward model,
if the run has one, is held here. Only this role and the engines decode tokens to text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf.config.schema.model import RewardModelConfig
from rlhf.data.chat import turn_end
from rlhf.data.privileged import token_ids_of
from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.data.tokenization import encode, encode_raw
from rlhf.engine.distributed import RankContext
from rlhf.evaluation.voting import AnswerForm, answer_of
from rlhf.models.files.loading import load_tokenizer
from rlhf.rewards.processes.pool import GroupOutcome
from rlhf.rewards.scoring import RewardSet, RewardSpec, asks_in_flight
from rlhf.rollouts.environments.turns import PLACEHOLDER
from rlhf.rollouts.records.texts import Transcript, character_ends, response_texts, step_ends, transcripts, turns_of
from rlhf.tracking.logs import redact
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.tracking.run_folder.samples import SampleRecord, SampleTokens, write_samples
from rlhf.types import (
    GroupScores,
    PrivilegedContext,
    PrivilegedPrompts,
    Prompt,
    Rollouts,
    StepReward,
    TokenSignals,
)
from rlhf.vision.keys import decoded
from rlhf.vision.store import keep_passing
from rlhf.workers.model_worker import ModelWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """Settings of a reward worker, with the specifications of all rewards."""

    specs: tuple[RewardSpec, ...]
    tokenizer: str  # folder or name of the policy's tokenizer
    trust_remote_code: bool
    model: RewardModelConfig | None  # None: no reward uses a model
    timeout_s: float
    processes: int
    memory_gib: float
    max_tokens_per_microbatch: int
    judgements: Path | None = None  # folder for the answers of judges; None: the worker remembers them
    template: ChatTemplate = UNCHANGED  # changes to the tokenizer's chat template
    tokenizer_class: type[Any] | None = None  # as found by the driver; None: AutoTokenizer looks for the class

    @property
    def concurrency(self) -> int:
        """Return the number of concurrent calls of a worker: groups in scoring, at services, and a short one."""
        return self.processes + asks_in_flight(self.specs) + 1


class RewardWorker(ModelWorker):
    """Scores several groups concurrently. Groups are distributed over the workers."""

    role = "reward"

    def __init__(self, settings: RewardSettings, place: RankContext) -> None:
        super().__init__(place)
        self.settings = settings

    def start(self, *, greets: bool = True) -> None:
        """Start the reward processes and load the model, if any. `greets`: fail if a service cannot be reached."""
        settings = self.settings
        self.tokenizer = load_tokenizer(
            settings.tokenizer,
            trust_remote_code=settings.trust_remote_code,
            template=settings.template,
            kind=settings.tokenizer_class,
        )
        self.turn_end = turn_end(self.tokenizer)
        self.rewards = RewardSet(
            settings.specs,
            timeout_s=settings.timeout_s,
            processes=settings.processes,
            memory_gib=settings.memory_gib,
            judgements=settings.judgements,
            worker=self.place.rank,
        )
        if greets:
            self.rewards.greet()
        if settings.model is not None:
            from rlhf.workers.frozen.reward_model import RewardEnsemble  # with the models' code, which takes a second

            self.model = RewardEnsemble(
                settings.model, self.place, max_tokens_per_microbatch=settings.max_tokens_per_microbatch
            )

    def ask(
        self, prompt: Prompt, rollouts: Rollouts, truncated: Sequence[bool], results: Sequence[str] = ()
    ) -> dict[str, GroupOutcome]:
        """Request the services' scores of one group's responses, for `score`. `results`: of an agent, as JSON."""
        read, texts, ends = self._as_read(prompt, rollouts), self.texts(rollouts), list(map(json.loads, results))
        return self.rewards.ask(read, texts, truncated=truncated, results=ends)

    def score(
        self,
        prompt: Prompt,
        rollouts: Rollouts,
        truncated: Sequence[bool],
        asked: dict[str, GroupOutcome],
        environment_rewards: Sequence[tuple[StepReward, ...] | None] = (),
        results: Sequence[str] = (),
    ) -> GroupScores:
        """Score one group's responses, including truncated ones.

        `asked` is the result of `ask`. `environment_rewards` holds the rewards of an environment, turn by turn.
        `results` holds the results of an agent's sessions as JSON.
        """
        specs = [spec for spec in self.settings.specs if spec.applies_to(prompt.columns)]
        given = [rewards for rewards in environment_rewards if rewards is not None]
        environments = [spec.name for spec in specs if spec.from_environment]
        scores = {name: [sum((step.value for step in steps), 0.0) for steps in given] for name in environments}
        steps = dict.fromkeys(environments, given)
        disagreement: dict[str, list[float]] = {}
        columns = (rollouts.token_ids, rollouts.lengths)
        if models := [spec.name for spec in specs if spec.is_model and not spec.by_step]:
            ends = None if self.model.steps is None else self._step_ends(rollouts)
            values, deviations = self.model.scores(*columns, ends)
            scores |= dict.fromkeys(models, values)
            disagreement |= dict.fromkeys(models if deviations else [], deviations)
        if models := [spec.name for spec in specs if spec.is_model and spec.by_step]:
            step_values, deviations = self.model.step_rewards(*columns, self._step_ends(rollouts))
            steps |= dict.fromkeys(models, step_values)
            disagreement |= dict.fromkeys(models if deviations else [], deviations)
        by_step = any(spec.by_step for spec in specs)
        return self.rewards.score(
            self._as_read(prompt, rollouts),
            self.texts(rollouts),
            truncated=truncated,
            model_scores=scores,
            asked=asked,
            model_steps=steps,
            disagreement=disagreement,
            places=character_ends(rollouts, self.tokenizer, turn_end=self.turn_end) if by_step else None,
            results=list(map(json.loads, results)),
        )

    def _step_ends(self, rollouts: Rollouts) -> Bool[Tensor, " N"]:
        assert self.model.steps is not None
        columns = (rollouts.token_ids, rollouts.lengths, rollouts.response_mask)
        return step_ends(*columns, self.tokenizer, separator=self.model.steps.separator)

    def _as_read(self, prompt: Prompt, rollouts: Rollouts) -> Prompt:
        """Return the prompt with the first turn written by the environment, for a prompt with a placeholder."""
        if PLACEHOLDER not in prompt.text:
            return prompt
        return replace(prompt, text=turns_of(rollouts, self.tokenizer)[0][0].text, question="")

    def texts(self, rollouts: Rollouts) -> list[str]:
        """Decode each response without closing special tokens."""
        return response_texts(rollouts, self.tokenizer, turn_end=self.turn_end)

    def transcripts(self, rollouts: Rollouts) -> list[Transcript]:
        """Decode each response turn by turn and token by token."""
        return transcripts(rollouts, range(len(rollouts.lengths)), self.tokenizer, turn_end=self.turn_end)

    def answers(self, rollouts: Rollouts, form: AnswerForm) -> tuple[str | None, ...]:
        """Return the answer extracted from each response, for voting. None: the response has no answer."""
        return tuple(answer_of(text, form) for text in self.texts(rollouts))

    def privileged_prompts(
        self, prompt: Prompt, rollouts: Rollouts, contexts: Mapping[int, PrivilegedContext]
    ) -> tuple[PrivilegedPrompts, int]:
        """Return the teacher's prompts of the responses in `contexts`, by sequence id, and their number of tokens."""
        assert prompt.privileged is not None
        encoder = partial(encode if prompt.is_chat else encode_raw, tokenizer=self.tokenizer)
        texts = dict(zip(rollouts.sample_ids, self.texts(rollouts), strict=True))
        rows = [
            token_ids_of(
                prompt.privileged,
                lambda text: encoder([text])[0],
                better=None if context.better is None else texts[context.better],
                feedback=context.feedback,
            )
            for context in contexts.values()
        ]
        token_ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        prompts = PrivilegedPrompts(
            sequence_ids=torch.tensor(list(contexts), dtype=torch.int64),
            lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64),
            token_ids=token_ids,
        )
        return prompts, len(token_ids)

    def write_samples(
        self,
        path: Path,
        records: Sequence[tuple[SampleRecord, ...]],
        *parts: Rollouts | TokenSignals | PrivilegedPrompts,
    ) -> None:
        """Complete the records of each group with responses, tokens and conversation turns, and write the step's file.

        `parts` holds a rollout batch for each group of records, followed by the training signals of the tokens and by
        the prompts of a policy that teaches itself.
        """
        whole = []
        privileged = [part for part in parts if isinstance(part, PrivilegedPrompts)]
        signals = [part for part in parts if isinstance(part, TokenSignals)]
        for group, columns in zip(records, (part for part in parts if isinstance(part, Rollouts)), strict=True):
            places = [record.sample for record in group]
            decoded = transcripts(columns, places, self.tokenizer, turn_end=self.turn_end, signals=signals)
            for record, transcript in zip(group, decoded, strict=True):
                record = _with_token_means(record, transcript.tokens)
                record = replace(
                    record, response=transcript.response, tokens=transcript.tokens, images=transcript.images
                )
                prompt = self._privileged_text(privileged, columns.sample_ids[record.sample])
                record = replace(record, privileged_prompt=prompt)
                if record.turns is not None or record.images:  # the text of the prompt does not name the images
                    record = replace(record, prompt=transcript.turns[0].text)
                if record.turns is not None:
                    record = replace(record, turns=transcript.turns)
                whole.append(record)
        write_samples(path, whole)
        folder = images_folder(path.parent.resolve().parent)
        keep_passing(folder, {name for record in whole for name in record.images})

    def _privileged_text(self, prompts: Sequence[PrivilegedPrompts], sequence_id: int) -> str | None:
        """Return the teacher's prompt of a response. Secrets are masked, as in the columns that the prompt repeats.
        None: the response has no teacher."""
        of_response = next((part for part in prompts if sequence_id in part.sample_ids), None)
        if of_response is None:
            return None
        return redact(decoded(of_response.of_samples([sequence_id]).token_ids.tolist(), self.tokenizer))

    def stop(self) -> None:
        self.rewards.close()


def _with_token_means(record: SampleRecord, tokens: SampleTokens) -> SampleRecord:
    """Return the record with the mean log-probabilities that were measured after the controller made the record."""

    def mean(known: float | None, column: Sequence[float | None] | None) -> float | None:
        values = [value for value in column or () if value is not None]
        return sum(values) / len(values) if known is None and values else known

    return replace(
        record,
        mean_old_logprob=mean(record.mean_old_logprob, tokens.old_logprobs),
        mean_ref_logprob=mean(record.mean_ref_logprob, tokens.ref_logprobs),
    )
