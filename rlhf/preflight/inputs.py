"""Load and check all inputs of a run before any actor starts: model folders, tokenizer, data, rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf.agents.runners import KEY as AGENT_KEY
from rlhf.agents.sessions import AgentSpec
from rlhf.algorithms.algorithm import Kind
from rlhf.config.derive import chat_template, eval_metrics, eval_sets, models_of, prompts_asked, train_sets, with_steps
from rlhf.config.files.load import LoadedConfig
from rlhf.config.mistakes.explain import refuse
from rlhf.config.schema.data import DataSource
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, final_folder
from rlhf.config.validation.run import problems
from rlhf.controller.evaluation import EvalSet
from rlhf.data.examples import Example, collate, load_examples
from rlhf.data.labelled import Labelled, collate_labelled, load_labelled
from rlhf.data.preferences import PreferencePair, collate_pairs, load_pairs
from rlhf.data.sources import FILE_SUFFIXES, read_rows
from rlhf.data.steps import StepLabelled, collate_steps, load_step_labelled
from rlhf.data.stream import MixtureShare
from rlhf.data.templates import UNCHANGED
from rlhf.data.usable import LoadedRows, Unusable
from rlhf.deferred import transformers
from rlhf.errors import UserError, prefix_errors
from rlhf.evaluation.results import Marking, Marks, marking_of
from rlhf.evaluation.sources import source_names
from rlhf.models.files.hub import use_cache_if_silent
from rlhf.models.files.loading import (
    load_model_config,
    load_tokenizer,
)
from rlhf.models.files.publish import refuse_unpublishable
from rlhf.models.files.template_check import refuse_runaway_template
from rlhf.models.files.tiny import described_config
from rlhf.models.on_disk import may_ask_the_hub
from rlhf.preflight.agents import LoadedAgent, preload_agent
from rlhf.preflight.engine_args import refuse_unknown_engine_args
from rlhf.preflight.environments import LoadedEnvironment, preload_environment
from rlhf.preflight.eval_inputs import inputs_of_stage
from rlhf.preflight.models import StageResults, check_models, refuse_other_results, with_adapters, with_sources
from rlhf.preflight.prompts import read_prompts
from rlhf.preflight.sources import (
    check_rewards,
    installed_trackers,
    load_rewards,
    reading_of,
    refuse_absent_tokens,
    refuse_unused_rewards,
    source_of,
    with_template,
)
from rlhf.rewards.scoring import RewardSpec
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.types import RESULT_COLUMN, Examples, Pairs, Prompt

OfflineRow = Example | PreferencePair | StepLabelled | Labelled

R = TypeVar("R")
logger = logging.getLogger(__name__)
# How each kind of algorithm without rollouts reads its rows, and how they become a batch.
FORMS: Mapping[Kind, tuple[Callable[..., LoadedRows[Any]], Callable[..., Examples | Pairs]]] = {
    "supervised": (load_examples, collate),
    "distillation": (load_examples, collate),
    "preference": (load_pairs, collate_pairs),
    "reward_model": (load_pairs, collate_pairs),
    "step_rewards": (load_step_labelled, collate_steps),
    "unpaired": (load_labelled, collate_labelled),
}
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sets(Generic[R]):
    """The data sets of a run."""

    train: tuple[R, ...]  # all training sets, concatenated
    shares: tuple[MixtureShare, ...]
    held_out: Mapping[str, tuple[R, ...]]
    unusable: tuple[Unusable, ...]  # skipped rows of all sets


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineInputs:
    """The inputs of an online run."""

    prompts: tuple[Prompt, ...]  # all training sets, concatenated
    unusable: tuple[Unusable, ...]  # skipped rows of all sets
    shares: tuple[MixtureShare, ...]
    eval_sets: Mapping[str, EvalSet]
    marking: Marking  # how held-out responses are graded
    rewards: tuple[RewardSpec, ...]
    environment: EnvironmentSpec | AgentSpec | None
    max_model_len: int  # longest prompt with longest response, or longest conversation, in tokens
    probe_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineInputs:
    """The inputs of a run without rollouts."""

    rows: tuple[OfflineRow, ...]  # all training sets, concatenated
    shares: tuple[MixtureShare, ...]
    eval_sets: Mapping[str, tuple[OfflineRow, ...]]
    unusable: tuple[Unusable, ...]  # skipped rows of all sets
    longest_sequence: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """A run, ready to start."""

    config: Config  # with loadable model names
    written: Config  # as written by the user; saved in the run folder
    inputs: OnlineInputs | OfflineInputs
    tokenizer: Any  # the policy's


CheckedStage = StageInputs | MergeStage | EvaluationStage


def load_inputs(loaded: LoadedConfig, *, only_checks: bool = False) -> list[CheckedStage]:
    """Return the inputs of every run.

    Merges and evaluations are returned unchanged, because their models may not exist yet.

    Args:
        only_checks: the inputs are not used, so tiny:llama gets no weights unless a merge or an evaluation reads the
            weights.

    Raises:
        UserError: the first error found, in any stage.
    """
    made = StageResults()
    weights = not only_checks or not all(isinstance(config, Config) for config in loaded.stages.values())
    stages: list[CheckedStage] = []
    for name, config in loaded.stages.items():
        with prefix_errors(f"stages.{name}") if loaded.is_pipeline else nullcontext():
            if not isinstance(config, MergeStage):
                installed_trackers(config)
                refuse_unknown_engine_args(config.cluster)
            if not isinstance(config, Config):
                if isinstance(config, MergeStage):
                    from rlhf.preflight.merge import foresee, with_local_models  # imports peft, which takes seconds

                    foresee(with_local_models(config, loaded.folder), made, final=str(final_folder(config)))
                else:
                    inputs_of_stage(config, loaded, made=made)
                stages.append(config)
                continue
            local = with_template(with_sources(config, loaded.folder, weights=weights))
            refuse_other_results(local, made)
            local = with_adapters(local, made.adapters)
            if _asks_the_hub(local, made.finals):
                use_cache_if_silent()
            if config.run.repository is not None:
                refuse_unpublishable(config.run.repository, key="run.push_to_hub")
            source = made.finals.get(local.policy.model, local.policy.model)
            tokenizer_source = local.policy.tokenizer or made.tokenizers.get(local.policy.model, source)
            check_models(local, made, vocabulary_of=tokenizer_source)
            earlier = UNCHANGED if local.policy.tokenizer else made.templates.get(local.policy.model, UNCHANGED)
            with prefix_errors("policy.model"):
                tokenizer = load_tokenizer(
                    tokenizer_source,
                    trust_remote_code=local.policy.trust_remote_code,
                    template=earlier,
                    kind=transformers.PreTrainedTokenizerFast if described_config(Path(tokenizer_source)) else None,
                )
            template = chat_template(local)
            template.apply_checked(tokenizer, key="data")
            refuse_runaway_template(tokenizer)
            if local.algorithm.is_online:
                inputs: OnlineInputs | OfflineInputs = _online(local, source, tokenizer, loaded)
            else:
                inputs = _offline(local, source, tokenizer)
            local = _with_steps(local, sum(share.size for share in inputs.shares))
        stages.append(StageInputs(config=local, written=config, inputs=inputs, tokenizer=tokenizer))
        final = str(final_folder(config))
        made.finals[final] = source
        made.tokenizers[final] = tokenizer_source
        made.templates[final] = earlier.then(template)
        if local.policy.lora is not None:
            made.adapters[final] = local.policy.lora
        if local.policy.model in made.restacked:
            made.restacked.add(final)
        if config.algorithm.has_scalar_head:
            made.scored[final] = config.algorithm.short_name
    return stages


def check_files_and_rewards(loaded: LoadedConfig) -> None:
    """Check the needs of training stages besides models and the hub: data files, rewards, and the columns of rewards.

    UserError: a file cannot be read, a reward cannot be loaded, or a row lacks a column of a reward.
    """
    beside = Path(loaded.source).resolve().parent
    for name, config in loaded.runs.items():
        sets: dict[str, DataSource] = {key: section.source for key, section in train_sets(config).items()}
        sets |= {f"data.eval.{held_out}": source for held_out, source in eval_sets(config).items()}
        is_agent = config.rollouts is not None and config.rollouts.agent is not None
        with prefix_errors(f"stages.{name}") if loaded.is_pipeline else nullcontext():
            specs = load_rewards(config.rewards, beside=beside, memory_gib=config.reward_policy.memory_gib)
            for key, source in sets.items():
                if isinstance(source, str) and not source.endswith(FILE_SUFFIXES):
                    continue
                with prefix_errors(key):
                    rows = read_rows(source_of(source), columns=config.data.columns)
                if specs:
                    check_rewards(specs, rows, key, of_sessions=(RESULT_COLUMN,) if is_agent else ())


def _with_steps(config: Config, rows: int) -> Config:
    """Return the configuration with epochs converted to steps. Raise UserError if a check of the steps then fails."""
    if config.train.epochs is None:
        return config
    converted = with_steps(config, rows)
    steps = converted.train.num_steps
    logger.info("train.epochs %g of %d rows: %d steps", config.train.epochs, rows, steps)
    refuse(problems(converted), lambda key: f"train.epochs is {config.train.epochs:g}, which makes {steps} steps")
    return converted


def _asks_the_hub(config: Config, finals: Mapping[str, str]) -> bool:
    """Return whether a model or a data set may be a name on the hub."""
    models = [model.model for model in models_of(config).values() if model.model not in finals]
    sources = [*(section.source for section in train_sets(config).values()), *eval_sets(config).values()]
    data = [source.partition(":")[0] for source in sources if isinstance(source, str)]
    names = [*models, *(name for name in data if not name.endswith(FILE_SUFFIXES))]
    absent = [name for name in names if not Path(name).exists()]
    bases = [model for model in models if model not in absent and may_ask_the_hub(model)]  # base models of adapters
    return bool(bases) or any(not name.startswith(("/", ".", "~")) for name in absent)


def _online(config: Config, source: str, tokenizer: Any, loaded: LoadedConfig) -> OnlineInputs:
    assert config.rollouts is not None
    data = config.data
    refuse_absent_tokens(config.rollouts.stop_token_ids, tokenizer, key="rollouts.stop_token_ids")
    beside = Path(loaded.source).resolve().parent
    specs = load_rewards(config.rewards, beside=beside, memory_gib=config.reward_policy.memory_gib)
    reading: dict[str, Any] = {
        "beside": beside,
        "tokenizer": config.policy.tokenizer_source,
        "trust_remote_code": config.policy.trust_remote_code,
        "template": chat_template(config),
    }
    environment: LoadedEnvironment | LoadedAgent | None = preload_environment(config.rollouts.environment, **reading)
    environment = environment or preload_agent(config.rollouts.agent, **reading, model=source, key=AGENT_KEY)

    def read(name: str, source: DataSource, first_id: int) -> LoadedRows[Prompt]:
        return read_prompts(
            source_of(source),
            name,
            tokenizer,
            reading_of(config),
            columns=data.columns,
            rewards=specs,
            environment=environment,
            first_id=first_id,
        )[0]

    sets = _read_sets(config, read, by_row=True)
    prompts, held_out = sets.train, sets.held_out
    refuse_unused_rewards(specs, (prompt.columns for prompt in prompts))
    config = _with_steps(config, len(prompts))
    rollouts = config.rollouts
    assert rollouts is not None
    if data.curriculum is not None and len(sets.shares) == 1 and prompts_asked(config, rollouts) <= len(prompts):
        raise UserError(
            f"data.curriculum: has no effect here: data.train has {len(prompts)} prompts, of which "
            f"{config.train.num_steps} steps need {prompts_asked(config, rollouts)} at most, so none comes up "
            "twice; remove it, or raise train.steps or rollouts.prompts_per_step."
        )
    if config.algorithm.kind == "sampled_distillation" and any(prompt.temperature is not None for prompt in prompts):
        raise UserError(
            f"data.train: column `temperature` is not for algorithm {config.algorithm.name}, whose teacher works at "
            "rollouts.temperature. Give the column another name, or leave it out."
        )
    settings = config.eval
    sources = {
        name: {} if settings.by is None else source_names(group, settings.by, key="eval.by", data=f"data.eval.{name}")
        for name, group in held_out.items()
    }
    marks = Marks(ks=settings.k, pass_score=settings.pass_score, answers=settings.answer)
    marking = marking_of(marks, specs, samples=settings.samples_per_prompt)
    eval_sets = {name: EvalSet(prompts=group, sources=sources[name]) for name, group in held_out.items()}
    _refuse_absent_metric(config, specs, eval_sets, marking)
    longest = max(len(p.token_ids) for group in (prompts, *held_out.values()) for p in group)
    max_model_len = rollouts.longest_sequence(longest)
    _refuse_too_long(source, config, longest=longest, wanted=max_model_len)
    if max_model_len > config.train.max_tokens_per_microbatch:
        raise UserError(
            f"train.max_tokens_per_microbatch: is {config.train.max_tokens_per_microbatch}, but the longest prompt "
            f"({longest} tokens) with rollouts.max_new_tokens ({rollouts.max_new_tokens}) may have {max_model_len}; "
            "raise it"
        )
    probe = [token for prompt in prompts[:PROBE_TOKENS] for token in prompt.token_ids]
    return OnlineInputs(
        prompts=prompts,
        unusable=sets.unusable,
        shares=sets.shares,
        eval_sets=eval_sets,
        marking=marking,
        rewards=specs,
        environment=environment.spec if environment is not None else None,
        max_model_len=max_model_len,
        probe_ids=tuple(probe[: min(PROBE_TOKENS, max_model_len - 1)]),
    )


def _refuse_absent_metric(
    config: Config, specs: Sequence[RewardSpec], sets: Mapping[str, EvalSet], marking: Marking
) -> None:
    """Raise UserError if no evaluation has the metric for the best checkpoint."""
    if config.train.best_metric is None:
        return
    best = config.train.best_metric.removeprefix("-")
    parts = [
        part
        for name, held_out in sets.items()
        for part in (name, *sorted({f"{name}.{source}" for source in held_out.sources.values()}))
    ]
    known = [f"eval/{part}/{metric}" for part in parts for metric in eval_metrics(config) if marking.gives(metric)]
    if best not in known:
        is_graded = marking.gives(best.rpartition("/")[2])
        why = "" if is_graded else ": pass@k needs eval.pass_score here, and maj@k needs eval.answer too"
        text = f"is {best!r}, which no evaluation has{why}. The metrics are: {', '.join(known)}"
        raise UserError(f"train.best_metric: {text}")
    for name, held_out in sets.items():
        for spec in specs:
            is_best = best == f"eval/{name}/{spec.name}"
            if is_best and not any(spec.applies_to(prompt.columns) for prompt in held_out.prompts):
                text = f"is {best!r}, but rewards.{spec.name}.only applies to no row of data.eval.{name}"
                raise UserError(f"train.best_metric: {text}")


def _offline(config: Config, source: str, tokenizer: Any) -> OfflineInputs:
    load, reading = FORMS[config.algorithm.kind][0], reading_of(config)

    def read(name: str, source: DataSource, first_id: int) -> LoadedRows[OfflineRow]:
        with prefix_errors(name):
            rows = read_rows(source_of(source), columns=config.data.columns)
            loaded = load(rows, tokenizer, reading, first_id=first_id, **config.algorithm.row_options)
        if loaded.unusable:
            logger.warning("%s: %d of %d rows cannot be used and are left out", name, len(loaded.unusable), len(rows))
        return loaded

    sets = _read_sets(config, read, by_row=False)
    rows, held_out = sets.train, sets.held_out
    for name, group in {"data.train": rows, **{f"data.eval.{name}": group for name, group in held_out.items()}}.items():
        prompts = {row.token_ids[: row.prompt_tokens] for row in group if isinstance(row, Labelled)}
        if len(prompts) == 1 and config.algorithm.compares_with_divergence:
            raise UserError(
                f"{name}: all rows have the same prompt, but algorithm.loss kto compares answers to different prompts. "
                "Use bco or apo_zero."
            )
    longest = max(row.longest for group in (rows, *held_out.values()) for row in group)
    _refuse_too_long(source, config, longest=longest, wanted=longest)
    return OfflineInputs(
        rows=rows,
        shares=sets.shares,
        eval_sets=held_out,
        unusable=sets.unusable,
        longest_sequence=longest,
    )


def _read_sets(config: Config, read: Callable[[str, DataSource, int], LoadedRows[R]], *, by_row: bool) -> _Sets[R]:
    """Return all sets of a run. `read` gets a set's key, the source, and the id of the first row.

    by_row: ids count skipped rows too.
    """
    train: tuple[R, ...] = ()
    shares: list[MixtureShare] = []
    unusable: list[Unusable] = []
    for name, section in train_sets(config).items():
        loaded = read(name, section.source, len(train) + (len(unusable) if by_row else 0))
        train += loaded.items
        shares.append(MixtureShare(name=name, weight=section.weight, size=len(loaded.items)))
        unusable += loaded.unusable
    held_out = {name: read(f"data.eval.{name}", source, 0) for name, source in eval_sets(config).items()}
    return _Sets(
        train=train,
        shares=tuple(shares),
        held_out={name: loaded.items for name, loaded in held_out.items()},
        unusable=(*unusable, *(row for loaded in held_out.values() for row in loaded.unusable)),
    )


def collated(config: Config, rows: Sequence[OfflineRow]) -> Examples | Pairs:
    """Collate rows of a data set into the batch type of the algorithm's workers."""
    kind, algorithm = config.algorithm.kind, config.algorithm
    options = {"mismatched": algorithm.compares_with_divergence} if kind == "unpaired" else {}
    return FORMS[kind][1](rows, **options)


def _refuse_too_long(source: str, config: Config, *, longest: int, wanted: int) -> None:
    shape: Any = described_config(Path(source))
    if shape is None:
        shape = load_model_config(source, trust_remote_code=config.policy.trust_remote_code).get_text_config()
    limit: int | None = getattr(shape, "max_position_embeddings", None)  # BLOOM has none
    if limit is not None and wanted > limit:
        room = f" with rollouts.max_new_tokens {config.rollouts.max_new_tokens}" if config.rollouts else ""
        if config.rollouts and config.rollouts.environment is not None:
            room = f" in a conversation of rollouts.environment.max_tokens {wanted}"
        if config.rollouts and config.rollouts.agent is not None:
            room = f" in a call of rollouts.agent.max_tokens {wanted}"
        raise UserError(
            f"policy.model {config.policy.model} takes at most {limit} tokens, and the longest sequence of the data "
            f"({longest} tokens{room}) would have {wanted}. Shorten the data, or use a model with a longer context."
        )
