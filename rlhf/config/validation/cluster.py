"""Check devices, placement and weight transport of a run or an evaluation, and the ranks of the trained roles."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

from rlhf.config.derive import Derived
from rlhf.config.problem import Problem, problem
from rlhf.config.schema.cluster import ClusterConfig, EngineRange, TrainedResources
from rlhf.config.schema.root import Config
from rlhf.config.transports import TRANSPORTS
from rlhf.config.validation.engine_args import engine_argument_problems
from rlhf.role_table import MODEL_SECTIONS, ROLES, Role

_ENGINES = "cluster.roles.rollout"


def cluster_problems(cluster: ClusterConfig, needed: Collection[Role], *, with_reward_model: bool) -> Iterator[Problem]:
    """Yield problems with the address, colocated roles and engines, for any kind of run."""
    if cluster.address == "local":
        yield problem("cluster.address", "is local; a Ray that is started for this run is written null")
    yield from _guests(cluster, needed)
    if "rollout" in needed:
        yield from engine_argument_problems(cluster)
        yield from _colocation(cluster, needed, with_reward_model=with_reward_model)
        if isinstance(cluster.roles.rollout.engines, EngineRange):
            yield from _range_of_engines(cluster, cluster.roles.rollout.engines, needed)


def rank_problems(config: Config, facts: Derived) -> Iterator[Problem]:
    """Yield settings of trained roles that do not fit the batch, the optimizer, or engines on the same GPUs."""
    train, turns = config.train, f"an engine takes turns with it on its GPU ({_ENGINES}.colocate_with)"
    for role, model in facts.trained.items():
        section: TrainedResources = getattr(config.cluster.roles, role)
        key, stage, takes_turns = f"cluster.roles.{role}", section.zero_stage, role in facts.shares_engines_gpus
        zero, offload = partial(problem, f"{key}.zero_stage"), partial(problem, f"{key}.offload")
        if section.workers % section.sequence_parallel:
            rule = f"must divide {key}.workers = {section.workers}: that many ranks share each micro-batch"
            yield problem(f"{key}.sequence_parallel", f"is {section.sequence_parallel} and {rule}")
        elif train.sequences_per_update < section.data_parallel_ranks:
            why = f"{section.data_parallel_ranks} data-parallel ranks of {key} need a sequence each per optimizer step"
            text = f"is {train.sequences_per_update}, but {why}; raise it, or lower the workers"
            yield problem("train.sequences_per_update", text)
        if train.optimizer in ("adafactor", "muon") and stage != 0:
            text = f"is {stage}, but train.optimizer {train.optimizer} needs whole matrices"
            yield zero(f"{text}, which DeepSpeed splits at stage 1 and above; set 0, or use adamw or adamw_8bit")
        if "parameters" in section.offload and stage in (1, 2) and config.cluster.device == "cuda":
            yield offload(f"has `parameters`, which needs {key}.zero_stage 3, not {stage}")
        if model.lora is not None and model.lora.quantize is not None and stage == 3:
            yield zero(f"is 3, but DeepSpeed does not shard 4-bit weights ({role}.lora.quantize); set 2")
        if takes_turns and stage < 2:
            yield zero(f"is {stage}, but {turns}, and DeepSpeed moves the states of stages 2 and 3 only; set 2")
        if takes_turns and stage == 3 and model.lora is not None:
            yield zero(f"is 3, but {turns}, and DeepSpeed does not move a LoRA model of that stage; set 2")
        if takes_turns and "parameters" in section.offload:
            yield offload(
                f"has `parameters`, but {turns}, and DeepSpeed does not move offloaded parameters; remove `parameters`"
            )


def transport_problems(cluster: ClusterConfig) -> Iterator[Problem]:
    """Yield a weight transport incompatible with the device or the placement."""
    if cluster.weight_sync == "auto":
        return
    traits, shared = TRANSPORTS[cluster.weight_sync], cluster.roles.rollout.colocate_with == "policy"
    wrong = partial(problem, "cluster.weight_sync")
    if traits.device != cluster.device:
        yield wrong(f"is {cluster.weight_sync}, which needs cluster.device {traits.device}; use auto")
    elif traits.shares_gpus and not shared:
        text = f"is {cluster.weight_sync}, which needs engines on the policy's GPUs"
        yield wrong(f"{text}: set {_ENGINES}.colocate_with to policy")
    elif traits.device == "cuda" and traits.meets and shared:
        text = f"is {cluster.weight_sync}, which cannot join processes on one GPU"
        yield wrong(f"{text}: {_ENGINES}.colocate_with is policy; use auto")


def _range_of_engines(cluster: ClusterConfig, engines: EngineRange, needed: Collection[Role]) -> Iterator[Problem]:
    rollout = cluster.roles.rollout
    if engines.min > engines.max:
        yield problem(f"{_ENGINES}.engines.min", f"is {engines.min}, more than max, which is {engines.max}; lower min")
    if "policy" not in needed:
        text = "has min and max, but the engines of an evaluation neither join nor leave; give a number"
        yield problem(f"{_ENGINES}.engines", text)
    rule = f"engines join and leave during the run ({_ENGINES}.engines.max is {engines.max})"
    if rollout.colocate_with is not None:
        text = f"is {rollout.colocate_with}, but {rule}, and its workers do not; set it to null, or engines to a number"
        yield problem(f"{_ENGINES}.colocate_with", text)
    for guest in MODEL_SECTIONS:
        if guest in needed and getattr(cluster.roles, guest).colocate_with == "rollout":
            yield problem(f"cluster.roles.{guest}.colocate_with", f"is rollout, but {rule}; set it to policy or null")
    method = cluster.weight_sync
    if method != "auto" and TRANSPORTS[method].one_host and cluster.address is not None:
        text = (
            f"is {method}, which works within one host, but engines may join on other hosts (cluster.address); use auto"
        )
        yield problem("cluster.weight_sync", text)


def _colocation(cluster: ClusterConfig, needed: Collection[Role], *, with_reward_model: bool) -> Iterator[Problem]:
    roles, engine = cluster.roles, cluster.roles.rollout
    is_guest = "policy" in needed and engine.colocate_with == "policy"  # a missing host has no colocated roles
    if is_guest and engine.workers > roles.policy.workers:
        text = f"is policy, with {roles.policy.workers} workers for {engine.workers} engines"
        fix = f"lower {_ENGINES}.engines, or set colocate_with to null"
        yield problem(f"{_ENGINES}.colocate_with", f"{text}: each worker hosts at most one; {fix}")
    if engine.tensor_parallel == 1:
        return
    rule = f"Ray lets roles share single GPUs only, and {_ENGINES}.tensor_parallel is {engine.tensor_parallel}"
    for guest in MODEL_SECTIONS:
        has_model = with_reward_model or ROLES[guest].kind != "scoring"
        if guest in needed and getattr(roles, guest).colocate_with == "rollout" and has_model:
            text = f"is rollout, but {rule}; set it to policy or null, or tensor_parallel to 1"
            yield problem(f"cluster.roles.{guest}.colocate_with", text)
    if is_guest:
        yield problem(f"{_ENGINES}.colocate_with", f"is policy, but {rule}; set it to null, or tensor_parallel to 1")


def _guests(cluster: ClusterConfig, needed: Collection[Role]) -> Iterator[Problem]:
    """Yield colocated roles with more workers than their host has bundles."""
    for role in MODEL_SECTIONS:
        section = getattr(cluster.roles, role)
        host = section.colocate_with
        if role not in needed or host not in needed:
            continue
        size, unit = getattr(cluster.roles, host).workers, "engines" if ROLES[host].kind == "engines" else "workers"
        if section.workers > size:
            why = f"it is colocated with {host}, which has {size} {unit}: each hosts at most one"
            fix = f"lower it, or set cluster.roles.{role}.colocate_with to null"
            yield problem(f"cluster.roles.{role}.workers", f"is {section.workers}, but {why}; {fix}")
