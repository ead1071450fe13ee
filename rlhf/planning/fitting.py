"""Compare memory footprints with nodes, and suggest changes to configurations too large for the nodes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlhf.config.derive import restarts_gangs
from rlhf.config.nodes import Node
from rlhf.config.placement_plan import PlacementPlan, assign_nodes, plan_placement
from rlhf.config.schema.root import Config
from rlhf.config.validation.run import problems
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import GIB, Footprint, snapshot_sizes
from rlhf.planning.shared_memory import SHARED_MEMORY, SnapshotBytes, larger_shared_memory, snapshots_by_node
from rlhf.process.cgroups import total_memory
from rlhf.role_table import ROLES, TRAINED_ROLES, Role
from rlhf.tracking.run_folder.environment import num_cpus

RAY_BYTES = int(1.0 * GIB)  # measured: Ray's own processes on a head node
DRIVER_BYTES = int(0.65 * GIB)  # measured: this command during training
RAY_SHARE, RAY_MOST_BYTES, RAY_SHARE_OF_SHM = 0.3, 200e9, 0.95  # defaults of `ray start`: of memory, most, of /dev/shm
HOST_SHARE = 0.95  # Ray kills workers when a node uses more of its memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Compare the bytes wanted at one place with the room there. `room` is None if the capacity is unknown."""

    where: str
    wanted: float  # bytes
    room: float | None
    parts: str
    alike: str  # names all places of this kind; this place is the fullest
    fix: str = ""  # a sentence with a change outside the configuration that makes room

    @property
    def fits(self) -> bool | None:
        return None if self.room is None else self.wanted <= self.room


def this_machine(*, cpus: float) -> Node:
    """Return this machine as a node, with at least `cpus` CPUs."""
    shm = shutil.disk_usage(SHARED_MEMORY).total
    return Node(cpus=max(cpus, float(num_cpus())), mem_gib=total_memory() / GIB, shm_gib=shm / GIB)


def places(
    config: Config, placement: PlacementPlan, processes: Sequence[Footprint], nodes: Sequence[Node]
) -> list[Fit]:
    """Return the memory use of each set of roles on a GPU, and of each node's host and /dev/shm, at the fullest."""
    at = assign_nodes(placement.bundles, [node.resources for node in nodes])
    if at is None:
        return []
    by_role = {footprint.role: footprint for footprint in processes}
    ranks = {role: [at[slot.bundle] for slot in slots] for role, slots in placement.slots.items()}
    kept = snapshots_by_node(
        snapshot_sizes(processes), ranks, {node for nodes_of in ranks.values() for node in nodes_of}
    )
    gpus = _gpus(placement, by_role, nodes, at) if config.cluster.device == "cuda" else []
    return [*gpus, *_hosts(config, placement, by_role, nodes, at, kept), *_shared_memory(config, nodes, kept)]


Moment = Literal["generate", "train", "weight sync"]


def held_on_gpu(footprint: Footprint, moment: Moment) -> float:
    """Return the bytes held by a process on a GPU shared by an engine and the trained roles.

    generate: the engine is awake, and the reward model scores responses. train: the engine sleeps. weight sync: the
    policy sends weights to the engine while the engine's cache sleeps. All other roles have left the GPU.
    """
    kind = ROLES[footprint.role].kind
    if kind == "scoring":
        return footprint.of("device")
    if moment == "generate":
        return footprint.of("device") if kind == "engines" else footprint.stays
    if moment == "train":
        return footprint.stays if kind == "engines" else footprint.held("always") + footprint.held("step")
    if footprint.role == "policy":
        return footprint.held("always") + footprint.held("sync")
    return footprint.held("always") if kind == "engines" else footprint.stays


