"""Check the relations between sections, each in one place, before anything starts.

Fields check ranges of single values. Keys without effect are in rlhf.config.validation.unused_keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from rlhf.algorithms.correction import CorrectionConfig
from rlhf.algorithms.online_config import FollowedReferenceConfig, OnlineConfig
from rlhf.config import derive
from rlhf.config.mistakes.explain import Problem, problem
from rlhf.config.schema.cluster import ClusterConfig, EngineRange, TrainedResources
from rlhf.config.schema.model import CriticConfig, ModelConfig, PolicyConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.validation.adapters import adapter_problems
from rlhf.config.validation.asynchrony import asynchrony_problems
from rlhf.config.validation.engine_args import draft_problems, engine_argument_problems
from rlhf.config.validation.rewards import (
    credit_problems,
    limit_problems,
    normalization_problems,
    reward_problems,
    secret_problems,
)
from rlhf.config.validation.rollouts import (
    agent_problems,
    group_problems,
    length_problems,
    loss_problems,
    replay_problems,
)
from rlhf.config.validation.unused_keys import unused
from rlhf.role_table import MODEL_SECTIONS, ROLES, TRAINED_ROLES, Role

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def problems(config: Config) -> tuple[Problem, ...]:
    """Return all problems of one run's configuration. Without problems, the run can start."""
    rollouts = config.rollouts
    environment, agent = (None, None) if rollouts is None else (rollouts.environment, rollouts.agent)
    result = [*unused(config), *_presence(config)]
    result += reward_problems(config.rewards, config.reward, environment=environment, agent=agent)
    result += [
        *_revisions(config),
        *adapter_problems(config),
        *_cluster(config),
        *secret_problems(config.tracking.trackers, ("tracking", "trackers")),
        *normalization_problems(config),
        *credit_problems(config),
    ]
    if not config.algorithm.is_online:
        result += _offline(config)
    elif config.rollouts is not None:
        result += [*_batch(config, config.rollouts), *group_problems(config, config.rollouts), *_algorithm(config)]
        result += [*loss_problems(config, config.rollouts), *agent_problems(config, config.rollouts)]
    if config.data.too_long == "skip" and config.data.max_unusable_fraction == 0.0:
        text = "is skip, but data.max_unusable_fraction is 0: no row may be skipped; raise it, or set error or cut"
        result.append(problem("data.too_long", text))
    result += [*_updates(config), *_evaluation(config), *limit_problems(config.rewards, config.reward_policy)]
    return tuple(result)


def _presence(config: Config) -> Iterator[Problem]:
    """Yield missing sections and roles."""
    name = config.algorithm.name
    if config.algorithm.is_online:
        if config.rollouts is None:
            yield problem("rollouts", f"is missing: algorithm {name} samples responses")
        if not config.rewards and config.algorithm.needs_rewards:
            by = "algorithm.reward_coef" if config.algorithm.kind == "sampled_distillation" else f"algorithm {name}"
            yield problem("rewards", f"is missing: {by} needs at least one reward")
    for role in derive.needs(config):
        if ROLES[role].kind == "frozen" and derive.ROLE_USES[role].model(config) is None:
            text = f"is missing: algorithm {config.algorithm.name} learns from a model; name it as {role}.model"
            yield problem(role, text)
    if config.data.train == {}:
        yield problem("data.train", "is an empty mapping; name the training data")
    if config.data.eval == {}:
        yield problem("data.eval", "is an empty mapping; name a held-out set, or write null")
    train = config.train
    if train.steps is None and train.epochs is None:
        yield problem("train.steps", "is missing; give the run's steps, or train.epochs for passes over the data")
    elif train.steps is not None and train.epochs is not None:
        text = f"is {train.epochs:g}, but train.steps is {train.steps}; give one of them, and set the other to null"
        yield problem("train.epochs", text)
    best = train.best_metric
    sets = derive.eval_sets(config)
    known = [f"eval/{name}/{metric}" for name in sets for metric in derive.eval_metrics(config)]
    of_a_source = config.eval.by is not None and re.fullmatch(r"-?eval/[A-Za-z0-9_.-]+/[A-Za-z0-9_.@-]+", best or "")
    if best is not None and sets and best.removeprefix("-") not in known and not of_a_source:
        text = f"got {best!r}, expected a metric of an evaluation, with or without a leading `-`: {', '.join(known)}"
        yield problem("train.best_metric", text)
    for field in MODEL_SECTIONS:
        section = getattr(config, field)
        if section is not None and section.model.startswith("stage:"):
            text = f"got {section.model!r}, but this run is not a pipeline's stage; name a folder or a model of the hub"
            yield problem(f"{field}.model", text)
        adapter = section.adapter if isinstance(section, PolicyConfig | CriticConfig) else None
        if adapter is not None and adapter.startswith("stage:"):
            yield problem(f"{field}.adapter", f"got {adapter!r}, but this run is not a pipeline's stage; name a folder")


