"""Estimate the time of each part of a step from arithmetic and bandwidth, in order to compare layouts.

Multiplying P weights with a token takes 2P operations, and twice that in the backward pass. Each decoding step reads
all weights and every sequence's keys and values. `Rates` gives the assumed fractions of data-sheet numbers; they were
not measured with this code on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.derive import (
    derive,
    models_of,
    needs_reference_logprobs,
    reference_model,
    sequences_per_row,
    ships_adapter,
    trained_sections,
    uses_reference,
    weight_sync,
)
from rlhf.config.nodes import ACCELERATORS, Node
from rlhf.config.schema.model import CriticConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.objectives.costs import multiplies_bfloat16_fast
from rlhf.planning.footprints import Sizes, cache_tokens
from rlhf.planning.lengths import Lengths
from rlhf.planning.memory import kv_bytes_per_token
from rlhf.planning.shapes import Shape
from rlhf.planning.system import System
from rlhf.role_table import ROLES, Role
from rlhf.tracking.run_folder.environment import num_cpus

DEFAULT_GPU = "h100"
CPU_GFLOPS = 75.0  # per core, reached in training; docs/scaling.md
CPU_FAST_BF16_GFLOPS = 200.0  # per core with bfloat16 instructions
CPU_BANDWIDTH = 5e9  # bytes per second and core


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Hold the rates of one worker. `peak` is in operations per second, `bandwidth` in bytes per second."""

    name: str
    peak: float
    bandwidth: float
    train: float = 0.40  # fraction of peak reached by a forward and backward pass
    forward: float = 0.45
    decode: float = 0.60  # fraction of the bandwidth reached in decoding
    step_s: float = 0.005  # additional time of an engine's step: scheduling, sampling
    link: float = 20e9  # bytes per second between hosts, for weights


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold the seconds of one part of a step, and the arithmetic behind them."""

    name: str
    seconds: float
    how: str


def rates(config: Config, nodes: Sequence[Node] | None, *, role: Role) -> Rates:
    """Return the rates of a worker: of its GPU, or of its share of the CPUs."""
    if config.cluster.device == "cuda":
        kinds = {node.kind for node in nodes or () if node.gpus} - {None}
        kind = min(kinds, key=lambda k: ACCELERATORS[str(k)].tflops) if kinds else DEFAULT_GPU
        gpu = ACCELERATORS[str(kind)]
        return Rates(name=str(kind), peak=gpu.tflops * 1e12, bandwidth=gpu.bandwidth_gb_s * 1e9)
    section = getattr(config.cluster.roles, role)
    if section.threads != "auto":
        cores = float(section.threads)
    else:  # a node's cores are divided among the role's workers on it
        all_cores = float(num_cpus()) if nodes is None else sum(node.cpus for node in nodes)
        cores = max(1.0, all_cores // section.workers)
    fast = config.policy.dtype == "bfloat16" and multiplies_bfloat16_fast()
    return Rates(
        name=f"{cores:g} CPUs",
        peak=(CPU_FAST_BF16_GFLOPS if fast else CPU_GFLOPS) * 1e9 * cores,
        bandwidth=CPU_BANDWIDTH * cores,
        train=1.0,
        forward=1.0,
        decode=1.0,
        link=1e9,
    )


def forward_operations(shape: Shape, length: float) -> float:
    """Return the operations for one token in the middle of a sequence of the given length.

    Each multiplied weight takes 2 operations, of a mixture those of the chosen experts. Attention covers half of the
    sequence.
    """
    return 2.0 * shape.active_parameters + 2.0 * shape.layers * shape.query * length


def passes(model: PolicyConfig | CriticConfig) -> float:
    """Return the cost of a training pass in forward passes: itself, plus two for backward, or one without weight
    gradients."""
    return (2.0 if model.lora is not None else 3.0) + (1.0 if model.gradient_checkpointing else 0.0)


def training_stages(config: Config, sizes: Sizes, nodes: Sequence[Node] | None, lengths: Lengths) -> list[Stage]:
    """Return the parts after the rollouts, experience and updates. For an offline run, return the whole step.

    Roles on separate devices work in parallel; only their extra time counts.
    """
    derived, online = derive(config), config.algorithm.is_online
    if config.rollouts is None:
        mean = lengths.mean
        tokens = config.train.sequences_per_update * sequences_per_row(config) * mean
    else:
        mean = config.data.max_prompt_tokens + lengths.average()
        tokens = derived.sequences_per_step * mean
    own_critic = config.algorithm.has_critic and config.cluster.roles.critic.colocate_with is None
    critics = {role: model for role, model in trained_sections(config).items() if not ROLES[role].hosts}
    stages: list[Stage] = []

    def stage(name: str, role: Role, model: Any, *, trains: bool = False) -> Stage:
        speed, workers = rates(config, nodes, role=role), getattr(config.cluster.roles, role).workers
        each = (passes(model) if trains else 1.0) * forward_operations(sizes.of(model.model), mean)
        count = tokens * (config.train.epochs_per_batch if trains and online else 1)
        reached = speed.peak * (speed.train if trains else speed.forward)
        how = f"{count:,.0f} tokens * {each / 1e9:,.4g} GFLOP / ({workers} * {reached / 1e12:,.4g} TFLOP/s)"
        return Stage(name, count * each / (workers * reached), how)

    if online and (derived.updates_per_step > 1 or uses_reference(config)):
        stages.append(stage("old logprobs", "policy", config.policy))
    if derived.reference == "workers":
        stages.append(stage("reference", "reference", reference_model(config)))
    elif derived.reference == "adapter off":
        stages.append(stage("reference", "policy", config.policy))
    for role, model in critics.items():
        values = stage("values", role, model)
        stages.append(_meanwhile(values, stages[-1:]) if own_critic and derived.reference == "workers" else values)
    if needs_reference_logprobs(config):
        stages.append(Stage("reference", 0.0, "computed once, before the first step"))
    stages.append(stage("update", "policy", config.policy, trains=True))
    for role, model in critics.items():
        update = stage(f"{role} update", role, model, trains=True)
        stages.append(_meanwhile(update, stages[-1:]) if own_critic else update)
    return stages


def _meanwhile(stage: Stage, others: Sequence[Stage]) -> Stage:
    """Return the time added by a stage running in parallel with others."""
    adds = max(stage.seconds - sum(other.seconds for other in others), 0.0)
    return Stage(stage.name, adds, f"{stage.seconds:,.4g} s in parallel with {others[-1].name}: {stage.how}")


def sync_stage(config: Config, sizes: Sizes, nodes: Sequence[Node] | None) -> Stage:
    """Return the transfer of the policy's weights to the engines."""
    shape = sizes.of(config.policy.model)
    size = 4 if config.policy.dtype == "float32" else 2
    speed = rates(config, nodes, role="policy")
    if ships_adapter(config) and config.policy.lora is not None:
        nbytes, payload = shape.lora_parameters(config.policy.lora.rank) * size, "the adapter"
    else:
        payload = weight_sync(config.cluster, one_host=config.cluster.address is None).method
        nbytes = shape.parameters * size
    how = f"2 * {nbytes / 2**30:,.3g} GiB ({payload}, published and sent) / {speed.link / 1e9:g} GB/s + 0.2 s"
    return Stage("weight sync", 2 * nbytes / speed.link + 0.2, how)


