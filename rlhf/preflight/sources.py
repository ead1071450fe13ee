"""Load data sources, rewards and the tiny model for runs and evaluations, and name the key of an error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config.derive import (
    eval_sets,
    max_sequence_tokens,
    teacher_column,
    teacher_keys,
    teachers,
    uses_reward_model,
)
from rlhf.config.files.dump import dump_yaml
from rlhf.config.schema.data import OF_IMAGES, PromptFormat
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.schema.rewards import CriterionConfig, RewardConfig, functions_of_rubric
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import run_folder
from rlhf.config.schema.train import Grading
from rlhf.config.yaml_tree import from_yaml
from rlhf.data.examples import Reading
from rlhf.data.images import RowImages
from rlhf.data.row import Row, shown
from rlhf.data.templates import read_template
from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama, describe_tiny_llama
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.rewards.loading import MAX_DEPTH, check_columns, is_nested_too_deep, load_reward
from rlhf.rewards.scoring import RewardSpec
from rlhf.rewards.services.client import ServiceSpec
from rlhf.rewards.services.judge import Criterion, JudgeSpec, read_rubric
from rlhf.rewards.services.remote import RemoteReward
from rlhf.tracking.logs import redact_config
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.tracking.sinks.installed import InstalledTracker, TrackedRun, installed_tracker, passed_tracker
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore
from rlhf.vision.thumbnails import thumbnail
from rlhf.workers.frozen.served_model import MAX_ANSWER_BYTES, ServedModel

TINY = "tiny:llama"
REWARD_KEY = "rewards.{}.function"
SAMPLING = ("max_new_tokens", "stop", "stop_token_ids", "environment", "agent")  # of rollouts and of an evaluation
MOST_SHOWN = 5  # values of a column shown in a message


_OPTIONS = (
    (re.compile(r"data\.columns: \{(\w+): (\w+)\}"), r"--column \1=\2"),
    (re.compile(r"data\.columns\.(\w+) names"), r"--column \1 names"),
    (re.compile(r"data\.columns"), "--column"),
    (re.compile(r"data\.chat_template_kwargs"), "--chat-template-kwargs"),
    (re.compile(r"data\.system_prompt"), "--system-prompt"),
    (re.compile(r"data\.apply_chat_template: false"), "--no-apply-chat-template"),
    (re.compile(r"data\.chat_template\b"), "--chat-template"),
)


@contextmanager
def in_options() -> Iterator[None]:
    """Replace the configuration keys in messages about data by the options of a command."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, option in _OPTIONS:
            text = key.sub(option, text)
        raise UserError(text) from error


def local_model(name: str, folder: Path, *, seed: int, weights: bool = True) -> str:
    """Return the name; for tiny:KIND, return a folder of that seed, created below `folder` if missing.

    weights: whether the folder of tiny:llama gets weights. Without weights the folder serves only the checks before a
    run. Raise UserError for an unknown kind.
    """
    prefix, _, kind = name.partition(":")
    if prefix != "tiny":
        return name
    if name != TINY:
        if kind not in KINDS:
            raise UserError(
                f"{name} is not the name of a tiny model. Use {TINY}, or a tiny vision model: "
                f"tiny:{', tiny:'.join(KINDS)}."
            )
        return str(build_tiny_vision(folder / "models" / f"tiny-{kind}-{seed}", kind, seed=seed))
    if not weights:
        return str(describe_tiny_llama(folder / "models" / "tiny-llama"))
    return str(build_tiny_llama(folder / "models" / f"tiny-llama-{seed}", seed=seed))


