"""Compare memory footprints with nodes, and suggest changes to configurations too large for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config.nodes import Node
from rlhf.config.placement_plan import Seating, fit, seat
from rlhf.config.schema.root import Config
from rlhf.config.validation.run import problems
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import GIB, Footprint

if TYPE_CHECKING:
    from rlhf.types import Role

RAY_BYTES = int(1.0 * GIB)  # measured: Ray's own processes on a head node
DRIVER_BYTES = int(0.65 * GIB)  # measured: this command while it trains
HOST_SHARE = 0.95  # Ray kills workers when a node uses more of its memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Compare the bytes wanted at one place with its room. `room` is None if the capacity is unknown."""

    where: str
    wanted: float  # bytes
    room: float | None
    parts: str

    @property
    def fits(self) -> bool | None:
        """Return whether the bytes fit, or None if the capacity is unknown."""
        return None if self.room is None else self.wanted <= self.room


def this_machine(*, cpus: float) -> Node:
    """Return this machine as a node, with at least `cpus` CPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Node(cpus=max(cpus, float(os.cpu_count() or 1)), mem_gib=memory / GIB)


def places(config: Config, seating: Seating, processes: Sequence[Footprint], nodes: Sequence[Node]) -> list[Fit]:
    """Return the memory use of each set of roles on a GPU and of each node's host, at its fullest."""
    at = fit(seating.bundles, [node.resources for node in nodes])
    if at is None:
        return []
    by_role = {footprint.role: footprint for footprint in processes}
    fits = []
    if config.cluster.device == "cuda":
        fits += _gpus(seating, by_role, nodes, at)
    return fits + _hosts(config, seating, by_role, nodes, at)


Moment = Literal["generate", "train", "weight sync"]


def held_on_gpu(footprint: Footprint, moment: Moment) -> float:
    """Return the bytes held by a process on a GPU shared by an engine and the trained roles.

    generate: the engine is awake, and the reward model scores its responses. train: the engine sleeps. weight sync: the
    policy sends weights to the engine while its cache sleeps. All other roles have left the GPU.
    """
    if footprint.role == "reward":
        return footprint.of("device")
    if moment == "generate":
        return footprint.of("device") if footprint.role == "rollout" else footprint.stays
    if moment == "train":
        return footprint.stays if footprint.role == "rollout" else footprint.held("always") + footprint.held("step")
    if footprint.role == "policy":
        return footprint.held("always") + footprint.held("sync")
    return footprint.held("always") if footprint.role == "rollout" else footprint.stays


def _gpus(seating: Seating, by_role: Mapping[Role, Footprint], nodes: Sequence[Node], at: Sequence[int]) -> list[Fit]:
    """Return one line for each set of roles on one GPU, at the moment of their largest memory use."""
    fits: dict[tuple[str, ...], Fit] = {}
    for bundle in range(len(seating.bundles)):
        roles = [r for r, seats in seating.seats.items() if any(s.bundle == bundle and s.gpus > 0 for s in seats)]
        if not roles or not all(r in by_role for r in roles):
            continue
        if "rollout" in roles and "policy" in roles:
            moments: tuple[Moment, ...] = ("generate", "train", "weight sync")
            by_moment = {moment: {r: held_on_gpu(by_role[r], moment) for r in roles} for moment in moments}
            wanted, fullest = max((sum(sizes.values()), moment) for moment, sizes in by_moment.items())
            rest = ", ".join(f"{m} {sum(s.values()) / GIB:,.1f}" for m, s in by_moment.items() if m != fullest)
            parts = f"{fullest}: {_sum(by_moment[fullest])} ({rest})"
        else:
            sizes = {r: by_role[r].of("device") for r in roles}
            wanted, parts = sum(sizes.values()), _sum(sizes)
        gib = nodes[at[bundle]].gpu_memory_gib
        room = None if gib is None else gib * GIB
        key = tuple(roles)
        if key not in fits or (room or 0.0) < (fits[key].room or 0.0):
            fits[key] = Fit(where=f"GPU of {', '.join(roles)}", wanted=wanted, room=room, parts=parts)
    return list(fits.values())


def _sum(sizes: Mapping[Role, float]) -> str:
    return " + ".join(f"{role} {size / GIB:,.1f}" for role, size in sizes.items())


def _hosts(
    config: Config, seating: Seating, by_role: Mapping[Role, Footprint], nodes: Sequence[Node], at: Sequence[int]
) -> list[Fit]:
    """Return the fullest node among nodes with equal memory."""
    fits: dict[float | None, Fit] = {}
    for index, node in enumerate(nodes):
        parts: dict[str, float] = {}
        shared = 0.0
        for role, seats in seating.seats.items():
            footprint = by_role[role]
            here = [seat for seat in seats if at[seat.bundle] == index]
            if here:
                parts[role] = footprint.private(len(here))
                shared = max(shared, footprint.of("shared"))
        if not parts:
            continue
        if shared:
            parts["shared memory"] = shared
        local = config.cluster.address is None
        parts["Ray"] = RAY_BYTES + (DRIVER_BYTES + config.cluster.object_store_gib * GIB if local else 0.0)
        wanted = sum(parts.values())
        text = " + ".join(f"{name} {size / GIB:,.1f}" for name, size in parts.items())
        room = None if node.mem_gib is None else node.mem_gib * GIB * HOST_SHARE
        host = Fit(where=f"host of node {index}", wanted=wanted, room=room, parts=text)
        if node.mem_gib not in fits or wanted > fits[node.mem_gib].wanted:
            fits[node.mem_gib] = host
    return list(fits.values())


