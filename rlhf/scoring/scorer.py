"""Score with the rewards of a configuration, or a single function, in this process and without a run or Ray.

`rlhf reward` and `rlhf serve-reward` have only text, so a reward model's tokens are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.config.derive import train_sets
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.data import DataSource
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.schema.model import RewardModelConfig, StepScores
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage
from rlhf.data.chat import turn_end
from rlhf.data.images import RowImages
from rlhf.data.templates import ChatTemplate, read_template
from rlhf.data.tokenization import Continuation, encode
from rlhf.engine.distributed import RankContext
from rlhf.errors import UserError, prefix_errors
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.reward_models import refuse_without_head
from rlhf.preflight.sources import REWARD_KEY, as_evaluation, load_rewards, local_model, row_images
from rlhf.rewards.processes.pool import GroupOutcome
from rlhf.rewards.scoring import RewardSet, RewardSpec
from rlhf.rollouts.records.texts import step_ends
from rlhf.types import GroupScores, Prompt, StepReward
from rlhf.workers.frozen.reward_model import RewardEnsemble


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A reward model, with the tokenizer of the scored policy."""

    config: RewardModelConfig
    tokenizer: str
    template: ChatTemplate  # changes to the tokenizer's chat template
    apply_chat_template: bool  # whether the template writes the prompts of rows without `messages`
    trust_remote_code: bool
    device: str
    max_tokens_per_microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Rewards and data sources for scoring, loaded and checked."""

    name: str  # name of the configuration file or the function
    specs: tuple[RewardSpec, ...]
    policy: RewardPolicy
    model: HeldModel | None  # None if no reward is a model
    train_sets: tuple[DataSource, ...]  # training data sets; a run's samples number their concatenated rows
    eval_sets: Mapping[str, DataSource]
    columns: Mapping[str, str]  # our column name -> the dataset's column name
    images: Callable[[Path], RowImages | None] | None = None  # opens a folder for the images of rows
    reward_key: str = REWARD_KEY


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Responses to the same prompt."""

    prompt: Prompt
    responses: tuple[str, ...]
    truncated: tuple[bool, ...]
    results: tuple[Any, ...] = ()  # of an agent's sessions; empty: there are none


def scoring_of_function(function: str) -> Scoring:
    """Return the scoring of a function, built in or `path/file.py:name`, without args."""
    policy = RewardPolicy()
    rewards = {function.rpartition(":")[2]: RewardConfig(function=function)}
    specs = load_rewards(rewards, beside=Path.cwd(), memory_gib=policy.memory_gib, key="FUNCTION")
    return Scoring(name=function, specs=specs, policy=policy, model=None, train_sets=(), eval_sets={}, columns={})


def scoring_of_config(loaded: LoadedConfig) -> Scoring:
    """Return the scoring of a configuration. In a pipeline, the last stage with rewards counts."""
    for stage in reversed(list(loaded.stages.values())):
        if isinstance(stage, MergeStage):
            continue
        section = stage.evaluate if isinstance(stage, EvaluationStage) else as_evaluation(stage)
        if section.rewards:
            return _scoring_of_stage(stage, section, loaded)
    raise UserError(f"{loaded.source}: has no rewards; add them, or give a configuration that has some")


def _scoring_of_stage(stage: Config | EvaluationStage, section: EvaluateConfig, loaded: LoadedConfig) -> Scoring:
    model, key = None, REWARD_KEY if isinstance(stage, Config) else f"evaluate.{REWARD_KEY}"
    if section.reward is not None:
        source = stage.policy.tokenizer_source if isinstance(stage, Config) else section.model
        template_key = f"{'data' if isinstance(stage, Config) else 'evaluate'}.chat_template"
        text = None if section.chat_template is None else read_template(section.chat_template, key=template_key)
        model = HeldModel(
            config=section.reward,
            tokenizer=local_model(source, loaded.folder, seed=stage.run.seed),
            template=ChatTemplate(text=text, kwargs=section.chat_template_kwargs),
            apply_chat_template=section.apply_chat_template,
            trust_remote_code=section.trust_remote_code,
            device=stage.cluster.device,
            max_tokens_per_microbatch=section.max_tokens_per_microbatch,
        )

    def images(folder: Path) -> RowImages | None:
        return row_images(local_model(section.model, loaded.folder, seed=stage.run.seed), folder, section)

    beside, policy = Path(loaded.source).resolve().parent, section.reward_policy
    return Scoring(
        name=loaded.source,
        specs=load_rewards(section.rewards, beside=beside, memory_gib=policy.memory_gib, key=key),
        policy=policy,
        model=model,
        train_sets=tuple(mixed.source for mixed in train_sets(stage).values()) if isinstance(stage, Config) else (),
        eval_sets=section.sets,
        columns=section.columns,
        images=images,
        reward_key=key,
    )