def system_of(
    config: Config, sizes: Sizes, nodes: Sequence[Node] | None, lengths: Lengths, replacements: Mapping[str, float]
) -> System:
    """Return the system to simulate. `replacements` maps fields of System to known values."""
    assert config.rollouts is not None
    role, policy, parallel = config.cluster.roles.rollout, config.policy, config.cluster.roles.rollout.tensor_parallel
    shape, size = sizes.of(policy.model), 4 if policy.dtype == "float32" else 2
    speed = rates(config, nodes, role="rollout")
    bandwidth, arithmetic = speed.bandwidth * speed.decode * parallel, speed.peak * speed.forward * parallel
    prompt, average = config.data.max_prompt_tokens, lengths.average()
    mean = prompt + average / 2
    operations = forward_operations(shape, 2 * mean)  # a token attends to all earlier tokens
    stages, updates = training_stages(config, sizes, nodes, lengths), derive(config).updates_per_step
    seconds = sum(stage.seconds for stage in stages)
    late_s = sum(stage.seconds for stage in stages if stage.name.endswith("update")) * (1.0 - 1.0 / updates)
    sync_s = sync_stage(config, sizes, nodes).seconds
    values: dict[str, Any] = {
        "engines": role.workers,
        "base_s": shape.parameters * size / bandwidth + speed.step_s,
        "each_s": mean * kv_bytes_per_token(shape, itemsize=size) / bandwidth + operations / arithmetic,
        "train_tokens_per_s": derive(config).sequences_per_step * (prompt + average) / seconds,
        "sync_s": sync_s,
        "load_s": sync_s / 2,  # the engines go on while the weights are published
        "prefill_s": operations / arithmetic,
        "max_num_seqs": _at_once(config, sizes, prompt + average),
        **replacements,
    }
    gpus = max((node.gpus for node in nodes or ()), default=8.0) if config.cluster.device == "cuda" else 1
    return System(
        lengths=lengths,
        prompts_per_step=config.rollouts.prompts_per_step,
        samples_per_prompt=config.rollouts.samples_per_prompt,
        prompt_tokens=prompt,
        gpus_per_engine=parallel,
        training_gpus=config.cluster.roles.policy.workers + _separate_workers(config),
        colocated=role.colocate_with is not None,
        gpus_per_node=int(gpus or 1),
        streamed_share=1.0 - late_s / seconds,  # experience and the first minibatch
        recomputes=config.rollouts.kv_after_update == "recompute",
        **values,
    )


def _at_once(config: Config, sizes: Sizes, length: float) -> int:
    """Return the sequences decoded at once by an engine: the configured limit, or fewer if its cache is full.

    The cache is counted at the mean sequence length, because vLLM preempts sequences beyond it.
    """
    most, held = config.cluster.roles.rollout.max_num_seqs, cache_tokens(config, sizes)
    return most if held is None else max(1, min(most, int(held / length)))


def _separate_workers(config: Config) -> int:
    """Return the number of workers with separate devices in other roles."""
    guests = [role for role in models_of(config) if not ROLES[role].hosts]
    sections = [getattr(config.cluster.roles, role) for role in guests]
    return sum(section.workers for section in sections if section.colocate_with is None)