def remedies(config: Config, sizes: Sizes, nodes: Sequence[Node], roles: Sequence[Role]) -> list[str]:
    """Return changes that reduce memory where it does not fit, mildest first for each role, each with its effect.

    A change is left out if the checks refuse it, the nodes cannot place it, or it reduces no overfull place. If no
    single change is enough, the last line gives the effect of all changes together.
    """
    before = {place.where: place for place in _places_of(config, sizes, nodes)}
    tight = {where for where, place in before.items() if place.fits is False}
    changes = {text: change for role in roles for text, change in _changes(config, role)}
    lines: list[str] = []
    used: list[str] = []
    together = config
    for text, change in changes.items():
        after = {place.where: place for place in _places_of(change(config), sizes, nodes)}
        effects = [
            _shrunk(before[w], after[w]) for w in tight & after.keys() if after[w].wanted < 0.98 * before[w].wanted
        ]
        if not effects:
            continue
        newly_full = [where for where, place in after.items() if place.fits is False and where not in tight]
        lines.append(
            f"{text}: {', '.join(sorted(effects))}"
            + (f"; but {', '.join(newly_full)} then does not" if newly_full else "")
        )
        if all(place.fits is not False for place in after.values()):
            return lines
        if _places_of(change(together), sizes, nodes):
            together, used = change(together), [*used, text]
    if not lines:
        return ["no key that is known to do so; use larger nodes, more of them, or a smaller model"]
    if len(used) < 2:
        return lines
    is_enough = all(place.fits is not False for place in _places_of(together, sizes, nodes))
    verdict = (
        "everything fits" if is_enough else "it still does not fit: use larger nodes, more of them, or a smaller model"
    )
    return [*lines, f"with {', '.join(used)} together {verdict}"]


def _shrunk(old: Fit, new: Fit) -> str:
    word = "fits" if new.fits else "still does not fit"
    return f"{new.where} wants {new.wanted / GIB:,.1f} GiB in place of {old.wanted / GIB:,.1f} and {word}"


def _places_of(config: Config, sizes: Sizes, nodes: Sequence[Node]) -> list[Fit]:
    """Return the places of a changed configuration, or an empty list if it is refused or cannot be placed."""
    return [] if problems(config) else places(config, seat(config), footprints(config, sizes), nodes)


def _changes(config: Config, role: Role) -> list[tuple[str, Callable[[Config], Config]]]:
    """Return changes of keys as text, each with a function applying it to a configuration."""
    budget, longest = config.train.max_tokens_per_microbatch, _longest(config)
    half = max(budget // 2, longest)
    changes: list[tuple[str, Callable[[Config], Config]]] = []

    def add(key: str, value: Any, shown: str) -> None:
        changes.append((f"{key}={shown}", lambda c: _with(c, key.split("."), value)))

    if role == "rollout":
        section = config.cluster.roles.rollout
        if config.cluster.device == "cpu" and section.kv_cache_gib > 1:
            add("cluster.roles.rollout.kv_cache_gib", section.kv_cache_gib // 2, str(section.kv_cache_gib // 2))
        add(
            "cluster.roles.rollout.max_num_seqs",
            max(section.max_num_seqs // 4, 1),
            str(max(section.max_num_seqs // 4, 1)),
        )
        if config.cluster.device == "cuda":
            for share in (0.7, 0.5):
                if share < section.gpu_memory_utilization:
                    add("cluster.roles.rollout.gpu_memory_utilization", share, str(share))
            add("cluster.roles.rollout.tensor_parallel", 2 * section.tensor_parallel, str(2 * section.tensor_parallel))
        return changes
    if half < budget:
        add("train.max_tokens_per_microbatch", half, str(half))
    if role in ("policy", "critic") and getattr(config, role) is not None:
        add(f"{role}.gradient_checkpointing", True, "true")
        trained = getattr(config.cluster.roles, role)
        if trained.zero_stage < 3 and trained.workers > 1:
            add(f"cluster.roles.{role}.zero_stage", 3, "3")
        if trained.offload:
            add(f"cluster.roles.{role}.offload", (), "[]")
        elif config.cluster.device == "cuda":
            add(f"cluster.roles.{role}.offload", ("optimizer",), "[optimizer]")
        add(f"cluster.roles.{role}.workers", 2 * trained.workers, str(2 * trained.workers))
    return changes


def _longest(config: Config) -> int:
    if config.rollouts is not None:
        return config.rollouts.longest_sequence(config.data.max_prompt_tokens)
    return config.data.max_sequence_tokens or config.train.max_tokens_per_microbatch


def _with(section: Any, key: Sequence[str], value: Any) -> Any:
    """Return the section with one nested key changed."""
    inner = value if len(key) == 1 else _with(getattr(section, key[0]), key[1:], value)
    return section.model_copy(update={key[0]: inner})