def as_evaluation(config: Config) -> EvaluateConfig:
    """Return the evaluations of a training run as the section of an evaluation stage."""
    data, rollouts, settings = config.data, config.rollouts, config.eval
    sampling = {} if rollouts is None else {key: getattr(rollouts, key) for key in SAMPLING}
    return EvaluateConfig.model_construct(
        model=config.policy.source,
        dtype=config.policy.dtype,
        trust_remote_code=config.policy.trust_remote_code,
        data=dict(eval_sets(config)),
        rewards=config.rewards,
        reward=config.reward.as_loaded() if config.reward is not None and uses_reward_model(config) else None,
        reward_policy=config.reward_policy,
        max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
        **{key: getattr(data, key) for key in PromptFormat.model_fields},
        **{key: getattr(settings, key) for key in Grading.model_fields},
        **sampling,
    )


def with_template(config: Config) -> Config:
    """Return the run with the text of the chat template in place of the file's name."""
    if config.data.chat_template is None:
        return config
    text = read_template(config.data.chat_template, key="data.chat_template")
    return config.model_copy(update={"data": config.data.model_copy(update={"chat_template": text})})


def row_images(model: str, folder: Path, settings: PromptFormat) -> RowImages | None:
    """Return the reader of images for a model's folder or name. None: the model reads only text.

    folder: where the store of images is, created with the first image.
    """
    processing = ImageProcessing.of_model(model)
    if processing is None:
        return None
    limits = ImageLimits(
        max_images=settings.max_images, max_pixels=settings.max_image_pixels, hosts=settings.image_hosts
    )
    return RowImages(processing, ImageCollector(ImageStore(folder.absolute()), limits))


def refuse_image_keys(settings: PromptFormat, images: RowImages | None, *, section: str, model: str) -> None:
    """Raise UserError for a key of images with a value of the user, if the model reads only text."""
    for name, field in PromptFormat.model_fields.items() if images is None else ():
        if OF_IMAGES in field.metadata and getattr(settings, name) != field.default:
            raise UserError(
                f"{section}.{name}: has no effect here: {model} reads only text. Remove the key, or name a model with "
                "a vision tower."
            )


def refuse_absent_tokens(token_ids: Sequence[int], tokenizer: Any, *, key: str) -> None:
    known = tokenizer.get_vocab().values() if token_ids else ()
    for token in token_ids:
        if token not in known:
            raise UserError(
                f"{key}: {token} is not a token of {tokenizer.name_or_path}, whose ids go from {min(known)} to "
                f"{max(known)}. Name one of these tokens."
            )


def reading_of(config: Config) -> Reading:
    """Return the settings for reading prompts or examples of a run."""
    data = config.data
    return Reading(
        system_prompt=data.system_prompt,
        apply_chat_template=data.apply_chat_template,
        max_tokens=data.max_prompt_tokens if config.algorithm.is_online else max_sequence_tokens(config),
        too_long=data.too_long,
        max_unusable_fraction=data.max_unusable_fraction,
        max_new_tokens=None if config.rollouts is None else config.rollouts.max_new_tokens,
        max_given_tokens=config.train.max_tokens_per_microbatch if config.algorithm.reads_given_responses else None,
        needs_given=config.algorithm.needs_given_responses,
        teacher_column=teacher_column(config),
    )


def load_rewards(
    rewards: Mapping[str, RewardConfig], *, beside: Path, memory_gib: float, key: str = REWARD_KEY
) -> tuple[RewardSpec, ...]:
    """Load the rewards. Imports functions once in a separate process, and reads the tokens of services.

    beside: the folder searched for the files of rewards before the current folder. key: a reward's name in messages.
    """
    given: dict[str, Any] = {"folders": (beside, Path.cwd()), "memory_gib": memory_gib}
    specs = []
    for name, reward in rewards.items():
        function = None
        if reward.function is not None:
            function = load_reward(reward.function, args=reward.args, key=key.format(name), **given)
        place = f"{_section(key, name)}.judge.rubric"
        specs.append(
            RewardSpec(
                name=name,
                weight=reward.weight,
                function=function,
                remote=_remote(reward, key=_section(key, name)),
                criteria={
                    criterion: load_reward(str(item.function), args=item.args, key=f"{place}.{criterion}", **given)
                    for criterion, item in functions_of_rubric(reward).items()
                },
                gate=reward.gate,
                only=reward.only,
                from_environment=reward.environment,
                truncated_score=reward.truncated_score,
                by_step=reward.credit == "step",
                on_error=reward.on_error,
            )
        )
    return tuple(specs)