def _gpus(
    placement: PlacementPlan, by_role: Mapping[Role, Footprint], nodes: Sequence[Node], at: Sequence[int]
) -> list[Fit]:
    """Return a line for each set of roles on one GPU, at the moment of the largest memory use."""
    fits: dict[tuple[str, ...], Fit] = {}
    for bundle in range(len(placement.bundles)):
        roles = [r for r, slots in placement.slots.items() if any(s.bundle == bundle and s.gpus > 0 for s in slots)]
        if not roles or not all(r in by_role for r in roles):
            continue
        if {ROLES[role].kind for role in roles} >= {"trained", "engines"}:
            by_moment = {moment: {r: held_on_gpu(by_role[r], moment) for r in roles} for moment in get_args(Moment)}
            wanted, fullest = max((sum(sizes.values()), moment) for moment, sizes in by_moment.items())
            rest = ", ".join(f"{m} {sum(s.values()) / GIB:,.1f}" for m, s in by_moment.items() if m != fullest)
            parts = f"{fullest}: {_sum(by_moment[fullest])} ({rest})"
        else:
            sizes = {r: by_role[r].of("device") for r in roles}
            wanted, parts = sum(sizes.values()), _sum(sizes)
        gib = nodes[at[bundle]].gpu_memory_gib
        room, key = None if gib is None else gib * GIB, tuple(roles)
        where = f"GPU of {', '.join(roles)}"
        if key not in fits or (room or 0.0) < (fits[key].room or 0.0):
            fits[key] = Fit(where=where, wanted=wanted, room=room, parts=parts, alike=where)
    return list(fits.values())


def _sum(sizes: Mapping[Any, float]) -> str:
    return " + ".join(f"{role} {size / GIB:,.1f}" for role, size in sizes.items())


def _hosts(
    config: Config,
    placement: PlacementPlan,
    by_role: Mapping[Role, Footprint],
    nodes: Sequence[Node],
    at: Sequence[int],
    kept: Mapping[int, SnapshotBytes],
) -> list[Fit]:
    """Return the fullest node among nodes with equal memory."""
    fits: dict[float | None, Fit] = {}
    for index, node in enumerate(nodes):
        counts = {role: sum(at[slot.bundle] == index for slot in slots) for role, slots in placement.slots.items()}
        here = {role: count for role, count in counts.items() if count}
        if not here:
            continue
        parts: dict[str, float] = {role: by_role[role].private(count) for role, count in here.items()}
        if shared := max(by_role[role].of("shared") for role in here):
            parts["shared memory"] = shared
        if index in kept and kept[index].copies:
            parts["copies of snapshots"] = kept[index].copies
        local = config.cluster.address is None
        parts["Ray"] = RAY_BYTES + (DRIVER_BYTES + config.cluster.object_store_gib * GIB if local else 0.0)
        wanted = sum(parts.values())
        room = None if node.mem_gib is None else node.mem_gib * GIB * HOST_SHARE
        if node.mem_gib not in fits or wanted > fits[node.mem_gib].wanted:
            where, alike = f"host of node {index}", f"hosts of {node.mem_gib} GiB"
            fits[node.mem_gib] = Fit(where=where, wanted=wanted, room=room, parts=_sum(parts), alike=alike)
    return list(fits.values())


def _shared_memory(config: Config, nodes: Sequence[Node], kept: Mapping[int, SnapshotBytes]) -> list[Fit]:
    """Return the fullest /dev/shm among nodes with equal room there, if ranks take snapshots."""
    fits: dict[float | None, Fit] = {}
    for index, snapshots in kept.items():
        parts: dict[str, float] = {f"snapshots of {role}": nbytes for role, nbytes in snapshots.by_role.items()}
        if snapshots.copies:
            parts["copies of snapshots"] = snapshots.copies
        room = nodes[index].shared_memory_gib
        if objects := _ray_objects(config, nodes[index]):
            parts["Ray's objects"] = objects
        wanted = sum(parts.values())
        if room not in fits or wanted > fits[room].wanted:
            fits[room] = Fit(
                where=f"{SHARED_MEMORY} of node {index}",
                wanted=wanted,
                room=None if room is None else room * GIB,
                parts=_sum(parts),
                alike=f"{SHARED_MEMORY} of {room} GiB",
                fix=larger_shared_memory(wanted),
            )
    return list(fits.values())


def _ray_objects(config: Config, node: Node) -> float:
    """Return the bytes of /dev/shm taken by Ray's object store. A local Ray without this room there uses the disk."""
    room = None if node.shared_memory_gib is None else node.shared_memory_gib * GIB
    if config.cluster.address is None:
        nbytes = config.cluster.object_store_gib * GIB
        return 0.0 if room is not None and nbytes > room else nbytes
    if node.mem_gib is None or room is None:
        return 0.0
    return min(RAY_SHARE * node.mem_gib * GIB, RAY_MOST_BYTES, RAY_SHARE_OF_SHM * room)