def _revisions(config: Config) -> Iterator[Problem]:
    """Yield revisions of models outside the hub."""
    for role in MODEL_SECTIONS:
        section: ModelConfig | None = getattr(config, role)
        if section is None or section.revision is None:
            continue
        if not _HUB_NAME.fullmatch(section.model) or Path(section.model).exists():
            text = f"is {section.revision}, but {role}.model is {section.model}, not a model of the hub; remove it"
            yield problem(f"{role}.revision", text)


def _batch(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield problems in the arithmetic of a batch of rollouts."""
    train, samples = config.train, rollouts.samples_per_prompt
    rows = derive.rows_per_step(config, rollouts)
    if config.algorithm.kind == "sampled_pairs":
        counted, available = f"rollouts.prompts_per_step = {rows}", f"{rows} pairs, one per prompt"
    else:
        product = f"{rollouts.prompts_per_step} * {derive.trained_per_prompt(config, rollouts)} = {rows}"
        counted = f"rollouts.prompts_per_step * {derive.trained_key(config, rollouts)} = {product}"
        available = f"{counted} responses"
    if train.sequences_per_update > rows:
        text = f"is {train.sequences_per_update}, but a step has only {available}; lower it, or sample more"
        yield problem("train.sequences_per_update", text)
    elif rows % train.sequences_per_update:
        fits = max(n for n in range(1, train.sequences_per_update) if rows % n == 0)
        text = f"is {train.sequences_per_update} and must divide {counted}; {fits} would fit"
        yield problem("train.sequences_per_update", text)
    yield from asynchrony_problems(config, rollouts)
    yield from replay_problems(config, rollouts)
    yield from draft_problems(config.cluster, rollouts)
    yield from length_problems(config, rollouts)
    if config.algorithm.compares_responses and samples < 2:
        by = "algorithm.reward_coef" if config.algorithm.kind == "sampled_distillation" else config.algorithm.name
        text = f"is {samples}, but {by} compares the responses to one prompt; set 2 or more"
        yield problem("rollouts.samples_per_prompt", text)


def _algorithm(config: Config) -> Iterator[Problem]:
    """Yield contradictory keys of an algorithm with rollouts."""
    algorithm = config.algorithm
    if isinstance(algorithm, OnlineConfig) and algorithm.correction is not None:
        yield from _correction(config, algorithm, algorithm.correction)
    if isinstance(algorithm, OnlineConfig) and algorithm.kl.adaptive is not None and algorithm.kl.coef == 0.0:
        text = "multiplies algorithm.kl.coef, which is 0 and stays 0; give it a positive initial value"
        yield problem("algorithm.kl.adaptive", text)
    if isinstance(algorithm, OnlineConfig) and algorithm.kl.adaptive is not None and config.rollouts is not None:
        horizon, rows = algorithm.kl.adaptive.horizon, derive.rows_per_step(config, config.rollouts)
        if 5 * horizon <= rows:  # adaptive_kl_coef lowers the coefficient by at most 0.2 * rows / horizon of it
            text = (
                f"is {horizon}, but a step of {rows} responses can lower the coefficient by {0.2 * rows / horizon:.0%},"
                f" to 0 or below; set {rows // 5 + 1} or more"
            )
            yield problem("algorithm.kl.adaptive.horizon", text)
    if isinstance(algorithm, FollowedReferenceConfig) and algorithm.reference_every and config.policy.lora is not None:
        text = (
            f"is {algorithm.reference_every}, but a policy with policy.lora is exported as an adapter only, which no "
            "reference can become; set it to null, or train all weights"
        )
        yield problem("algorithm.reference_every", text)


def _correction(config: Config, algorithm: OnlineConfig, correction: CorrectionConfig) -> Iterator[Problem]:
    """Yield a correction without effect, or with a duplicate effect."""
    if correction.mode == "decoupled" and correction.weights is None and not correction.rejects:
        text = "corrects nothing: name a preset (token_tis is a good first one), choose weights or a mode, or reject"
        yield problem("algorithm.correction", text)
    if correction.mode == "bypass" and not algorithm.off_policy_keys and not correction.rejects:
        text = (
            f"is bypass, but algorithm {config.algorithm.name} has no importance ratio that it would act on; set "
            "policy_gradient and choose weights, or reject"
        )
        yield problem("algorithm.correction.mode", text)
    elif correction.mode == "bypass" and correction.weights is not None:
        text = (
            f"is {correction.weights}, but with mode bypass the clipped ratio already compares policy and sampler: "
            "weights would count it twice; set null, or mode policy_gradient"
        )
        yield problem("algorithm.correction.weights", text)


def _offline(config: Config) -> Iterator[Problem]:
    """Yield problems with the limits on fixed examples."""
    data, train = config.data, config.train
    count = derive.sequences_per_row(config)
    if data.max_sequence_tokens is not None and count * data.max_sequence_tokens > train.max_tokens_per_microbatch:
        whole = "a sequence" if count == 1 else f"the {count} sequences of a row"
        text = (
            f"is {data.max_sequence_tokens} and must be at most {train.max_tokens_per_microbatch // count}: "
            f"train.max_tokens_per_microbatch = {train.max_tokens_per_microbatch} holds {whole}; lower it, or "
            "raise that"
        )
        yield problem("data.max_sequence_tokens", text)


def _evaluation(config: Config) -> Iterator[Problem]:
    """Yield problems with settings of evaluations by responses."""
    settings = config.eval
    if config.algorithm.is_online and settings.k is not None and max(settings.k) > settings.samples_per_prompt:
        samples = settings.samples_per_prompt
        text = f"has {max(settings.k)}, but eval.samples_per_prompt is {samples}; raise it, or lower k"
        yield problem("eval.k", text)


def _updates(config: Config) -> Iterator[Problem]:
    """Yield problems with the optimizer's schedule and ranks."""
    train = config.train
    for role in TRAINED_ROLES:
        if role not in derive.needs(config):
            continue
        section: TrainedResources = getattr(config.cluster.roles, role)
        if section.workers % section.sequence_parallel:
            text = (
                f"is {section.sequence_parallel} and must divide cluster.roles.{role}.workers = {section.workers}: "
                "that many ranks share each micro-batch"
            )
            yield problem(f"cluster.roles.{role}.sequence_parallel", text)
            continue
        ranks = section.data_parallel_ranks
        if train.sequences_per_update < ranks:
            text = (
                f"is {train.sequences_per_update}, but {ranks} data-parallel ranks of cluster.roles.{role} need at"
                " least one sequence each in every optimizer step; raise it, or lower the workers"
            )
            yield problem("train.sequences_per_update", text)
    if train.warmup_steps and train.warmup_ratio:
        text = f"is {train.warmup_ratio:g}, but train.warmup_steps is {train.warmup_steps}; give one of them"
        yield problem("train.warmup_ratio", text)
    rows = derive.rows_per_step(config, config.rollouts) if config.rollouts else train.sequences_per_update
    if rows % train.sequences_per_update == 0 and train.steps is not None:
        total = derive.policy_optimizer_steps(config)
        if train.warmup_steps >= max(total, 1):
            text = f"is {train.warmup_steps} and must be below the run's {total} optimizer steps, or lr is not reached"
            yield problem("train.warmup_steps", text)


def _cluster(config: Config) -> Iterator[Problem]:
    """Yield problems with devices, colocation and the weight transport."""
    cluster, roles = config.cluster, config.cluster.roles
    needed = derive.needs(config)
    yield from cluster_problems(cluster, needed, with_reward_model=derive.uses_reward_model(config))
    for role in TRAINED_ROLES:
        if role not in needed:
            continue
        section: TrainedResources = getattr(roles, role)
        if config.train.optimizer in ("adafactor", "muon") and section.zero_stage != 0:
            text = (
                f"is {section.zero_stage}, but train.optimizer {config.train.optimizer} needs whole matrices, which "
                "DeepSpeed cuts up from stage 1 on; set 0, or use adamw or adamw_8bit"
            )
            yield problem(f"cluster.roles.{role}.zero_stage", text)
        if cluster.device == "cpu" and section.offload:
            text = f"is {list(section.offload)}, but with cluster.device cpu all is in host memory already; remove it"
            yield problem(f"cluster.roles.{role}.offload", text)
        elif section.offload and section.zero_stage == 0:
            text = f"is {list(section.offload)}, but DeepSpeed offloads nothing at stage 0; set zero_stage or remove it"
            yield problem(f"cluster.roles.{role}.offload", text)
        elif "parameters" in section.offload and section.zero_stage != 3:
            text = f"has `parameters`, which needs cluster.roles.{role}.zero_stage 3, not {section.zero_stage}"
            yield problem(f"cluster.roles.{role}.offload", text)
    if "rollout" not in needed:
        return
    yield from _turns(config)
    yield from _weight_sync(config)


def cluster_problems(cluster: ClusterConfig, needed: Collection[Role], *, with_reward_model: bool) -> Iterator[Problem]:
    """Yield problems with the address, colocated roles and engines, for any kind of run."""
    if cluster.address == "local":
        yield problem("cluster.address", "is local; a Ray that is started for this run is written null")
    yield from _guests(cluster, needed)
    if "rollout" not in needed:
        return
    yield from engine_argument_problems(cluster)
    engine = cluster.roles.rollout
    if cluster.device == "cpu" and engine.tensor_parallel > 1:
        text = f"is {engine.tensor_parallel}, but tensor parallelism needs cluster.device cuda; set 1"
        yield problem("cluster.roles.rollout.tensor_parallel", text)
    yield from _colocation(cluster, needed, with_reward_model=with_reward_model)
    if isinstance(engine.engines, EngineRange):
        yield from _range_of_engines(cluster, engine.engines, needed)


def _range_of_engines(cluster: ClusterConfig, engines: EngineRange, needed: Collection[Role]) -> Iterator[Problem]:
    """Yield the problems of a range of engines that join and leave during the run."""
    key, rollout = "cluster.roles.rollout", cluster.roles.rollout
    if engines.min > engines.max:
        yield problem(f"{key}.engines.min", f"is {engines.min}, more than max, which is {engines.max}; lower min")
    if "policy" not in needed:
        text = "has min and max, but the engines of an evaluation neither join nor leave; give a number"
        yield problem(f"{key}.engines", text)
    rule = f"engines join and leave during the run ({key}.engines.max is {engines.max})"
    if rollout.colocate_with is not None:
        text = f"is {rollout.colocate_with}, but {rule}, and its workers do not; set it to null, or engines to a number"
        yield problem(f"{key}.colocate_with", text)
    for guest in MODEL_SECTIONS:
        section = getattr(cluster.roles, guest)
        if guest in needed and section.colocate_with == "rollout":
            text = f"is rollout, but {rule}; set it to policy or null"
            yield problem(f"cluster.roles.{guest}.colocate_with", text)
    if cluster.weight_sync == "shm" and cluster.address is not None:
        text = "is shm, which stays on one host, but engines may join on others (cluster.address); use auto or gloo"
        yield problem("cluster.weight_sync", text)


def _colocation(cluster: ClusterConfig, needed: Collection[Role], *, with_reward_model: bool) -> Iterator[Problem]:
    """Yield invalid sharing of bundles by engines, the policy and further roles."""
    roles = cluster.roles
    engine, with_policy = roles.rollout, "policy" in needed  # a missing host has no colocated roles
    if with_policy and engine.colocate_with == "policy" and engine.workers > roles.policy.workers:
        text = (
            f"is policy, with {roles.policy.workers} workers for {engine.workers} engines: each worker hosts"
            " at most one; lower cluster.roles.rollout.engines, or set colocate_with to null"
        )
        yield problem("cluster.roles.rollout.colocate_with", text)
    if engine.tensor_parallel > 1:
        rule = f"Ray shares out single GPUs only, and cluster.roles.rollout.tensor_parallel is {engine.tensor_parallel}"
        for guest in MODEL_SECTIONS:
            has_model = with_reward_model or ROLES[guest].kind != "scoring"
            if guest in needed and getattr(roles, guest).colocate_with == "rollout" and has_model:
                text = f"is rollout, but {rule}; set it to policy or null, or tensor_parallel to 1"
                yield problem(f"cluster.roles.{guest}.colocate_with", text)
        if with_policy and engine.colocate_with == "policy":
            text = f"is policy, but {rule}; set it to null, or tensor_parallel to 1"
            yield problem("cluster.roles.rollout.colocate_with", text)


def _guests(cluster: ClusterConfig, needed: Collection[Role]) -> Iterator[Problem]:
    """Yield colocated roles with more workers than their host has bundles."""
    roles = cluster.roles
    for role in MODEL_SECTIONS:
        section = getattr(roles, role)
        host = section.colocate_with
        if role not in needed or host not in needed:
            continue
        size, unit = getattr(roles, host).workers, "engines" if ROLES[host].kind == "engines" else "workers"
        if section.workers > size:
            text = (
                f"is {section.workers}, but it is colocated with {host}, which has {size} {unit}: each hosts at"
                f" most one; lower it, or set cluster.roles.{role}.colocate_with to null"
            )
            yield problem(f"cluster.roles.{role}.workers", text)


def _turns(config: Config) -> Iterator[Problem]:
    """Yield trained roles with states bound to a GPU shared with an engine."""
    cluster, roles = config.cluster, config.cluster.roles
    if cluster.device == "cpu" or roles.rollout.colocate_with is None:
        return
    rule = "an engine takes turns with it on its GPU (cluster.roles.rollout.colocate_with)"
    for role, model in derive.trained_sections(config).items():
        section: TrainedResources = getattr(roles, role)
        if role not in derive.shares_engines_gpus(config):
            continue
        if section.zero_stage < 2:
            text = f"is {section.zero_stage}, but {rule}, and DeepSpeed moves the states of stages 2 and 3 only; set 2"
            yield problem(f"cluster.roles.{role}.zero_stage", text)
        if section.zero_stage == 3 and model.lora is not None:
            text = f"is 3, but {rule}, and DeepSpeed does not move a LoRA model of that stage; set 2"
            yield problem(f"cluster.roles.{role}.zero_stage", text)
        if "parameters" in section.offload:
            text = f"has `parameters`, but {rule}, and DeepSpeed does not move offloaded parameters; remove it"
            yield problem(f"cluster.roles.{role}.offload", text)


def _weight_sync(config: Config) -> Iterator[Problem]:
    """Yield a weight transport incompatible with the device or the placement."""
    cluster = config.cluster
    method, shared = cluster.weight_sync, cluster.roles.rollout.colocate_with == "policy"
    if method in ("shm", "gloo") and cluster.device == "cuda":
        yield problem("cluster.weight_sync", f"is {method}, which is for cluster.device cpu; use auto, nccl or ipc")
    if method in ("nccl", "ipc") and cluster.device == "cpu":
        yield problem("cluster.weight_sync", f"is {method}, which needs cluster.device cuda; use auto, shm or gloo")
    elif method == "ipc" and not shared:
        text = "is ipc, which needs engines on the policy's GPUs: set cluster.roles.rollout.colocate_with to policy"
        yield problem("cluster.weight_sync", text)
    elif method == "nccl" and shared:
        text = "is nccl, which cannot join processes on one GPU: cluster.roles.rollout.colocate_with is policy; use ipc"
        yield problem("cluster.weight_sync", text)