def tracked_run(stage: Config | EvaluationStage, *, done_steps: int | None) -> TrackedRun:
    """Return what trackers and callbacks learn of a run at the start."""
    config = redact_config(from_yaml(dump_yaml(stage)))
    folder = run_folder(stage)
    image_of = partial(thumbnail, images_folder(folder))
    return TrackedRun(name=stage.run.name, folder=folder, config=config, done_steps=done_steps, image_of=image_of)


def installed_trackers(
    stage: Config | EvaluationStage, passed: Sequence[Any] = (), *, done_steps: int | None = None
) -> list[InstalledTracker]:
    """Return the trackers of packages named by a stage, and the passed objects, without constructing any. UserError: an
    unusable tracker."""
    run = tracked_run(stage, done_steps=done_steps)
    installed = [installed_tracker(name, args, run) for name, args in stage.tracking.trackers.items()]
    return installed + [passed_tracker(value, run, index=index) for index, value in enumerate(passed)]


def _section(key: str, name: str) -> str:
    """Return the key of a reward from the key of the reward's function."""
    return key.format(name).removesuffix(".function")


def _remote(reward: RewardConfig, *, key: str) -> RemoteReward | None:
    """Return the remote service of a reward, if any. Raise UserError if the environment lacks the service's token."""
    if reward.url is None:
        return None
    judge, token = reward.judge, _token(reward.token_env, key=key)
    return RemoteReward(
        service=ServiceSpec(url=reward.url, token=token, **dict(reward.http)),
        judge=None if judge is None else JudgeSpec(**(dict(judge) | {"rubric": _rubric(judge.rubric)})),
    )


def served_models(config: Config) -> dict[str, ServedModel]:
    """Return the teachers behind URLs by name. Raise UserError if the environment lacks a server's token."""
    models = {}
    for name, teacher in teachers(config).items():
        if teacher.url is not None:
            key = ".".join(teacher_keys(config)[name])
            limits = dict(teacher.http) | {"max_answer_bytes": MAX_ANSWER_BYTES}
            service = ServiceSpec(url=teacher.url, token=_token(teacher.token_env, key=key), **limits)
            models[name] = ServedModel(service=service, name=teacher.model)
    return models


def _token(variable: str | None, *, key: str) -> str | None:
    token = None if variable is None else os.environ.get(variable, "")
    if token is not None and not (token.isascii() and token.isprintable() and token):
        problem = "is not set" if not token else "holds more than plain text"
        raise UserError(f"{key}.token_env: the environment variable {variable} {problem}; export the token")
    return token


def _rubric(rubric: Mapping[str, CriterionConfig] | str | None) -> Mapping[str, Criterion] | str | None:
    if rubric is None or isinstance(rubric, str):
        return rubric
    return {name: Criterion(text=item.criterion, weight=item.weight, scale=item.scale) for name, item in rubric.items()}


