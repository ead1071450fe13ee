"""Load the data of a training run with all rewards, and check that the run can use both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf.agents.sessions import AgentSpec
from rlhf.algorithms.algorithm import Kind
from rlhf.config.derive import (
    chat_template,
    eval_metrics,
    eval_sets,
    max_sequence_tokens,
    prompts_asked,
    source_of,
    teacher_column,
    teachers,
    train_sets,
    with_steps,
)
from rlhf.config.problem import refuse
from rlhf.config.schema.data import DataSource
from rlhf.config.schema.root import Config
from rlhf.config.validation.run import problems
from rlhf.controller.evaluation import EvalSet
from rlhf.data.examples import Example, Reading, collate, load_examples
from rlhf.data.images import RowImages
from rlhf.data.labelled import Labelled, collate_labelled, load_labelled
from rlhf.data.preferences import PreferencePair, collate_pairs, load_pairs
from rlhf.data.row import Row, shown
from rlhf.data.sources import open_shards, read_rows
from rlhf.data.spans import Translator
from rlhf.data.steps import StepLabelled, collate_steps, load_step_labelled
from rlhf.data.stream import MixtureShare, Tokenized
from rlhf.data.usable import LoadedRows, Unusable
from rlhf.data.windows import WindowedSet, WindowedStream
from rlhf.errors import UserError, prefix_errors
from rlhf.evaluation.results import Marking, Marks, marking_of
from rlhf.evaluation.sources import source_names
from rlhf.models.files.loading import load_model_config
from rlhf.models.files.tiny import described_config
from rlhf.preflight.exchanged import with_exchanged
from rlhf.preflight.prompts import load_player, prompts_of_rows
from rlhf.preflight.sources import load_rewards, reading_of, refuse_absent_tokens, refuse_unused_rewards
from rlhf.process.stopping import run_async
from rlhf.rewards.scoring import RewardSpec
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.rollouts.environments.turns import PLACEHOLDER
from rlhf.suites.process import plan_suites
from rlhf.suites.spec import SuiteSpec
from rlhf.types import Examples, Pairs, Prompt
from rlhf.vision.sight import small_image

OfflineRow = Example | PreferencePair | StepLabelled | Labelled

R = TypeVar("R", bound=Tokenized)
logger = logging.getLogger(__name__)
# How each kind of algorithm without rollouts reads rows, and how the rows become a batch.
FORMS: Mapping[Kind, tuple[Callable[..., LoadedRows[Any]], Callable[..., Examples | Pairs]]] = {
    "supervised": (load_examples, collate),
    "distillation": (load_examples, collate),
    "preference": (load_pairs, collate_pairs),
    "reward_model": (load_pairs, collate_pairs),
    "step_rewards": (load_step_labelled, collate_steps),
    "unpaired": (load_labelled, collate_labelled),
}
PROBE_TOKENS = 64
PROBE_TAIL = 16  # ordinary tokens behind a prompt with images


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sets(Generic[R]):
    train: tuple[R, ...]  # all training sets, concatenated
    shares: tuple[MixtureShare, ...]
    held_out: Mapping[str, tuple[R, ...]]
    unusable: tuple[Unusable, ...]  # skipped rows of all sets, without rows of a stream
    stream: WindowedStream[R] | None = None  # None: `train` has all rows; otherwise the rows of the first windows

    def longest(self, length: Callable[[R], int], *, limit: int) -> int:
        """Return the largest number of tokens. The rows of a stream have at most `limit`."""
        return (
            limit
            if self.stream is not None
            else max(length(row) for group in (self.train, *self.held_out.values()) for row in group)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineInputs:
    prompts: tuple[Prompt, ...]  # all training sets, concatenated; of a stream, the first windows
    stream: WindowedStream[Prompt] | None = None  # streamed training data
    unusable: tuple[Unusable, ...]  # skipped rows of all sets
    shares: tuple[MixtureShare, ...]
    eval_sets: Mapping[str, EvalSet]
    suites: SuiteSpec | None  # None: no suites
    marking: Marking  # how held-out responses are graded
    rewards: tuple[RewardSpec, ...]
    environment: EnvironmentSpec | AgentSpec | None
    longest_sequence: int  # longest prompt with longest response, longest conversation or given response, in tokens
    max_model_len: int  # tokens of the engines' longest sequence, also of suites
    probe_ids: tuple[int, ...]

    def code(self) -> dict[str, str]:
        """Return a digest of the code and the arguments of each function of a reward, and of the environment or agent,
        by key. The criterion of a rubric has the key `rewards.<reward>/<criterion>`.
        """
        functions = {name: function for spec in self.rewards for name, function in spec.functions.items()}
        sources = {f"rewards.{name}": function.source for name, function in functions.items()}
        if self.environment is not None:
            sources[self.environment.key] = self.environment.source
        return {key: source.digest().hex() for key, source in sources.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineInputs:
    """The inputs of a run without rollouts."""

    rows: tuple[OfflineRow, ...]  # all training sets, concatenated; of a stream, the first windows
    stream: WindowedStream[OfflineRow] | None = None  # streamed training data
    shares: tuple[MixtureShare, ...]
    eval_sets: Mapping[str, tuple[OfflineRow, ...]]
    unusable: tuple[Unusable, ...]  # skipped rows of all sets
    longest_sequence: int  # tokens


def load_training_data(
    config: Config,
    source: str,
    tokenizer: Any,
    *,
    beside: Path,
    translators: Mapping[str, Translator],
    images: RowImages | None,
) -> tuple[Config, OnlineInputs | OfflineInputs]:
    """Return the inputs of a run, and the configuration with epochs converted to steps.

    source: the folder or name of the policy's model. beside: the folder searched for code before the current one.
    translators: of the teachers with another tokenizer, by name.
    images: None if the policy reads only text.
    """
    reading = replace(reading_of(config), translators=translators, images=images)
    if config.algorithm.is_online:
        return _online(config, source, tokenizer, beside, reading)
    return _offline(config, source, tokenizer, reading)


def _online(config: Config, source: str, tokenizer: Any, beside: Path, reading: Reading) -> tuple[Config, OnlineInputs]:
    rollouts, settings = config.rollouts, config.eval
    assert rollouts is not None
    refuse_absent_tokens(rollouts.stop_token_ids, tokenizer, key="rollouts.stop_token_ids")
    specs = load_rewards(config.rewards, beside=beside, memory_gib=config.reward_policy.memory_gib)
    player = load_player(
        rollouts.environment,
        rollouts.agent,
        model=source,
        beside=beside,
        tokenizer=config.policy.tokenizer_source,
        trust_remote_code=config.policy.trust_remote_code,
        template=chat_template(config),
    )
    how: dict[str, Any] = {"rewards": specs, "environment": player}
    taught = _privileged_reading(config, source)
    if taught and rollouts.environment is not None and reading.images is not None:
        raise UserError(
            "rollouts.environment: may show images to a vision policy, but the teacher of algorithm "
            f"{config.algorithm.name} reads only text. Remove the environment, or take a policy that reads only text."
        )

    def load(name: str, rows: Sequence[Row], first_id: int, reading: Reading) -> LoadedRows[Prompt]:
        is_eval = name.startswith("data.eval.")
        reading = replace(reading, needs_given=False) if is_eval else replace(reading, **taught)
        return prompts_of_rows(rows, name, tokenizer, reading, first_id=first_id, **how)[0]

    sets = _read_sets(
        config, load, reading, by_row=True, with_id=lambda prompt, row_id: replace(prompt, prompt_id=row_id)
    )
    if sets.stream is None:
        refuse_unused_rewards(specs, (prompt.columns for prompt in sets.train))
    config = _with_steps(config, len(sets.train))
    _refuse_useless_data(config, sets)
    eval_sets = {}
    for name, group in _held_out(config, sets, reading.images).items():
        column, key = settings.by, f"data.eval.{name}"
        sources = {} if column is None else source_names(group, column, key="eval.by", data=key)
        eval_sets[name] = EvalSet(prompts=group, sources=sources)
    marks = Marks(ks=settings.k, pass_score=settings.pass_score, answers=settings.answer)
    marking = marking_of(marks, specs, samples=settings.samples_per_prompt)
    _refuse_absent_metric(config, specs, eval_sets, marking)
    longest = sets.longest(lambda prompt: len(prompt.token_ids), limit=config.data.max_prompt_tokens)
    max_model_len = rollouts.longest_sequence(longest)
    shown = [prompt for prompt in sets.train if prompt.given is not None]
    given = [len(prompt.given.token_ids) for prompt in shown if prompt.given is not None]
    fixed = [prompt for prompt in sets.train if prompt.privileged is not None] or shown
    if rollouts.environment is not None and any(PLACEHOLDER in prompt.text for prompt in fixed):
        raise UserError(
            f"data.train: a prompt with a given response or with algorithm.privileged has {PLACEHOLDER}, the place of "
            "the environment's first observation, but such a prompt is tokenised as written. Write the observation "
            "into the prompt and let `reset` return none, or learn only from rollouts."
        )
    if config.algorithm.reads_given_responses and not given:
        raise UserError(
            f"data.train: no row has a given response, from which algorithm {config.algorithm.name} learns: column "
            "`completion`, or an assistant's turn at the end of `messages`. If a column has another name, set "
            "data.columns: {completion: ITS_NAME}."
        )
    longest_sequence = max(max_model_len, *given, 0)
    _refuse_too_long(source, config, longest=longest, wanted=longest_sequence)
    suites = _suites(source, config)
    if suites is not None:
        max_model_len = max(max_model_len, run_async(plan_suites(suites)).longest)
    return config, OnlineInputs(
        prompts=sets.train,
        stream=sets.stream,
        unusable=sets.unusable,
        shares=sets.shares,
        eval_sets=eval_sets,
        suites=suites,
        marking=marking,
        rewards=specs,
        environment=None if player is None else player.spec,
        longest_sequence=longest_sequence,
        max_model_len=max_model_len,
        probe_ids=_probe_ids(sets.train, max_model_len, None if player is None else reading.images),
    )


def _held_out(config: Config, sets: _Sets[R], images: RowImages | None) -> Mapping[str, tuple[R, ...]]:
    held_out = sets.held_out
    return with_exchanged(held_out, images, key="eval.exchange_images") if config.eval.exchange_images else held_out


def _probe_ids(prompts: Sequence[Prompt], max_model_len: int, added: RowImages | None) -> tuple[int, ...]:
    """Return the tokens whose log-probabilities verify a weight sync.

    If prompts have images, the shortest such prompt is taken whole, with text that depends on the image behind.
    Otherwise the images that an environment or an agent may add (`added`) are represented by one of our own.
    """
    seeing = [prompt.token_ids for prompt in prompts if min(prompt.token_ids) < 0]
    if added is not None and not seeing:
        key = added.reader.store.add(small_image())
        seeing = [tuple(added.processing.expand([added.processing.placeholder_id], [key], added.reader.store))]
    if seeing:
        return (*min(seeing, key=len), *range(PROBE_TAIL))[: max_model_len - 1]
    text = [token for prompt in prompts[:PROBE_TOKENS] for token in prompt.token_ids]
    return tuple(text[: min(PROBE_TOKENS, max_model_len - 1)])


def _privileged_reading(config: Config, source: str) -> dict[str, Any]:
    """Return the fields of Reading for a policy that teaches itself, or nothing."""
    if config.algorithm.privileged_template is None:
        return {}
    assert config.rollouts is not None
    limits = [config.train.max_tokens_per_microbatch, _context_length(source, config)]
    most = min(limit for limit in limits if limit is not None) - config.rollouts.longest_sequence(0)
    return {"privileged": config.algorithm.privileged_template, "max_privileged_tokens": most}


def _refuse_useless_data(config: Config, sets: _Sets[Prompt]) -> None:
    """Raise UserError for a curriculum in which no prompt comes up twice, and for temperatures of a teacher's rows."""
    assert config.rollouts is not None
    asked = prompts_asked(config, config.rollouts)
    if config.data.curriculum is not None and len(sets.shares) == 1 and asked <= len(sets.train):
        raise UserError(
            f"data.curriculum: has no effect here: data.train has {len(sets.train)} prompts, of which "
            f"{config.train.num_steps} steps need {asked} at most, so no prompt comes up twice; remove the key, or "
            "raise train.steps or rollouts.prompts_per_step."
        )
    if config.algorithm.kind in ("sampled_distillation", "self_distillation") and any(
        row.temperature is not None for row in sets.train
    ):
        raise UserError(
            f"data.train: column `temperature` is not for algorithm {config.algorithm.name}, whose teacher works at "
            "rollouts.temperature. Give the column another name, or leave it out."
        )


