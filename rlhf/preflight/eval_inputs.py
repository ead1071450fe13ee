"""Load and check all inputs of an evaluation before any actor starts, from a run's configuration or by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf.config.derive import (
    OfflineKind,
    chat_template,
    eval_sets,
    offline_kind,
    uses_reward_model,
)
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataSource
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.model import RewardModelConfig
from rlhf.config.schema.rewards import RewardConfig, RewardPolicy
from rlhf.config.schema.rollouts import EnvironmentConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, final_folder
from rlhf.data.examples import Example, Reading, load_examples
from rlhf.data.sources import Row, Source, read_rows
from rlhf.data.tasks import REASONING_GYM, RUNNING_TOTALS, TaskSource
from rlhf.data.templates import UNCHANGED, ChatTemplate, read_template
from rlhf.errors import UserError
from rlhf.evaluation.decoding import Decoding
from rlhf.evaluation.results import Marking, Marks, marking_of
from rlhf.evaluation.sources import source_names
from rlhf.models.folder_check import refuse_broken_weights
from rlhf.models.hub import use_cache_if_silent
from rlhf.models.loading import load_tokenizer, refuse_missing_weights
from rlhf.models.on_disk import ModelOnDisk, refuse_unservable
from rlhf.models.reward_models import refuse_without_head
from rlhf.models.template_check import refuse_runaway_template
from rlhf.preflight.environments import KEY as ENVIRONMENT_KEY
from rlhf.preflight.environments import LoadedEnvironment, preload_environment
from rlhf.preflight.models import ANY_LENGTH, StageResults, refuse_too_long, resolve_model
from rlhf.preflight.prompts import read_prompts
from rlhf.preflight.sources import (
    REWARD_KEY,
    in_options,
    load_rewards,
    local_model,
    prefix_errors,
    reading_of,
    refuse_absent_tokens,
    source_of,
    with_template,
)
from rlhf.rewards.scoring import RewardSpec
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.types import Prompt

logger = logging.getLogger(__name__)
TASK_ROWS = 200  # rows of `--data TASK` without a size
MICROBATCH_TOKENS = 8192  # for likelihoods and reward models without a configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model with the sets in its own tokens: prompts to be scored by rewards, or examples to be measured."""

    model: ModelOnDisk
    prompts: Mapping[str, tuple[Prompt, ...]]
    examples: Mapping[str, tuple[Example, ...]]
    sources: Mapping[str, Mapping[int, str]]  # by set, for sets split by source: prompt id to source
    environment: EnvironmentSpec | None  # None: single turns

    @property
    def longest_prompt(self) -> int:
        """Return the length of the longest prompt in tokens; 0 without prompts."""
        return max((len(prompt.token_ids) for prompts in self.prompts.values() for prompt in prompts), default=0)

    def longest_sequence(self, max_new_tokens: int) -> int:
        """Return the most tokens of a prompt with its response, or of a conversation."""
        return self.longest_prompt + max_new_tokens if self.environment is None else self.environment.max_tokens


EnvironmentFor = Callable[[ModelOnDisk], LoadedEnvironment | None]


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


