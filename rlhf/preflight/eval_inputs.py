"""Load and check all inputs of an evaluation before any actor starts.

A run's configuration and the options of `rlhf eval` become an EvaluateConfig, as in a pipeline's stage.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf.agents.runners import KEY as AGENT_KEY
from rlhf.agents.sessions import AgentSpec
from rlhf.config.derive import eval_sets
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataSource, TaskConfig
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.schema.model import RewardModelConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, final_folder, run_folder
from rlhf.data.examples import Example, Reading, load_examples
from rlhf.data.sources import Row, read_rows
from rlhf.data.tasks import REASONING_GYM, RUNNING_TOTALS
from rlhf.data.templates import UNCHANGED, ChatTemplate, read_template
from rlhf.errors import UserError, prefix_errors
from rlhf.evaluation.decoding import Decoding
from rlhf.evaluation.results import Marking, Marks, marking_of
from rlhf.evaluation.sources import source_names
from rlhf.models.files.folder_check import refuse_broken_weights
from rlhf.models.files.hub import use_cache_if_silent
from rlhf.models.files.loading import load_tokenizer, refuse_missing_weights
from rlhf.models.files.template_check import refuse_runaway_template
from rlhf.models.on_disk import ModelOnDisk, refuse_unservable
from rlhf.models.reward_models import refuse_without_head
from rlhf.preflight.agents import LoadedAgent, preload_agent
from rlhf.preflight.environments import KEY as ENVIRONMENT_KEY
from rlhf.preflight.environments import LoadedEnvironment, check_lengths, preload_environment
from rlhf.preflight.models import ANY_LENGTH, StageResults, refuse_too_long, resolve_model
from rlhf.preflight.prompts import read_prompts
from rlhf.preflight.sources import (
    REWARD_KEY,
    as_evaluation,
    in_options,
    load_rewards,
    local_model,
    reading_of,
    refuse_absent_tokens,
    source_of,
)
from rlhf.rewards.scoring import RewardSpec
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.types import Prompt

logger = logging.getLogger(__name__)
TASK_ROWS = 200  # rows of `--data TASK` without a size


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model with the sets in the model's tokens: prompts for rewards, or examples to measure."""

    model: ModelOnDisk
    prompts: Mapping[str, tuple[Prompt, ...]]
    examples: Mapping[str, tuple[Example, ...]]
    sources: Mapping[str, Mapping[int, str]]  # by set, for sets split by source: prompt id to source
    environment: EnvironmentSpec | AgentSpec | None  # None: single turns

    @property
    def longest_prompt(self) -> int:
        """Return the length of the longest prompt in tokens; 0 without prompts."""
        return max((len(prompt.token_ids) for prompts in self.prompts.values() for prompt in prompts), default=0)

    def longest_sequence(self, max_new_tokens: int) -> int:
        """Return the most tokens of a prompt with a response, or of a conversation."""
        return self.longest_prompt + max_new_tokens if self.environment is None else self.environment.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalInputs:
    """The checked inputs of an evaluation."""

    candidates: tuple[Candidate, ...]  # the model, then the compared model if there is one
    decoding: Decoding
    marking: Marking
    rewards: tuple[RewardSpec, ...]
    reward_model: RewardModelConfig | None
    reward_policy: RewardPolicy
    max_tokens_per_microbatch: int
    cluster: ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """Names of the settings in messages."""

    model: str = "evaluate.model"
    against: str = "evaluate.against"
    sets: str = "evaluate.data.{}"
    rewards: str = f"evaluate.{REWARD_KEY}"
    reward_model: str = "evaluate.reward.model"
    by: str = "evaluate.by"
    template: str = "evaluate"
    environment: str = "evaluate.environment"
    agent: str = "evaluate.agent"


IN_RUN = _Names(
    model="policy.model",
    against="--against",
    sets="data.eval.{}",
    rewards=REWARD_KEY,
    reward_model="reward.model",
    by="eval.by",
    template="data",
    environment=ENVIRONMENT_KEY,
    agent=AGENT_KEY,
)
IN_OPTIONS = replace(
    IN_RUN, model="MODEL", sets="--data {}", rewards="--reward {}", reward_model="--reward-model", by="--by"
)