def _refuse_absent_metric(
    config: Config, specs: Sequence[RewardSpec], sets: Mapping[str, EvalSet], marking: Marking
) -> None:
    """Raise UserError if no evaluation has the metric for the best checkpoint."""
    if config.train.best_metric is None:
        return
    best = config.train.best_metric.removeprefix("-")
    of_sources = {name: sorted({f"{name}.{source}" for source in set_.sources.values()}) for name, set_ in sets.items()}
    parts = [part for name, names in of_sources.items() for part in (name, *names)]
    known = [f"eval/{part}/{metric}" for part in parts for metric in eval_metrics(config) if marking.gives(metric)]
    if best not in known and not best.startswith(tuple(f"eval/{name}" for name in config.eval.suites)):
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


def _offline(config: Config, source: str, tokenizer: Any, reading: Reading) -> tuple[Config, OfflineInputs]:
    load = FORMS[config.algorithm.kind][0]

    def load_rows(name: str, rows: Sequence[Row], first_id: int, reading: Reading) -> LoadedRows[OfflineRow]:
        with prefix_errors(name):
            loaded = load(rows, tokenizer, reading, first_id=first_id, **config.algorithm.row_options)
        if loaded.unusable:
            logger.warning("%s: %d of %d rows cannot be used and are left out", name, len(loaded.unusable), len(rows))
        return loaded

    sets = _read_sets(config, load_rows, reading, by_row=False)
    rows, held_out = sets.train, sets.held_out
    for name, group in {"data.train": rows, **{f"data.eval.{name}": group for name, group in held_out.items()}}.items():
        prompts = {row.token_ids[: row.prompt_tokens] for row in group if isinstance(row, Labelled)}
        if len(prompts) == 1 and config.algorithm.compares_with_divergence:
            raise UserError(
                f"{name}: all rows have the same prompt, but algorithm.loss kto compares answers to different prompts. "
                "Use bco or apo_zero."
            )
    longest = sets.longest(lambda row: row.longest, limit=max_sequence_tokens(config))
    _refuse_too_long(source, config, longest=longest, wanted=longest)
    return _with_steps(config, len(rows)), OfflineInputs(
        rows=rows,
        stream=sets.stream,
        shares=sets.shares,
        eval_sets=_held_out(config, sets, reading.images),
        unusable=sets.unusable,
        longest_sequence=longest,
    )