def inputs_of_run(loaded: LoadedConfig, *, model: str | None, against: str | None, marks: Marks) -> EvalInputs:
    """Return the inputs for evaluating a run's model, or `model`, on the held-out sets of the run.

    For a pipeline, the last training stage is used.
    """
    stages = [stage for stage in loaded.stages.values() if not isinstance(stage, MergeStage)]
    if not stages:
        raise UserError(f"{loaded.source} has only merges: evaluate their models on --data")
    if isinstance(stages[-1], EvaluationStage):
        given: dict[str, Any] = {"model": model, "against": against, "k": marks.ks}
        given |= {"pass_score": marks.pass_score, "answer": marks.answers, "by": marks.by}
        changes = {key: value for key, value in given.items() if value is not None}
        section = stages[-1].evaluate.model_copy(update=changes)
        if not section.rewards:
            _refuse_without_rewards((), against, marks)
        return inputs_of_stage(stages[-1].model_copy(update={"evaluate": section}), loaded)
    config = with_template(stages[-1])
    _refuse_other_measures(config, model or str(final_folder(config)))
    sets = {name: source_of(source) for name, source in eval_sets(config).items()}
    if not sets:
        raise UserError(f"data.eval: {loaded.source} names no held-out set; give one, or evaluate a model on --data")
    data, rollouts = config.data, config.rollouts
    decoding = Decoding(
        samples=config.eval.samples_per_prompt,
        temperature=config.eval.temperature,
        max_new_tokens=1 if rollouts is None else rollouts.max_new_tokens,
        stop=() if rollouts is None else rollouts.stop,
        stop_token_ids=() if rollouts is None else rollouts.stop_token_ids,
        seed=config.run.seed,
        system_prompt=data.system_prompt,
        apply_chat_template=data.apply_chat_template,
        template=chat_template(config),
    )
    rewards = load_rewards(
        config.rewards, beside=Path(loaded.source).resolve().parent, memory_gib=config.reward_policy.memory_gib
    )
    _refuse_without_rewards(rewards, against, marks)
    if rewards:
        settings = config.eval
        marks = marks.over(
            Marks(ks=settings.k, pass_score=settings.pass_score, answers=settings.answer, by=settings.by)
        )
    played = None if rollouts is None else rollouts.environment
    environment = _environment(played, loaded, decoding.template)
    candidates = []
    first = ("policy.model", config.policy.source) if model is None else ("--model", model)
    for key, wanted in (first, ("--against", against)):
        if wanted is not None:
            with prefix_errors(key):
                local = local_model(wanted, loaded.folder, seed=config.run.seed)
                resolved = resolve_model(local, trust_remote_code=config.policy.trust_remote_code)
            resolved = replace(resolved, dtype=config.policy.dtype)
            if config.policy.tokenizer is not None:
                resolved = replace(resolved, tokenizer=config.policy.tokenizer)
            how: dict[str, Any] = {"columns": data.columns, "reading": reading_of(config), "by": marks.by}
            how |= {"environment": environment}
            candidates.append(_candidate(resolved, sets, decoding, rewards, set_key="data.eval.{}", **how))
    return _inputs(
        candidates,
        decoding,
        marks,
        rewards,
        reward_model=config.reward.as_loaded() if config.reward is not None and uses_reward_model(config) else None,
        reward_policy=config.reward_policy,
        max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
        cluster=config.cluster,
    )


def _refuse_other_measures(config: Config, model: str) -> None:
    """Raise UserError if the run measures its held-out sets neither by responses nor by given completions."""
    if config.rewards or offline_kind(config) == "supervised":
        return
    others: Mapping[OfflineKind, str] = {
        "reward_model": f"let it score a model's responses: rlhf eval MODEL --data PROMPTS --reward-model {model}",
        "step_rewards": "read them there",
    }
    instead = f"name prompts or SFT examples: rlhf eval {model} --data SET, with --reward NAME to score responses"
    raise UserError(
        f"algorithm.name: is {config.algorithm.name}, whose held-out sets only the run itself measures (eval/ in its "
        f"metrics.jsonl); {others.get(offline_kind(config), instead)}"
    )


