"""Estimate the time of each part of a step from arithmetic and bandwidth, to compare layouts.

Multiplying P weights with a token takes 2P operations, and twice that in the backward pass. Each decoding step reads
all weights and every sequence's keys and values. rlhf.planning.rates has the assumed rates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.config import derive
from rlhf.config.nodes import Node
from rlhf.config.schema.model import CriticConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.planning.footprints import Sizes, cache_tokens, sent_parameters
from rlhf.planning.lengths import Lengths
from rlhf.planning.memory import kv_bytes_per_token
from rlhf.planning.rates import Stage, rates
from rlhf.planning.shapes import Shape
from rlhf.planning.system import System
from rlhf.planning.transfers import Work, moves_in_update, snapshots, staging
from rlhf.role_table import ROLES, TRAINED_ROLES, Role


def forward_operations(shape: Shape, length: float) -> float:
    """Return the operations for one token in the middle of a sequence of the given length.

    Each multiplied weight takes 2 operations. Attention covers half of the sequence.
    """
    return 2.0 * shape.active_parameters + 2.0 * shape.layers * shape.query * length


def tower_operations(shape: Shape, image_tokens: float) -> float:
    """Return the operations of a vision tower's forward pass over the images of a prompt, at most.

    A patch multiplies all weights of tower and projector, and attends to all patches: the images count as one image.
    """
    tower, patches = shape.tower, image_tokens * shape.tower.patches
    return patches * (2.0 * tower.parameters + 4.0 * tower.layers * tower.hidden * patches)


def passes(model: PolicyConfig | CriticConfig) -> float:
    """Return the cost of a training pass in forward passes. Backward takes two, or one without weight gradients."""
    return (2.0 if model.lora is not None else 3.0) + (1.0 if model.gradient_checkpointing else 0.0)


def training_stages(config: Config, sizes: Sizes, nodes: Sequence[Node] | None, lengths: Lengths) -> list[Stage]:
    """Return the parts after the rollouts, experience and updates. For an offline run, return the whole step.

    Roles on separate devices work in parallel; only their extra time counts.
    """
    derived, online = derive.derive(config), config.algorithm.is_online
    if config.rollouts is None:
        mean = lengths.mean
        tokens = config.train.sequences_per_update * derive.sequences_per_row(config) * mean
    else:
        mean = config.data.max_prompt_tokens + lengths.average()
        tokens = derived.sequences_per_step * mean
    prompts = config.train.sequences_per_update if config.rollouts is None else config.rollouts.prompts_per_step
    own_critic = config.algorithm.has_critic and config.cluster.roles.critic.colocate_with is None
    critics = {role: model for role, model in derive.trained_sections(config).items() if not ROLES[role].hosts}
    updates = derived.updates_per_step
    measured: Counter[Role] = Counter()  # micro-batches without a gradient

    def stage(name: str, role: Role, model: Any, *, trains: bool = False) -> Stage:
        speed, workers = rates(config, nodes, role=role), getattr(config.cluster.roles, role).workers
        each = (passes(model) if trains else 1.0) * forward_operations(sizes.of(model.model), mean)
        epochs = config.train.epochs_per_batch if trains and online else 1
        count = tokens * epochs
        images = prompts * epochs * tower_operations(sizes.of(model.model), _image_tokens(config, lengths))
        images *= passes(model) if trains and model.vision_lr is not None else 1.0  # a frozen tower has no gradient
        reached = speed.peak * (speed.train if trains else speed.forward)
        if not trains:
            measured[role] += _microbatches(config, role, tokens)
        work = f"{count:,.0f} tokens * {each / 1e9:,.4g} GFLOP"
        work = f"({work} + {images / 1e12:,.4g} TFLOP of the images)" if images else work
        how = f"{work} / ({workers} * {reached / 1e12:,.4g} TFLOP/s)"
        late = 1.0 - 1.0 / updates if trains else 0.0
        return Stage(name, (count * each + images) / (workers * reached), how, late)

    def updating(role: Role, model: Any, name: str) -> list[Stage]:
        update = stage(name, role, model, trains=True)
        count = tokens * (config.train.epochs_per_batch if online else 1) / updates
        work = Work(trained=updates * _microbatches(config, role, count), measured=measured[role], updates=updates)
        return [update, *moves_in_update(role, config, sizes, nodes, work, prefix=name.removesuffix("update"))]

    experience: list[Stage] = []
    if online and (updates > 1 or derive.uses_reference(config)):
        experience.append(stage("old logprobs", "policy", config.policy))
    if derived.reference == "workers":
        experience.append(stage("reference", "reference", derive.reference_model(config)))
    elif derived.reference == "adapter off":
        experience.append(stage("reference", "policy", config.policy))
    for role, model in critics.items():
        values = stage("values", role, model)
        in_parallel = own_critic and derived.reference == "workers"
        experience.append(_meanwhile([values], experience[-1:]) if in_parallel else values)
    if derive.needs_reference_logprobs(config):
        experience.append(Stage("reference", 0.0, "computed once, before the first step"))
    learning = updating("policy", config.policy, "update")
    for role, model in critics.items():
        own = updating(role, model, f"{role} update")
        learning += [_meanwhile(own, learning)] if own_critic else own
    passes_s = sum(one.seconds for one in experience) + sum(one.seconds * (1.0 - one.late) for one in learning)
    waits = [snapshots(config, sizes, nodes, meanwhile_s=passes_s), staging(config, sizes, nodes)]
    return [*experience, *learning, *(one for one in waits if one is not None)]


def _image_tokens(config: Config, lengths: Lengths) -> float:
    """Return the tokens of a prompt's images. If unknown, all tokens of a prompt are of images."""
    most = config.data.max_prompt_tokens if config.rollouts is not None else lengths.mean
    return float(most) if lengths.image_tokens is None else min(lengths.image_tokens, float(most))