def _read_sets(
    config: Config,
    load: Callable[[str, Sequence[Row], int, Reading], LoadedRows[R]],
    reading: Reading,
    *,
    by_row: bool,
    with_id: Callable[[R, int], R] = lambda item, row_id: item,
) -> _Sets[R]:
    """Return all sets of a run. `load` gets a set's key, rows, first id and reading. by_row: ids count unusable rows
    too."""

    def read(name: str, source: DataSource, first_id: int) -> LoadedRows[R]:
        with prefix_errors(name):
            rows = read_rows(source_of(source), columns=config.data.columns, images=reading.images)
        _refuse_unknown_teachers(config, name, rows)
        return load(name, rows, first_id, reading)

    train: tuple[R, ...] = ()
    stream: WindowedStream[R] | None = None
    shares: list[MixtureShare] = []
    unusable: list[Unusable] = []
    if config.data.stream_window is not None:
        stream = _stream(config, config.data.stream_window, load, reading, with_id)
        train = stream.first
    else:
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
        stream=stream,
    )


def _stream(
    config: Config,
    window: int,
    load: Callable[[str, Sequence[Row], int, Reading], LoadedRows[R]],
    reading: Reading,
    with_id: Callable[[R, int], R],
) -> WindowedStream[R]:
    """Open the training sets as a stream, and read the first windows."""
    sets, reading = [], replace(reading, window=window)
    for name, section in train_sets(config).items():
        with prefix_errors(name):
            shards = open_shards(source_of(section.source), columns=config.data.columns, images=reading.images)
        load_set = partial(_load_window, config, load, name, reading)
        sets.append(WindowedSet(name=name, shards=shards, load=load_set, weight=section.weight))
    return WindowedStream(sets, seed=config.run.seed, shuffle=config.data.shuffle, window=window, with_id=with_id)