def check_rewards(
    specs: Sequence[RewardSpec],
    rows: Sequence[Row],
    data: str,
    *,
    key: str = REWARD_KEY,
    of_sessions: Sequence[str] = (),
) -> None:
    """Raise UserError if a row has no reward, or if an applicable reward lacks a column or the gate.

    Args: `of_sessions` are columns that rewards get from an agent's session, besides the columns of the rows.
    """
    given = [{name: value for name, value in row.columns.items() if name != "prompt"} for row in rows]
    deep = next((row for row, columns in zip(rows, given, strict=True) if is_nested_too_deep(columns)), None)
    if deep is not None:
        raise UserError(f"{deep.place}: its columns are nested deeper than {MAX_DEPTH} levels; flatten them")
    applies = {spec.name: [spec.applies_to(columns) for columns in given] for spec in specs}
    for spec in specs:
        section = _section(key, spec.name)
        if spec.gate is not None:
            pairs = zip(rows, applies[spec.name], applies[spec.gate], strict=True)
            row = next((row for row, here, gated in pairs if here and not gated), None)
            if row is not None:
                raise UserError(
                    f"{section}.gate: {spec.gate} does not apply to {row.place}, and {spec.name} does; "
                    f"widen {_section(key, spec.gate)}.only to all rows of {section}.only"
                )
        mine = [columns for columns, here in zip(given, applies[spec.name], strict=True) if here]
        if not mine:
            continue
        common = [*sorted(set(mine[0]).intersection(*mine)), *of_sessions]
        for name, function in spec.functions.items():
            place = f"{section}.judge.rubric.{name.removeprefix(f'{spec.name}/')}.function"
            check_columns(function, common, key=key.format(spec.name) if spec.function else place, data=data)
        if spec.remote is not None:
            _check_sent(spec.remote, rows, given, applies[spec.name], common, key=section, data=data)
    for row, *here in zip(rows, *applies.values(), strict=True):
        if specs and not any(here):  # a run with a teacher may have no rewards
            columns = ", ".join(dict.fromkeys(f"`{name}`" for spec in specs for name in spec.only))
            raise UserError(f"{row.place}: no reward applies to the row, by {columns}; widen a reward's `only`")


def _check_sent(
    remote: RemoteReward,
    rows: Sequence[Row],
    given: Sequence[Mapping[str, Any]],
    applies: Sequence[bool],
    common: Sequence[str],
    *,
    key: str,
    data: str,
) -> None:
    """Raise UserError if a service's request lacks data from the rows, or the data cannot be written as JSON."""
    wanted = None if remote.judge is None else remote.judge.columns
    missing = [name for name in wanted or () if name not in common]
    if missing:
        names = ", ".join(f"{{{name}}}" for name in missing)
        raise UserError(
            f"{key}.judge: names {names}, and the rows of {data} have {', '.join(common) or 'no other columns'}. Add "
            "the column to the data, or map another column to this name with data.columns"
        )
    for row, columns, here in zip(rows, given, applies, strict=True):
        sent = columns if wanted is None else {name: columns.get(name) for name in wanted if here}
        try:
            json.dumps(sent if here else None, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{row.place}: cannot be sent to {key} as JSON: {error}") from error
        if here and remote.judge is not None and isinstance(column := remote.judge.rubric, str):
            try:
                read_rubric(columns[column])
            except ValueError as error:
                raise UserError(f"{row.place}: column `{column}`, the rubric of {key}, {error}") from error


def refuse_unused_rewards(
    specs: Sequence[RewardSpec], rows: Iterable[Mapping[str, Any]], *, key: str = REWARD_KEY
) -> None:
    """Raise UserError for a reward that applies to no training row."""
    idle = {spec.name: spec for spec in specs if spec.only}
    seen_values: dict[str, dict[str, None]] = {name: {} for spec in idle.values() for name in spec.only}
    for columns in rows if idle else ():
        idle = {name: spec for name, spec in idle.items() if not spec.applies_to(columns)}
        for name, values in seen_values.items():
            if len(values) < MOST_SHOWN and name in columns:
                values[shown(columns[name])] = None
        if not idle:
            return
    for spec in idle.values():
        has = "; ".join(
            f"`{name}` is {', '.join(seen_values[name])}{', ...' if len(seen_values[name]) == MOST_SHOWN else ''}"
            if seen_values[name]
            else f"there is no column `{name}`"
            for name in spec.only
        )
        raise UserError(f"{_section(key, spec.name)}.only: applies to no row of the training data, where {has}")