def inputs_of_run(loaded: LoadedConfig, *, model: str | None, against: str | None, marks: Marks) -> EvalInputs:
    """Return the inputs for evaluating a run's model, or `model`, on the held-out sets of the run.

    For a pipeline, the last training or evaluation stage counts.
    """
    stages = [stage for stage in loaded.stages.values() if not isinstance(stage, MergeStage)]
    if not stages:
        raise UserError(f"{loaded.source} has only merges: evaluate their models on --data")
    stage = stages[-1]
    if isinstance(stage, Config):
        _refuse_other_measures(stage, model or str(final_folder(stage)))
        if not eval_sets(stage):
            raise UserError(f"data.eval: {loaded.source} names no held-out set; give one or evaluate a model on --data")
    given: dict[str, Any] = {"model": model, "against": against, "k": marks.ks}
    given |= {"pass_score": marks.pass_score, "answer": marks.answers, "by": marks.by}
    changes = {key: value for key, value in given.items() if value is not None}
    section = stage.evaluate if isinstance(stage, EvaluationStage) else as_evaluation(stage)
    _refuse_without_rewards(section.rewards, against, marks)
    section = section.model_copy(update=changes)
    if isinstance(stage, EvaluationStage):
        return inputs_of_stage(stage.model_copy(update={"evaluate": section}), loaded)
    makers = [other for other in loaded.stages.values() if not isinstance(other, EvaluationStage)]
    if model is None and stage.policy.model in map(str, map(final_folder, makers)):
        logger.warning(
            "policy.model is %s, the result of an earlier stage, and this model is measured; --model %s measures the "
            "model that stage %s trains",
            stage.policy.model,
            run_folder(stage),
            stage.run.name,
        )
    return _load(
        section,
        IN_RUN if model is None else replace(IN_RUN, model="--model"),
        reading=reading_of(stage),
        seed=stage.run.seed,
        cluster=stage.cluster,
        beside=Path(loaded.source).resolve().parent,
        models=loaded.folder,
        tokenizer=stage.policy.tokenizer,
    )


def _refuse_other_measures(config: Config, model: str) -> None:
    """Raise UserError if the run measures its held-out sets neither by responses nor by given completions."""
    if config.rewards or config.algorithm.kind == "supervised":
        return
    others: Mapping[str, str] = {
        "reward_model": f"let it score a model's responses: rlhf eval MODEL --data PROMPTS --reward-model {model}",
        "step_rewards": "read them there",
    }
    instead = f"name prompts or SFT examples: rlhf eval {model} --data SET, with --reward NAME to score responses"
    raise UserError(
        f"algorithm.name: is {config.algorithm.name}, whose held-out sets only the run itself measures (eval/ in its "
        f"metrics.jsonl); {others.get(config.algorithm.kind, instead)}"
    )


def inputs_of_stage(stage: EvaluationStage, loaded: LoadedConfig, *, made: StageResults | None = None) -> EvalInputs:
    """Return the inputs of an evaluation section.

    `made` holds the results of earlier stages. The models of earlier stages may not exist yet. A stage's initial model
    stands in for the trained model, with the same tokenizer and context length, and results are checked by
    configuration.
    """
    made = made or StageResults()
    _refuse_unfit_results(stage, made)
    return _load(
        stage.evaluate,
        _Names(),
        seed=stage.run.seed,
        cluster=stage.cluster,
        beside=Path(loaded.source).resolve().parent,
        models=loaded.folder,
        made=made,
    )


def _refuse_unfit_results(stage: EvaluationStage, made: StageResults) -> None:
    """Raise UserError if an earlier stage's result will not be of the kind expected by the evaluation."""
    config = stage.evaluate
    for key, model in (("model", config.model), ("against", config.against)):
        if model is None:
            continue
        if model in made.scored:
            model_kind = made.scored[model].replace("_", " ")
            raise UserError(f"evaluate.{key}: {model} will be a {model_kind}, expected a language model")
        lora = made.adapters.get(model)
        if config.rewards and lora is not None and (lora.dora or lora.modules_to_save):
            kind = "dora" if lora.dora else "modules_to_save"
            text = f"will be an adapter with {kind}, which engines cannot serve; merge it into its base before"
            raise UserError(f"evaluate.{key}: {model} {text}")
    if stage.uses_reward_model and config.reward is not None and config.reward.model in made.finals:
        folder = config.reward.model
        if folder not in made.scored:
            raise UserError(f"evaluate.reward.model: {folder} will be a language model, expected a reward model")