def _load_window(
    config: Config,
    load: Callable[[str, Sequence[Row], int, Reading], LoadedRows[R]],
    name: str,
    reading: Reading,
    rows: Sequence[Row],
) -> LoadedRows[R]:
    _refuse_unknown_teachers(config, name, rows)
    return load(name, rows, 0, reading)


def _refuse_unknown_teachers(config: Config, name: str, rows: Sequence[Row]) -> None:
    """Raise UserError for the first row whose column names no teacher. `name`: the key of the data set."""
    column, known = teacher_column(config), teachers(config)
    if column is None:
        return
    for row in rows:
        value = row.columns.get(column)
        if not isinstance(value, str) or value not in known:
            has = f"column `{column}` is {shown(value)}" if column in row.columns else f"has no column `{column}`"
            raise UserError(
                f"{name}: {row.place}: {has}, expected the name of the row's teacher: {', '.join(known)}. Correct the "
                "row, or add the teacher to `teacher`."
            )


def _with_steps(config: Config, rows: int) -> Config:
    """Return the configuration with epochs converted to steps. Raise UserError if a check of the steps then fails."""
    if config.train.epochs is None:
        return config
    converted = with_steps(config, rows)
    steps = converted.train.num_steps
    logger.info("train.epochs %g of %d rows: %d steps", config.train.epochs, rows, steps)
    refuse(problems(converted), lambda key: f"train.epochs is {config.train.epochs:g}, which makes {steps} steps")
    return converted