def remedies(config: Config, sizes: Sizes, nodes: Sequence[Node], roles: Sequence[Role]) -> list[str]:
    """Return changes that reduce memory in overfull places, mildest first for each role, each with the effect.

    A change is left out if the checks refuse the change, the nodes have no room, or no overfull place shrinks. If no
    single change is enough, the last line gives the effect of all changes together.
    """
    before = _places_of(config, sizes, nodes)
    tight = {alike for alike, place in before.items() if place.fits is False}
    lines: list[str] = []
    used: list[str] = []
    together = config
    changes = {f"{key}={_yaml(value)}": (key, value) for role in roles for key, value in _changes(config, role)}
    for text, (key, value) in changes.items():
        after = _places_of(_with(config, key.split("."), value), sizes, nodes)
        sizes_after = {alike: place.wanted for alike, place in after.items()}
        reduced = [alike for alike in tight if sizes_after.get(alike, 0.0) < 0.98 * before[alike].wanted]
        if not after or not reduced:
            continue
        newly_full = [place.where for alike, place in after.items() if place.fits is False and alike not in tight]
        but = f"; but {', '.join(newly_full)} then does not" if newly_full else ""
        lines.append(f"{text}: {', '.join(sorted(_shrunk(before[alike], after.get(alike)) for alike in reduced))}{but}")
        if all(place.fits is not False for place in after.values()):
            return lines
        if _places_of(changed := _with(together, key.split("."), value), sizes, nodes):
            together, used = changed, [*used, text]
    larger = "use larger nodes, more of them, or a smaller model"
    if not lines:
        return [f"no key that is known to do so; {larger}"]
    if len(used) < 2:
        return lines
    is_enough = all(place.fits is not False for place in _places_of(together, sizes, nodes).values())
    verdict = "everything fits" if is_enough else f"it still does not fit: {larger}"
    return [*lines, f"with {', '.join(used)} together {verdict}"]


def _shrunk(old: Fit, new: Fit | None) -> str:
    if new is None:
        return f"{old.where} is not needed"
    word = "fits" if new.fits else "still does not fit"
    return f"{new.where} wants {new.wanted / GIB:,.1f} GiB in place of {old.wanted / GIB:,.1f} and {word}"


def _places_of(config: Config, sizes: Sizes, nodes: Sequence[Node]) -> dict[str, Fit]:
    """Return the fullest places of a changed configuration, by kind. Empty: an invalid configuration, or no room."""
    fits = [] if problems(config) else places(config, plan_placement(config), footprints(config, sizes), nodes)
    return {place.alike: place for place in fits}


def _changes(config: Config, role: Role) -> Iterator[tuple[str, Any]]:
    """Yield keys with values for less memory of a role, mildest first."""
    cuda, section = config.cluster.device == "cuda", getattr(config.cluster.roles, role)
    if ROLES[role].kind == "engines":
        if not cuda and section.kv_cache_gib > 1:
            yield "cluster.roles.rollout.kv_cache_gib", section.kv_cache_gib // 2
        yield "cluster.roles.rollout.max_num_seqs", max(section.max_num_seqs // 4, 1)
        if cuda:
            for share in (0.7, 0.5):
                if share < section.gpu_memory_utilization:
                    yield "cluster.roles.rollout.gpu_memory_utilization", share
            yield "cluster.roles.rollout.tensor_parallel", 2 * section.tensor_parallel
        return
    budget, longest = config.train.max_tokens_per_microbatch, config.data.max_sequence_tokens
    if config.rollouts is not None:
        longest = config.rollouts.longest_sequence(config.data.max_prompt_tokens)
    half = max(budget // 2, longest or budget)
    if half < budget:
        yield "train.max_tokens_per_microbatch", half
    if role in TRAINED_ROLES and getattr(config, role) is not None:
        yield f"{role}.gradient_checkpointing", True
        if section.zero_stage < 3 and section.workers > 1:
            yield f"cluster.roles.{role}.zero_stage", 3
        if section.offload or cuda:
            yield f"cluster.roles.{role}.offload", () if section.offload else ("optimizer",)
        yield f"cluster.roles.{role}.workers", 2 * section.workers
        if restarts_gangs(config):
            yield "cluster.restarts.gang", 0


def _yaml(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value).replace("True", "true")


def _with(section: Any, key: Sequence[str], value: Any) -> Any:
    """Return the section with one nested key changed."""
    inner = value if len(key) == 1 else _with(getattr(section, key[0]), key[1:], value)
    return section.model_copy(update={key[0]: inner})