def inputs_of_model(
    model: str,
    *,
    data: Sequence[str],
    rewards: Sequence[str],
    reward_model: str | None,
    against: str | None,
    decoding: Decoding,
    marks: Marks,
    device: Literal["cpu", "cuda"],
    trust_remote_code: bool,
) -> EvalInputs:
    """Return the inputs for evaluating a model on data named by the user.

    With rewards, the rows are prompts for scored responses; without rewards, the rows are examples.
    """
    if not data:
        raise UserError(
            "--data is missing: name a file, a dataset or a task to evaluate the model on. The held-out sets of a run "
            "are evaluated by its configuration: rlhf eval RUN/config.resolved.yaml --model RUN"
        )
    sets: dict[str, DataSource] = {}
    for text in data:
        name, source = _source(text)
        if name in sets:
            raise UserError(f"--data {text}: there is a set called {name} already; rename the file")
        sets[name] = source
    configs: dict[str, RewardConfig] = {}
    for text in rewards:
        name = text.rpartition(":")[2]
        if name in configs:
            raise UserError(f"--reward {text}: there is a reward called {name} already")
        configs[name] = RewardConfig(function=text)
    if reward_model is not None:
        configs["reward_model"] = RewardConfig(role="reward")
    _refuse_without_rewards(configs, against, marks)
    section = EvaluateConfig.model_construct(
        model=model,
        against=against,
        trust_remote_code=trust_remote_code,
        data=sets,
        columns=dict(decoding.columns),
        system_prompt=decoding.system_prompt,
        apply_chat_template=decoding.apply_chat_template,
        rewards=configs,
        reward=None if reward_model is None else RewardModelConfig(model=reward_model),
        k=marks.ks,
        pass_score=marks.pass_score,
        answer=marks.answers,
        by=marks.by,
    )
    with in_options():
        cluster = ClusterConfig(device=device)
        return _load(section, IN_OPTIONS, seed=decoding.seed, cluster=cluster, beside=Path.cwd(), decoding=decoding)


def _load(
    section: EvaluateConfig,
    names: _Names,
    *,
    seed: int,
    cluster: ClusterConfig,
    beside: Path,
    models: Path | None = None,
    reading: Reading | None = None,
    decoding: Decoding | None = None,
    tokenizer: str | None = None,
    made: StageResults | None = None,
) -> EvalInputs:
    """Load everything that an evaluation section names.

    Args:
        beside: the folder searched for code before the current folder.
        models: the folder for tiny:llama. None: this model is not available.
        reading: how rows become prompts or examples, in place of the section's settings.
        decoding: how responses are sampled, in place of the section's settings.
        tokenizer: the tokenizer of the models, in place of each model's tokenizer.
        made: results of earlier stages, by the names of models.
    """
    decoding = decoding or _decoding(section, seed, template_key=names.template)
    reading = reading or Reading(
        system_prompt=section.system_prompt,
        apply_chat_template=section.apply_chat_template,
        max_tokens=section.max_tokens_per_microbatch,
    )
    memory_gib = section.reward_policy.memory_gib
    rewards = load_rewards(section.rewards, beside=beside, memory_gib=memory_gib, key=names.rewards)
    candidates = []
    for key, wanted in ((names.model, section.model), (names.against, section.against)):
        if wanted is None:
            continue
        name = wanted if made is None else made.finals.get(wanted, wanted)
        with prefix_errors(key):
            local = name if models is None else local_model(name, models, seed=seed)
            model = resolve_model(local, trust_remote_code=section.trust_remote_code)
        model = replace(model, dtype=section.dtype or model.dtype, tokenizer=tokenizer or model.tokenizer)
        if made is not None:
            model = replace(model, name=wanted)
        template = UNCHANGED if made is None else made.templates.get(wanted, UNCHANGED)
        candidates.append(_candidate(section, names, model, decoding, reading, rewards, template, beside))
    reward_model = section.reward if any(spec.is_model for spec in rewards) else None
    if reward_model is not None and (made is None or reward_model.model not in made.finals):
        _refuse_unusable_reward_model(reward_model, key=names.reward_model)
    longest = max(candidate.longest_sequence(decoding.max_new_tokens) for candidate in candidates)
    marks = Marks(ks=section.k, pass_score=section.pass_score, answers=section.answer, by=section.by)
    try:
        marking = marking_of(marks, rewards, samples=decoding.samples)
    except ValueError as error:
        raise UserError(f"--k: {error}") from error
    return EvalInputs(
        candidates=tuple(candidates),
        decoding=decoding,
        marking=marking,
        rewards=rewards,
        reward_model=reward_model,
        reward_policy=section.reward_policy,
        max_tokens_per_microbatch=max(section.max_tokens_per_microbatch, longest),
        cluster=cluster,
    )


def _decoding(section: EvaluateConfig, seed: int, *, template_key: str) -> Decoding:
    """Return the section's settings for sampling. Without rewards, no response is sampled."""
    text = section.chat_template and read_template(section.chat_template, key=f"{template_key}.chat_template")
    return Decoding(
        samples=section.samples_per_prompt if section.rewards else 1,
        temperature=section.temperature,
        max_new_tokens=section.max_new_tokens if section.rewards else 1,
        stop=section.stop,
        stop_token_ids=section.stop_token_ids,
        seed=seed,
        system_prompt=section.system_prompt,
        apply_chat_template=section.apply_chat_template,
        template=ChatTemplate(text=text, kwargs=section.chat_template_kwargs),
    )