def collated(config: Config, rows: Sequence[OfflineRow], *, others: Sequence[OfflineRow] = ()) -> Examples | Pairs:
    """Collate rows of a data set into the batch type of the algorithm's workers.

    others: rows to compare with if all rows have the same prompt, as may happen in a step of streamed data.
    """
    algorithm = config.algorithm
    options: dict[str, Any] = {}
    if algorithm.kind == "unpaired":
        options = {"mismatched": algorithm.compares_with_divergence, "others": others}
    return FORMS[algorithm.kind][1](rows, **options)


def translated_sets(sets: Sequence[Sequence[OfflineRow]]) -> list[Examples]:
    """Return the data sets in the tokens of each row's teacher, or nothing without a teacher of another tokenizer.

    A row of a teacher with the policy's tokenizer keeps the policy's tokens.
    """
    examples = [[row for row in rows if isinstance(row, Example)] for rows in sets]
    if all(row.translated is None for rows in examples for row in rows):
        return []
    return [collate([row.translated or row for row in rows]) for rows in examples]


def _suites(source: str, config: Config) -> SuiteSpec | None:
    """Return the suites of a run's evaluations. None: there are none."""
    if not config.eval.suites:
        return None
    return SuiteSpec(
        names=tuple(dict.fromkeys(config.eval.suites)),
        limit=config.eval.suite_limit,
        data=config.eval.suite_data,
        seed=config.run.seed,
        tokenizer=config.policy.tokenizer_source,
        trust_remote_code=config.policy.trust_remote_code,
        template=chat_template(config),
        apply_chat_template=config.data.apply_chat_template,
        max_length=_context_length(source, config),
    )


def _context_length(source: str, config: Config) -> int | None:
    shape: Any = described_config(Path(source))
    if shape is None:
        shape = load_model_config(source, trust_remote_code=config.policy.trust_remote_code).get_text_config()
    limit: int | None = getattr(shape, "max_position_embeddings", None)  # BLOOM has none
    return limit


def _refuse_too_long(source: str, config: Config, *, longest: int, wanted: int) -> None:
    limit = _context_length(source, config)
    if limit is not None and wanted > limit:
        room = f" with rollouts.max_new_tokens {config.rollouts.max_new_tokens}" if config.rollouts else ""
        if config.rollouts and config.rollouts.environment is not None:
            room = f" in a conversation of rollouts.environment.max_tokens {wanted}"
        if config.rollouts and config.rollouts.agent is not None:
            room = f" in a call of rollouts.agent.max_tokens {wanted}"
        if config.data.stream_window is not None:
            key = "data.max_prompt_tokens" if config.rollouts else "data.max_sequence_tokens"
            raise UserError(
                f"policy.model {config.policy.model} takes at most {limit} tokens, and a row of streamed data may have "
                f"{longest} tokens{room}, which makes {wanted}. Lower {key}, or use a model with a longer context."
            )
        raise UserError(
            f"policy.model {config.policy.model} takes at most {limit} tokens, and the longest sequence of the data "
            f"({longest} tokens{room}) would have {wanted}. Shorten the data, or use a model with a longer context."
        )
