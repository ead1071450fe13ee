"""Estimate the time in which the states of trained roles move between GPUs, hosts and shared memory.

The times are upper bounds: each transfer counts in full, although DeepSpeed overlaps some transfers with arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.derive import ROLE_USES, held_models, restarts_gangs, shares_engines_gpus, trained_sections
from rlhf.config.nodes import Node
from rlhf.config.schema.root import Config
from rlhf.planning.footprints import Sizes, training
from rlhf.planning.memory import GIB, Training, snapshot_term, training_terms
from rlhf.planning.rates import Rates, Stage, rates
from rlhf.role_table import Role

# Bytes of host memory that an optimizer step reads and writes for each parameter: the norm reads the gradient (4), the
# clip reads and writes it (8), fused AdamW reads weight, gradient and moments and writes all but the gradient (28), and
# the copy for the GPU reads float32 and writes bfloat16 (6).
HOST_STEP_BYTES = 46
GATHERS_PER_GRADIENT = 2  # each weight: once for the forward pass, once for the backward pass with recomputation


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Count the work of a rank in a step."""

    trained: int  # micro-batches with a gradient
    measured: int  # micro-batches without a gradient
    updates: int  # optimizer steps


def moves_in_update(
    role: Role, config: Config, sizes: Sizes, nodes: Sequence[Node] | None, work: Work, *, prefix: str
) -> Iterator[Stage]:
    """Yield the parts of a role's updates that move weights, gradients and optimizer states."""
    how = training(role, trained_sections(config)[role], config, sizes)
    speed, per_host = rates(config, nodes, role=role), gpus_per_host(config, nodes)
    late = 1.0 - 1.0 / work.updates
    if how.zero_stage == 3 and how.ranks > 1:
        seconds, text = _gathers(how, work, speed, per_host)
        yield Stage(f"{prefix}gathers", seconds, text, late)
    if how.place("optimizer") == "host":
        share = how.trained / (how.ranks if how.zero_stage >= 1 else 1)
        copies = 2 * work.trained + work.updates
        text = f"{copies} copies of {_gib(4 * share)} / {speed.pcie / 1e9:g} GB/s: there and back for each micro-batch"
        yield Stage(f"{prefix}gradients to host", copies * 4 * share / speed.pcie, text, late)
        neighbours = min(how.ranks, per_host)
        step = HOST_STEP_BYTES * share * neighbours / speed.host
        text = f"{HOST_STEP_BYTES} bytes * {share / 1e9:,.3g}B * {neighbours} ranks / {speed.host / 1e9:g} GB/s"
        text = f"{work.updates} * ({text}, and {_gib(how.itemsize * share)} back)"
        seconds = work.updates * (step + how.itemsize * share / speed.pcie)
        yield Stage(f"{prefix}optimizer on host", seconds, text, 1.0)


def _gathers(how: Training, work: Work, speed: Rates, per_host: int) -> tuple[float, str]:
    """Return the seconds of ZeRO-3's collectives: weights are gathered and gradients reduced in each micro-batch."""
    whole, gradients = how.trained * how.itemsize + how.frozen_bytes, how.trained * how.itemsize
    count, others = GATHERS_PER_GRADIENT * work.trained + work.measured, (how.ranks - 1) / how.ranks
    rate, where = speed.inside, "inside a host"
    if how.ranks > per_host:  # a collective uses the network cards of all of a host's GPUs
        rate, where = min(rate, speed.link * per_host), "between hosts"
    seconds = (count * whole + work.trained * gradients) * others / rate
    moved = f"{count} * {_gib(whole)} + {work.trained} * {_gib(gradients)} of gradients"
    text = f"({moved}) * {how.ranks - 1} / {how.ranks} / {rate / 1e9:g} GB/s {where}"
    if how.place("parameters") == "host":
        seconds += count * whole / how.ranks / speed.pcie
        text += f", and {count} * {_gib(whole / how.ranks)} / {speed.pcie / 1e9:g} GB/s from the host"
    return seconds, text


def snapshots(config: Config, sizes: Sizes, nodes: Sequence[Node] | None, *, meanwhile_s: float) -> Stage | None:
    """Return how long an optimizer step waits for the snapshot of the previous state. None: no wait.

    meanwhile_s: seconds from the end of a step to the next optimizer step. A thread copies the state in this time.
    """
    if not restarts_gangs(config):
        return None
    sizes_of = {
        role: snapshot_term(sizes.of(model.model), training(role, model, config, sizes)).nbytes
        for role, model in trained_sections(config).items()
    }
    role = max(sizes_of, key=lambda each: sizes_of[each])
    largest = sizes_of[role] / 2  # of two slots, one is written
    rate = rates(config, nodes, role=role).unpinned
    waits_s = largest / rate - meanwhile_s
    text = f"{_gib(largest)} to /dev/shm / {rate / 1e9:g} GB/s, beside {meanwhile_s:,.4g} s of passes"
    return Stage("snapshots", waits_s, text, 1.0) if waits_s > 0.0 else None


def staging(config: Config, sizes: Sizes, nodes: Sequence[Node] | None) -> Stage | None:
    """Return the time for roles to leave GPUs shared with engines, and to return. None: no such role."""
    pinned = unpinned = 0.0  # bytes in both directions
    sections: Mapping[Role, object] = trained_sections(config)
    staged = shares_engines_gpus(config)
    for role in staged:
        model = ROLE_USES[role].model(config)
        assert model is not None  # only roles with a model leave a GPU
        if role not in sections:  # a host copy of frozen weights lasts for the whole run, so frozen weights only return
            for one in held_models(config, role).values():
                unpinned += sizes.of(one.model).parameters * (4 if one.dtype == "float32" else 2)
            continue
        how = training(role, trained_sections(config)[role], config, sizes)
        held = [t for t in training_terms(sizes.of(model.model), how) if t.place == "device" and t.phase == "always"]
        total = sum(term.nbytes for term in held if term.name != "weights gathered")
        states = 0.0 if how.place("optimizer") == "host" else snapshot_term(sizes.of(model.model), how).nbytes / 2
        slow = states if how.zero_stage == 3 else how.frozen_bytes  # DeepSpeed moves all else by pinned memory
        pinned += 2 * (total - slow)
        unpinned += 2 * slow
    if not pinned + unpinned:
        return None
    speed = rates(config, nodes, role=next(iter(staged)))  # all roles have the same rates of a GPU
    text = f"{_gib(pinned)} / {speed.pcie / 1e9:g} GB/s + {_gib(unpinned)} not pinned / {speed.unpinned / 1e9:g} GB/s"
    return Stage("staging", pinned / speed.pcie + unpinned / speed.unpinned, f"{text}, both ways", 1.0)


def gpus_per_host(config: Config, nodes: Sequence[Node] | None) -> int:
    """Return the GPUs of the largest node, or 8 if no node is described. Without GPUs return 1."""
    return int(max((node.gpus for node in nodes or ()), default=8.0) or 1) if config.cluster.device == "cuda" else 1


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:,.3g} GiB"
