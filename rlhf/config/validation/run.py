"""Check the relations between sections, each in one place, before anything starts.

Fields check ranges of single values. Keys without effect are in rlhf.config.validation.unused_keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain

from rlhf.algorithms.distillation import DistillationConfig
from rlhf.algorithms.online_config import FollowedReferenceConfig, OnlineConfig
from rlhf.config import derive
from rlhf.config.derive import Derived
from rlhf.config.problem import Problem, problem
from rlhf.config.schema.model import RewardModelConfig, TrainedModelConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.validation.adapters import adapter_problems
from rlhf.config.validation.asynchrony import asynchrony_problems
from rlhf.config.validation.cluster import cluster_problems, rank_problems, transport_problems
from rlhf.config.validation.engine_args import draft_problems
from rlhf.config.validation.rewards import (
    comparison_problems,
    credit_problems,
    limit_problems,
    normalization_problems,
    reward_problems,
    secret_problems,
)
from rlhf.config.validation.rollouts import (
    agent_problems,
    centering_problems,
    group_problems,
    length_problems,
    loss_problems,
    replay_problems,
    self_taught_problems,
    support_problems,
)
from rlhf.config.validation.unused_keys import unused_keys
from rlhf.role_table import ROLES

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def problems(config: Config) -> tuple[Problem, ...]:
    facts, rollouts = derive.derive(config), config.rollouts
    player = (None, None) if rollouts is None else (rollouts.environment, rollouts.agent)
    return (
        *unused_keys(config),
        *_presence(config, facts),
        *_models(config),
        *reward_problems(config.rewards, config.reward, environment=player[0], agent=player[1]),
        *adapter_problems(config),
        *cluster_problems(config.cluster, facts.needs, with_reward_model=facts.uses_reward_model),
        *rank_problems(config, facts),
        *secret_problems(config.tracking.trackers, ("tracking", "trackers")),
        *normalization_problems(config),
        *comparison_problems(config),
        *credit_problems(config),
        *(_of_rollouts(config, rollouts, facts) if rollouts is not None and config.algorithm.is_online else ()),
        *_algorithm(config, facts),
        *_served_teacher(config),
        *_data_and_steps(config, facts),
        *_profile(config),
        *limit_problems(config.rewards, config.reward_policy),
    )


def _profile(config: Config) -> Iterator[Problem]:
    profile, last = config.tracking.profile, config.train.steps
    late = [step for step in profile.steps if last is not None and step > last] if profile is not None else []
    if late:
        yield problem("tracking.profile.steps", f"has {late[0]}, but the run ends after train.steps={last}")


def _presence(config: Config, facts: Derived) -> Iterator[Problem]:
    algorithm, train = config.algorithm, config.train
    if algorithm.is_online and config.rollouts is None:
        yield problem("rollouts", f"is missing: algorithm {algorithm.name} samples responses")
    if algorithm.is_online and not config.rewards and algorithm.needs_rewards:
        by = "algorithm.reward_coef" if algorithm.kind == "sampled_distillation" else f"algorithm {algorithm.name}"
        yield problem("rewards", f"is missing: {by} needs at least one reward")
    for role in facts.needs:
        is_absent = derive.ROLE_USES[role].model(config) is None and role not in derive.served_roles(config)
        if ROLES[role].kind == "frozen" and is_absent:
            yield problem(role, f"is missing: algorithm {algorithm.name} learns from a model; name it as {role}.model")
    if derive.has_named_teachers(config) and algorithm.has_teacher and derive.teacher_column(config) is None:
        text = f"is missing: teacher names {', '.join(derive.teachers(config))}; name the column with a row's teacher"
        yield problem("algorithm.teacher_column", text)
    if config.data.stream_window is not None:
        yield from _streamed(config)
    if config.data.train == {}:
        yield problem("data.train", "is an empty mapping; name the training data")
    if config.data.eval == {}:
        yield problem("data.eval", "is an empty mapping; name a held-out set, or write null")
    if train.steps is None and train.epochs is None:
        yield problem("train.steps", "is missing; give the run's steps, or train.epochs for passes over the data")
    elif train.steps is not None and train.epochs is not None:
        text = f"is {train.epochs:g}, but train.steps is {train.steps}; give one of them, and set the other to null"
        yield problem("train.epochs", text)
    best = train.best_metric
    if both := sorted({*config.eval.suites} & {*derive.eval_sets(config)}):
        yield problem("eval.suites", f"has {both[0]}, the name of a set in data.eval; rename the set")
    if best is not None and (sets := derive.eval_sets(config)):
        known = [f"eval/{name}/{metric}" for name in sets for metric in derive.eval_metrics(config)]
        of_a_source = config.eval.by is not None and re.fullmatch(r"-?eval/[A-Za-z0-9_.-]+/[A-Za-z0-9_.@-]+", best)
        of_a_suite = best.removeprefix("-").startswith(tuple(f"eval/{name}" for name in config.eval.suites))
        if best.removeprefix("-") not in known and not of_a_source and not of_a_suite:
            text = f"got {best!r}, expected a metric of an evaluation, with or without a leading `-`"
            yield problem("train.best_metric", f"{text}: {', '.join(known)}")


def _streamed(config: Config) -> Iterator[Problem]:
    """Yield keys that need all rows of data.train in memory."""
    if config.train.epochs is not None:
        text = "needs the number of rows, which is not known with data.stream_window; give train.steps instead"
        yield problem("train.epochs", text)
    if config.data.curriculum is not None:
        text = (
            "compares passes over the same prompts, and data.stream_window is for data that are too large for several "
            "passes; remove one of them"
        )
        yield problem("data.curriculum", text)
    if config.algorithm.kind == "distillation":
        text = f"is set, but the teacher of algorithm {config.algorithm.name} holds all rows; remove the key"
        yield problem("data.stream_window", text)


def _models(config: Config) -> Iterator[Problem]:
    """Yield names of stages in a run that is no stage, and revisions of models outside the hub."""
    text = "got {!r}, but this run is not a pipeline's stage; name a folder"
    for place, section in derive.model_sections(config).items():
        role = ".".join(place)
        models = section.models if isinstance(section, RewardModelConfig) else {"model": section}
        for key, named in models.items():
            if named.model.startswith("stage:"):
                yield problem(f"{role}.{key}", f"{text.format(named.model)} or a model of the hub")
        adapter = section.adapter if isinstance(section, TrainedModelConfig) else None
        if adapter is not None and adapter.startswith("stage:"):
            yield problem(f"{role}.adapter", text.format(adapter))
        is_on_hub = _HUB_NAME.fullmatch(section.model) and not os.path.exists(section.model)
        if section.revision is not None and not is_on_hub:
            why = f"is {section.revision}, but {role}.model is {section.model}, not a model of the hub; remove the key"
            yield problem(f"{role}.revision", why)


def _of_rollouts(config: Config, rollouts: RolloutsConfig, facts: Derived) -> Iterator[Problem]:
    yield from transport_problems(config.cluster)
    yield from draft_problems(config.cluster, rollouts)
    yield from _batch(config, rollouts, facts)
    checks = (
        *(asynchrony_problems, replay_problems, length_problems, group_problems, loss_problems, agent_problems),
        self_taught_problems,
        centering_problems,
        support_problems,
    )
    yield from chain.from_iterable(check(config, rollouts) for check in checks)


def _batch(config: Config, rollouts: RolloutsConfig, facts: Derived) -> Iterator[Problem]:
    algorithm, size, rows = config.algorithm, config.train.sequences_per_update, facts.rows_per_step
    if algorithm.kind == "sampled_pairs":
        counted, available = f"rollouts.prompts_per_step = {rows}", f"{rows} pairs, one per prompt"
    else:
        trained, key = derive.trained_per_prompt(config, rollouts)
        counted = f"rollouts.prompts_per_step * {key} = {rollouts.prompts_per_step} * {trained} = {rows}"
        available = f"{counted} responses"
    if size > rows:
        text = (
            f"is {size}, but a step has only {available}; lower it, or raise rollouts.prompts_per_step or "
            "samples_per_prompt"
        )
        yield problem("train.sequences_per_update", text)
    elif rows % size:
        fits = max(n for n in range(1, size) if rows % n == 0)
        yield problem("train.sequences_per_update", f"is {size} and must divide {counted}; {fits} would fit")
    if algorithm.compares_responses and rollouts.samples_per_prompt < 2:
        by = "algorithm.reward_coef" if algorithm.distils_rollouts else algorithm.name
        text = f"is {rollouts.samples_per_prompt}, but {by} compares the responses to one prompt; set 2 or more"
        yield problem("rollouts.samples_per_prompt", text)


def _algorithm(config: Config, facts: Derived) -> Iterator[Problem]:
    algorithm, rows = config.algorithm, facts.rows_per_step
    if isinstance(algorithm, OnlineConfig) and config.rollouts is not None:
        correction, adaptive = algorithm.correction, algorithm.kl.adaptive
        if correction is not None and not correction.rejects:
            if correction.mode == "decoupled" and correction.weights is None and algorithm.first_correction is not None:
                text = (
                    f"corrects nothing; give {algorithm.first_correction}, or another preset, weights, mode or reject"
                )
                yield problem("algorithm.correction", text)
            if correction.mode == "bypass" and not algorithm.has_ratio:
                text = (
                    f"is bypass, but algorithm {algorithm.name} has no importance ratio, so bypass would change nothing"
                )
                yield problem("algorithm.correction.mode", f"{text}; set policy_gradient and choose weights, or reject")
        has_own_loss = algorithm.has_ratio and not algorithm.off_policy_keys  # no key says that the loss is replaced
        if correction is not None and correction.mode == "policy_gradient" and has_own_loss:
            text = f"is policy_gradient, which replaces the loss of algorithm {algorithm.name}"
            fits = "bypass" if correction.weights is None else "decoupled"  # bypass has no weights
            yield problem("algorithm.correction.mode", f"{text}; set {fits}, or use grpo")
        # adaptive_kl_coef lowers the coefficient by at most 0.2 * rows / horizon of it
        if adaptive is not None and algorithm.kl.coef > 0.0 and 5 * adaptive.horizon <= rows:
            lowers = f"a step of {rows} responses can lower the coefficient by {0.2 * rows / adaptive.horizon:.0%}"
            text = f"is {adaptive.horizon}, but {lowers}, to 0 or below; set {rows // 5 + 1} or more"
            yield problem("algorithm.kl.adaptive.horizon", text)
    if isinstance(algorithm, FollowedReferenceConfig) and algorithm.reference_every and config.policy.lora is not None:
        why = "a policy with policy.lora is exported as an adapter only, which no reference can become"
        fix = "set it to null, or train all weights"
        yield problem("algorithm.reference_every", f"is {algorithm.reference_every}, but {why}; {fix}")


def _served_teacher(config: Config) -> Iterator[Problem]:
    """Yield settings for which a server's log-probabilities of single tokens at temperature 1 are not enough."""
    algorithm, teachers = config.algorithm, derive.teachers(config)
    if not derive.is_served(config) or not algorithm.has_teacher:
        return
    if held := [name for name, teacher in teachers.items() if teacher.url is None]:
        text = "is null, but another teacher has a url; give each teacher a url, or none"
        yield problem(f"teacher.{held[0]}.url", text)
    if derive.reads_teacher_heads(config):
        text = (
            "is null, but the server of a teacher (teacher.url) returns only the likeliest tokens; set the key, for "
            "example to 64"
        )
        also = "" if config.rollouts is None else ", or set algorithm.divergence to sampled_reverse_kl"
        yield problem("algorithm.top_k", f"{text}{also}")
    rule = "the server of a teacher (teacher.url) returns log-probabilities at temperature 1"
    found = {"rollouts.temperature": 1.0 if config.rollouts is None else config.rollouts.temperature}
    if isinstance(algorithm, DistillationConfig):
        found["algorithm.temperature"] = algorithm.temperature
    if config.rollouts is not None and config.eval.temperature != 0.0 and derive.eval_sets(config):
        found["eval.temperature"] = config.eval.temperature
    for key, temperature in found.items():
        if temperature != 1.0:
            yield problem(key, f"is {temperature:g}, but {rule}; set 1.0")