def inputs_of_stage(stage: EvaluationStage, loaded: LoadedConfig, *, made: StageResults | None = None) -> EvalInputs:
    """Return the inputs of an evaluation section.

    `made` holds the results of earlier stages. Their models may not exist yet. The models they train stand in for them,
    with the same tokenizer and context length, and the results are checked by their configuration.
    """
    config, made = stage.evaluate, made or StageResults()
    _refuse_unfit_results(stage, made)
    sets = {name: source_of(section) for name, section in _sets(stage).items()}
    decoding = Decoding(
        samples=config.samples_per_prompt if config.rewards else 1,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens if config.rewards else 1,
        stop=config.stop,
        stop_token_ids=config.stop_token_ids,
        seed=stage.run.seed,
        system_prompt=config.system_prompt,
        apply_chat_template=config.apply_chat_template,
        template=ChatTemplate(
            text=config.chat_template and read_template(config.chat_template, key="evaluate.chat_template"),
            kwargs=config.chat_template_kwargs,
        ),
    )
    reading = Reading(
        system_prompt=config.system_prompt,
        apply_chat_template=config.apply_chat_template,
        max_tokens=config.max_tokens_per_microbatch,
    )
    key = f"evaluate.{REWARD_KEY}"
    rewards = load_rewards(
        config.rewards, beside=Path(loaded.source).resolve().parent, memory_gib=config.reward_policy.memory_gib, key=key
    )
    environment = _environment(config.environment, loaded, decoding.template, key="evaluate.environment")
    candidates = []
    for name in ("model", "against"):
        wanted = getattr(config, name)
        if wanted is not None:
            with prefix_errors(f"evaluate.{name}"):
                local = local_model(made.finals.get(wanted, wanted), loaded.folder, seed=stage.run.seed)
                resolved = resolve_model(local, trust_remote_code=config.trust_remote_code)
            resolved = replace(resolved, name=wanted, dtype=config.dtype or resolved.dtype)
            how: dict[str, Any] = {
                "columns": config.columns,
                "reading": reading,
                "by": config.by,
                "by_key": "evaluate.by",
                "template_key": "evaluate",
                "environment": environment,
                "made": made.templates.get(wanted, UNCHANGED),
            }
            candidates.append(
                _candidate(resolved, sets, decoding, rewards, set_key="evaluate.data.{}", reward_key=key, **how)
            )
    reward_model = config.reward if stage.uses_reward_model else None
    return _inputs(
        candidates,
        decoding,
        Marks(ks=config.k, pass_score=config.pass_score, answers=config.answer, by=config.by),
        rewards,
        reward_model=reward_model,
        is_there=reward_model is None or reward_model.model not in made.finals,
        key="evaluate.reward.model",
        reward_policy=config.reward_policy,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        cluster=stage.cluster,
    )


def _environment(
    section: EnvironmentConfig | None, loaded: LoadedConfig, template: ChatTemplate, *, key: str = ENVIRONMENT_KEY
) -> EnvironmentFor:
    """Return the section's environment, loaded for each model's tokenizer and template."""
    load = partial(preload_environment, section, beside=Path(loaded.source).resolve().parent, key=key)
    return lambda model: load(tokenizer=model.tokenizer, trust_remote_code=model.trust_remote_code, template=template)


def _sets(stage: EvaluationStage) -> Mapping[str, DataSource]:
    data = stage.evaluate.data
    return data if isinstance(data, dict) else {"heldout": data}


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
            text = (
                f"will be an adapter with {kind}, which engines cannot serve; merge it into its base in a stage before"
            )
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

    Prompts whose responses are scored if there are rewards; examples otherwise.
    """
    if not data:
        raise UserError(
            "--data is missing: name a file, a dataset or a task to evaluate the model on. The held-out sets of a run "
            "are evaluated by its configuration: rlhf eval RUN/config.resolved.yaml --model RUN"
        )
    sets: dict[str, Source] = {}
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
    policy = RewardPolicy()
    specs = load_rewards(configs, beside=Path.cwd(), memory_gib=policy.memory_gib, key="--reward {}")
    _refuse_without_rewards(specs, against, marks)
    reading = Reading(
        system_prompt=decoding.system_prompt,
        apply_chat_template=decoding.apply_chat_template,
        max_tokens=MICROBATCH_TOKENS,
    )
    candidates = []
    for key, wanted in (("MODEL", model), ("--against", against)):
        if wanted is not None:
            with prefix_errors(key):
                resolved = resolve_model(wanted, trust_remote_code=trust_remote_code)
            how: dict[str, Any] = {"columns": decoding.columns, "reading": reading, "by": marks.by, "by_key": "--by"}
            with in_options():
                candidates.append(_candidate(resolved, sets, decoding, specs, set_key="--data {}", **how))
    return _inputs(
        candidates,
        decoding,
        marks,
        specs,
        reward_model=None if reward_model is None else RewardModelConfig(model=reward_model),
        reward_policy=policy,
        max_tokens_per_microbatch=MICROBATCH_TOKENS,
        cluster=ClusterConfig(device=device),
    )


def _candidate(
    model: ModelOnDisk,
    sets: Mapping[str, Source],
    decoding: Decoding,
    rewards: Sequence[RewardSpec],
    *,
    columns: Mapping[str, str],
    reading: Reading,
    by: str | None,
    set_key: str,
    reward_key: str = REWARD_KEY,
    by_key: str = "eval.by",
    environment: EnvironmentFor = lambda _: None,
    template_key: str = "data",
    made: ChatTemplate = UNCHANGED,
) -> Candidate:
    """Return the sets in a model's tokens. UserErrors name the set and the invalid row.

    `made` holds template changes made by an earlier stage, before the stage has run.
    """
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code, template=made)
    decoding.template.apply_checked(tokenizer, key=template_key)
    refuse_runaway_template(tokenizer)
    prompts: dict[str, tuple[Prompt, ...]] = {}
    examples: dict[str, tuple[Example, ...]] = {}
    sources: dict[str, Mapping[int, str]] = {}
    refuse_absent_tokens(decoding.stop_token_ids, tokenizer, key="stop_token_ids")
    if rewards:
        refuse_unservable(model)
    played = environment(model) if rewards else None
    for name, source in sets.items():
        key = set_key.format(name)
        if not rewards:
            with prefix_errors(key):
                rows = read_rows(source, columns=columns)
            with prefix_errors(f"{key} (without rewards its completions are measured)"):
                examples[name] = _examples(rows, tokenizer, reading, model, key=key)
            continue
        loaded, rows = read_prompts(
            source,
            key,
            tokenizer,
            replace(reading, max_tokens=ANY_LENGTH) if reading.too_long == "error" else reading,
            columns=columns,
            rewards=rewards,
            reward_key=reward_key,
            environment=played,
        )
        prompts[name] = loaded.items
        with prefix_errors(key):
            if played is None:
                refuse_too_long(prompts[name], rows, model, max_new_tokens=decoding.max_new_tokens)
            else:
                played.check_lengths(prompts[name], rows, model, max_new_tokens=decoding.max_new_tokens)
        if by is not None:
            sources[name] = source_names(prompts[name], by, key=by_key, data=key)
    spec = None if played is None else played.spec
    return Candidate(model=model, prompts=prompts, examples=examples, sources=sources, environment=spec)


def _examples(
    rows: Sequence[Row], tokenizer: Any, reading: Reading, model: ModelOnDisk, *, key: str
) -> tuple[Example, ...]:
    """Return a set's examples. Raise UserError if one of them is too long for the model."""
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