def _microbatches(config: Config, role: Role, tokens: float) -> int:
    ranks = getattr(config.cluster.roles, role).data_parallel_ranks if role in TRAINED_ROLES else 1
    return max(1, math.ceil(tokens / (ranks * config.train.max_tokens_per_microbatch)))


def _meanwhile(stages: Sequence[Stage], others: Sequence[Stage]) -> Stage:
    """Return the time added by stages that run in parallel with `others`, as a single stage."""
    first, seconds = stages[0], sum(stage.seconds for stage in stages)
    adds = max(seconds - sum(other.seconds for other in others), 0.0)
    hows = "; ".join(stage.how for stage in stages)
    return replace(first, seconds=adds, how=f"{seconds:,.4g} s in parallel with {others[0].name}: {hows}")


def sync_stage(config: Config, sizes: Sizes, nodes: Sequence[Node] | None) -> Stage:
    shape = sizes.of(config.policy.model)
    size = 4 if config.policy.dtype == "float32" else 2
    speed = rates(config, nodes, role="policy")
    if derive.ships_adapter(config) and config.policy.lora is not None:
        nbytes, payload = shape.lora_parameters(config.policy.lora.rank) * size, "the adapter"
    else:
        payload = derive.weight_sync(config.cluster, one_host=config.cluster.address is None).method
        nbytes = sent_parameters(config, shape) * size
    how = f"2 * {nbytes / 2**30:,.3g} GiB ({payload}, published and sent) / {speed.link / 1e9:g} GB/s + 0.2 s"
    return Stage("weight sync", 2 * nbytes / speed.link + 0.2, how)


def system_of(config: Config, sizes: Sizes, nodes: Sequence[Node] | None, lengths: Lengths) -> System:
    assert config.rollouts is not None
    role, policy = config.cluster.roles.rollout, config.policy
    shape, size = sizes.of(policy.model), 4 if policy.dtype == "float32" else 2
    speed, parallel = rates(config, nodes, role="rollout"), role.tensor_parallel
    bandwidth, arithmetic = speed.bandwidth * speed.decode * parallel, speed.peak * speed.forward * parallel
    prompt, average = config.data.max_prompt_tokens, lengths.average()
    mean = prompt + average / 2
    operations = forward_operations(shape, 2 * mean)  # a token attends to all earlier tokens
    stages = training_stages(config, sizes, nodes, lengths)
    seconds = sum(stage.seconds for stage in stages)
    late_s = sum(stage.seconds * stage.late for stage in stages)
    sync_s = sync_stage(config, sizes, nodes).seconds
    return System(
        lengths=lengths,
        prompts_per_step=config.rollouts.prompts_per_step,
        samples_per_prompt=config.rollouts.samples_per_prompt,
        prompt_tokens=prompt,
        engines=role.workers,
        colocated=role.colocate_with is not None,
        max_num_seqs=_at_once(config, sizes, prompt + average),
        base_s=(shape.parameters - shape.tower.parameters) * size / bandwidth + speed.step_s,
        each_s=mean * kv_bytes_per_token(shape, itemsize=size) / bandwidth + operations / arithmetic,
        train_tokens_per_s=derive.derive(config).sequences_per_step * (prompt + average) / seconds,
        streamed_share=1.0 - late_s / seconds,  # experience and the first minibatch
        sync_s=sync_s,
        load_s=sync_s / 2,  # the engines continue while the weights are published
        prefill_s=operations / arithmetic,
        images_s=tower_operations(shape, _image_tokens(config, lengths)) / arithmetic,
        recomputes=config.rollouts.kv_after_update == "recompute",
    )


def _at_once(config: Config, sizes: Sizes, length: float) -> int:
    """Return the sequences decoded at once by an engine: the configured limit, or fewer for a full cache.

    The cache is counted at the mean sequence length, because vLLM preempts sequences beyond the cache.
    """
    most, held = config.cluster.roles.rollout.max_num_seqs, cache_tokens(config, sizes)
    return most if held is None else max(1, min(most, int(held / length)))