def _data_and_steps(config: Config, facts: Derived) -> Iterator[Problem]:
    """Yield limits on rows that no row can meet, and schedules too long for the run."""
    data, train, settings = config.data, config.train, config.eval
    count = derive.sequences_per_row(config)
    fits = train.max_tokens_per_microbatch // count
    if not config.algorithm.is_online and data.max_sequence_tokens is not None and data.max_sequence_tokens > fits:
        whole = "a sequence" if count == 1 else f"the {count} sequences of a row"
        rule = f"train.max_tokens_per_microbatch = {train.max_tokens_per_microbatch} holds {whole}"
        text = (
            f"is {data.max_sequence_tokens} and must be at most {fits}: {rule}; lower max_sequence_tokens, or raise "
            "max_tokens_per_microbatch"
        )
        yield problem("data.max_sequence_tokens", text)
    if data.too_long == "skip" and data.max_unusable_fraction == 0.0:
        text = "is skip, but data.max_unusable_fraction is 0: no row may be skipped; raise it, or set error or cut"
        yield problem("data.too_long", text)
    if config.algorithm.is_online and settings.k is not None and max(settings.k) > settings.samples_per_prompt:
        text = f"has {max(settings.k)}, but eval.samples_per_prompt is {settings.samples_per_prompt}"
        yield problem("eval.k", f"{text}; raise it, or lower k")
    if facts.rows_per_step % train.sequences_per_update == 0 and train.steps is not None:
        total = derive.policy_optimizer_steps(config)
        if train.warmup_steps >= max(total, 1):
            text = f"is {train.warmup_steps} and must be below the run's {total} optimizer steps, or lr is not reached"
            yield problem("train.warmup_steps", text)