def _inputs(
    candidates: Sequence[Candidate],
    decoding: Decoding,
    marks: Marks,
    rewards: tuple[RewardSpec, ...],
    *,
    reward_model: RewardModelConfig | None,
    is_there: bool = True,
    key: str = "reward.model",
    reward_policy: RewardPolicy,
    max_tokens_per_microbatch: int,
    cluster: ClusterConfig,
) -> EvalInputs:
    """Return the inputs with decided marks. The reward model is checked if it `is_there` already."""
    if reward_model is not None and is_there:
        if not Path(reward_model.model).exists():
            use_cache_if_silent()
        with prefix_errors(key):
            refuse_without_head(reward_model.model, trust_remote_code=reward_model.trust_remote_code)
            refuse_broken_weights(Path(reward_model.model))
            refuse_missing_weights(reward_model.model, scalar=True, trust_remote_code=reward_model.trust_remote_code)
    longest = max(candidate.longest_sequence(decoding.max_new_tokens) for candidate in candidates)
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
        reward_policy=reward_policy,
        max_tokens_per_microbatch=max(max_tokens_per_microbatch, longest),
        cluster=cluster,
    )


def _refuse_without_rewards(rewards: Sequence[RewardSpec], against: str | None, marks: Marks) -> None:
    """Raise UserError for options that need scores, if there are no rewards."""
    if not rewards and (against is not None or marks != Marks()):
        raise UserError(
            "--against, --by, --k, --answer and --pass-score have no effect: no reward scores responses; give a reward"
        )


def _source(text: str) -> tuple[str, Source]:
    """Return a set's name and its source. TASK[:ROWS] generates rows of the task's eval split."""
    task, _, rows = text.partition(":")
    if task == RUNNING_TOTALS or task.startswith(REASONING_GYM):
        if rows and not (rows.isdecimal() and int(rows) > 0):
            raise UserError(f"--data {text}: a number of rows follows the task's name, such as {task}:100")
        return task, TaskSource(task=task, split="eval", size=int(rows) if rows else TASK_ROWS)
    return Path(text).stem, text