class Scorer:
    """Scores groups of responses. Call `ask` before `score`; the limits of RewardSet on threads hold."""

    def __init__(self, scoring: Scoring) -> None:
        self.model: RewardEnsemble | None = None
        held, policy = scoring.model, scoring.policy
        if held is not None:
            with prefix_errors("reward.model"):
                for member in held.config.models.values():
                    refuse_without_head(member.model, trust_remote_code=member.trust_remote_code)
            options: dict[str, Any] = {"trust_remote_code": held.trust_remote_code, "template": held.template}
            self.tokenizer = load_tokenizer(held.tokenizer, **options)
            self.apply_chat_template = held.apply_chat_template
            self.turn_end = turn_end(self.tokenizer)
            alone: dict[str, Any] = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}
            place = RankContext(**alone, device=held.device, threads=torch.get_num_threads(), deadline_s=0.0)
            self.model = RewardEnsemble(held.config, place, max_tokens_per_microbatch=held.max_tokens_per_microbatch)
        self.specs = scoring.specs
        self.rewards = RewardSet(
            scoring.specs, timeout_s=policy.timeout_s, processes=policy.processes, memory_gib=policy.memory_gib
        )

    def __enter__(self) -> Scorer:
        try:
            self.rewards.greet()
        except BaseException:
            self.rewards.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.rewards.close()

    def ask(self, group: Group) -> dict[str, GroupOutcome]:
        """Return the outcomes of the services."""
        return self.rewards.ask(group.prompt, group.responses, truncated=group.truncated, results=group.results)

    def score(self, group: Group, asked: Mapping[str, GroupOutcome]) -> GroupScores:
        """Return the weighted scores of a group."""
        prompt, responses, truncated = group.prompt, group.responses, group.truncated
        models = [spec for spec in self.specs if spec.is_model and spec.applies_to(prompt.columns)]
        model_scores: dict[str, list[float]] = {}
        model_steps: dict[str, list[tuple[StepReward, ...]]] = {}
        disagreement: dict[str, list[float]] = {}
        if models:
            assert self.model is not None
            flat, lengths, ends = self._tokens(prompt, responses, truncated, self.model.steps)
            for spec in models:
                if spec.by_step:
                    assert ends is not None, "reward.steps is checked"
                    model_steps[spec.name], deviations = self.model.step_rewards(flat, lengths, ends)
                else:
                    model_scores[spec.name], deviations = self.model.scores(flat, lengths, ends)
                if deviations:
                    disagreement[spec.name] = deviations
        of_model: dict[str, Any] = {"model_scores": model_scores, "model_steps": model_steps}
        of_model["disagreement"] = disagreement
        return self.rewards.score(
            prompt, responses, truncated=truncated, asked=asked, results=group.results, **of_model
        )

    def _tokens(
        self, prompt: Prompt, responses: Sequence[str], truncated: Sequence[bool], steps: StepScores | None
    ) -> tuple[Int[Tensor, " N"], Int[Tensor, " B"], Bool[Tensor, " N"] | None]:
        """Return the tokens of prompts and responses for the reward model, and the ends of scored steps.

        A complete response ends as in a run: in a conversation with the template's end of a turn.
        """
        (prompt_ids,) = encode([prompt.text], self.tokenizer)
        encoded = Continuation(self.tokenizer).encode([(prompt.text, response) for response in responses])
        is_chat = self.apply_chat_template or "messages" in prompt.columns
        eos = self.tokenizer.eos_token_id
        last = self.turn_end if is_chat and self.turn_end is not None else eos
        end = [] if last is None else [last]
        both = zip(encoded, truncated, strict=True)
        sequences = [[*prompt_ids, *ids, *([] if is_truncated else end)] for ids, is_truncated in both]
        flat = torch.tensor([token for sequence in sequences for token in sequence])
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        if steps is None:
            return flat, lengths, None
        mask = torch.cat([torch.arange(len(sequence)) >= len(prompt_ids) for sequence in sequences])
        return flat, lengths, step_ends(flat, lengths, mask, self.tokenizer, separator=steps.separator)