def _candidate(
    section: EvaluateConfig,
    names: _Names,
    model: ModelOnDisk,
    decoding: Decoding,
    reading: Reading,
    rewards: Sequence[RewardSpec],
    made: ChatTemplate,
    beside: Path,
) -> Candidate:
    """Return the sets in a model's tokens. UserErrors name the set and the invalid row.

    `made` holds template changes made by an earlier stage, before the stage has run.
    """
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code, template=made)
    decoding.template.apply_checked(tokenizer, key=names.template)
    refuse_runaway_template(tokenizer)
    refuse_absent_tokens(decoding.stop_token_ids, tokenizer, key="stop_token_ids")
    prompts: dict[str, tuple[Prompt, ...]] = {}
    examples: dict[str, tuple[Example, ...]] = {}
    sources: dict[str, Mapping[int, str]] = {}
    environment: LoadedEnvironment | LoadedAgent | None = None
    if rewards:
        reading = replace(reading, max_new_tokens=decoding.max_new_tokens)
        refuse_unservable(model)
        read: dict[str, Any] = {
            "beside": beside,
            "tokenizer": model.tokenizer,
            "trust_remote_code": model.trust_remote_code,
            "template": decoding.template,
        }
        environment = preload_environment(section.environment, **read, key=names.environment)
        environment = environment or preload_agent(section.agent, **read, model=model.base, key=names.agent)
    for name, data in section.sets.items():
        key, source = names.sets.format(name), source_of(data)
        if not rewards:
            with prefix_errors(key):
                rows = read_rows(source, columns=section.columns)
            with prefix_errors(f"{key} (without rewards its completions are measured)"):
                examples[name] = _examples(rows, tokenizer, reading, model, key=key)
            continue
        loaded, rows = read_prompts(
            source,
            key,
            tokenizer,
            replace(reading, max_tokens=ANY_LENGTH) if reading.too_long == "error" else reading,
            columns=section.columns,
            rewards=rewards,
            reward_key=names.rewards,
            environment=environment,
        )
        prompts[name] = loaded.items
        with prefix_errors(key):
            if environment is None:
                refuse_too_long(prompts[name], rows, model, max_new_tokens=decoding.max_new_tokens)
            else:
                lengths = {"max_new_tokens": decoding.max_new_tokens}
                check_lengths(environment.spec, prompts[name], rows, model, **lengths)
        if section.by is not None:
            sources[name] = source_names(prompts[name], section.by, key=names.by, data=key)
    spec = None if environment is None else environment.spec
    return Candidate(model=model, prompts=prompts, examples=examples, sources=sources, environment=spec)


def _examples(
    rows: Sequence[Row], tokenizer: Any, reading: Reading, model: ModelOnDisk, *, key: str
) -> tuple[Example, ...]:
    """Return a set's examples. Raise UserError for an example too long for the model."""
    loaded = load_examples(rows, tokenizer, reading)
    if loaded.unusable:
        logger.warning("%s: %d of %d rows cannot be used and are left out", key, len(loaded.unusable), len(rows))
    left_out = {unusable.place for unusable in loaded.unusable}
    used = [row for row in rows if row.place not in left_out]
    for example, row in zip(loaded.items, used, strict=True):
        if model.max_length is not None and example.longest > model.max_length:
            raise UserError(
                f"{row.place}: the example has {example.longest} tokens, more than the {model.max_length} that "
                f"{model.name} takes. Shorten it."
            )
    return loaded.items


def _refuse_unusable_reward_model(model: RewardModelConfig, *, key: str) -> None:
    """Raise UserError if the reward model is missing, broken or of another kind."""
    if not Path(model.model).exists():
        use_cache_if_silent()
    with prefix_errors(key):
        refuse_without_head(model.model, trust_remote_code=model.trust_remote_code)
        refuse_broken_weights(Path(model.model))
        refuse_missing_weights(model.model, scalar=True, trust_remote_code=model.trust_remote_code)


def _refuse_without_rewards(rewards: Mapping[str, RewardConfig], against: str | None, marks: Marks) -> None:
    """Raise UserError for options with a need for scores, if there are no rewards."""
    if not rewards and (against is not None or marks != Marks()):
        raise UserError(
            "--against, --by, --k, --answer and --pass-score have no effect: no reward scores responses; give a reward"
        )


def _source(text: str) -> tuple[str, DataSource]:
    """Return a set's name and source. TASK[:ROWS] generates rows of the task's eval split."""
    task, _, rows = text.partition(":")
    if task == RUNNING_TOTALS or task.startswith(REASONING_GYM):
        if rows and not (rows.isdecimal() and int(rows) > 0):
            raise UserError(f"--data {text}: a number of rows follows the task's name, such as {task}:100")
        return task, TaskConfig(task=task, split="eval", size=int(rows) if rows else TASK_ROWS)
    return Path(text).stem, text
