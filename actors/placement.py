"""Where each role's workers go: one placement group for the whole run, reserved at once or not at all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf.config.cluster import ClusterConfig
from rlhf.errors import RunError, UserError
from rlhf.types import Role

logger = logging.getLogger(__name__)
SAY_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One worker's place: a bundle, and the share of it that is the worker's."""

    bundle: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """Bundles to reserve, and each role's seats in rank order."""

    bundles: tuple[Mapping[str, float], ...]
    seats: Mapping[Role, tuple[Seat, ...]]


def seat(config: ClusterConfig, needs: frozenset[Role]) -> Seating:
    """Bundles and seats of the needed roles. Pure: `rlhf plan` shows the same."""
    roles = config.roles
    gpu = config.device == "cuda"
    counts: dict[Role, int] = {
        "policy": roles.policy.workers,
        "critic": roles.critic.workers,
        "reference": roles.reference.workers,
        "reward": roles.reward.workers,
        "rollout": roles.rollout.engines,
    }
    cpus: dict[Role, float] = {
        "policy": roles.policy.cpus,
        "critic": roles.critic.cpus,
        "reference": roles.reference.cpus,
        "reward": roles.reward.cpus,
        "rollout": roles.rollout.cpus,
    }
    gpus: dict[Role, float] = {role: float(gpu) for role in counts}
    gpus["rollout"] = float(roles.rollout.tensor_parallel) if gpu else 0.0
    hosts: dict[Role, Role | None] = {
        "policy": roles.policy.colocate_with,
        "critic": roles.critic.colocate_with,
        "reference": roles.reference.colocate_with,
        "reward": roles.reward.colocate_with,
        "rollout": roles.rollout.colocate_with,
    }
    order: list[Role] = ["policy", "rollout", "critic", "reference", "reward"]
    own = [role for role in order if role in needs and (hosts[role] is None or hosts[role] not in needs)]
    bundles: list[dict[str, float]] = []
    bundle_of: dict[Role, list[int]] = {}
    for role in own:
        bundle_of[role] = list(range(len(bundles), len(bundles) + counts[role]))
        bundles += [_resources(cpus[role], gpus[role]) for _ in range(counts[role])]
    for role in order:
        host = hosts[role]
        if role in needs and host is not None and role not in bundle_of:
            while hosts[host] is not None and host not in bundle_of:
                host = hosts[host] or host
            bundle_of[role] = [bundle_of[host][i % counts[host]] for i in range(counts[role])]
    tenants = [sum(places.count(b) for places in bundle_of.values()) for b in range(len(bundles))]
    seats: dict[Role, tuple[Seat, ...]] = {
        role: tuple(
            Seat(bundle=b, cpus=bundles[b]["CPU"] / tenants[b], gpus=bundles[b].get("GPU", 0.0) / tenants[b])
            for b in places
        )
        for role, places in bundle_of.items()
    }
    return Seating(bundles=tuple(bundles), seats=seats)


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A reserved placement group with its seats."""

    group: PlacementGroup
    seating: Seating

    def options(self, role: Role, rank: int, env: Mapping[str, str], *, concurrency: int = 1) -> dict[str, Any]:
        """Ray options of one worker: its seat, its environment, and no retries of any kind."""
        place = self.seating.seats[role][rank]
        return {
            "num_cpus": place.cpus,
            "num_gpus": place.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=place.bundle
            ),
            "runtime_env": {"env_vars": dict(env)},
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": concurrency,
        }

    def release(self) -> None:
        """Give the resources back."""
        remove_placement_group(self.group)


async def reserve(config: ClusterConfig, needs: frozenset[Role]) -> Placement:
    """Reserve all bundles, or fail at the deadline with a table of what is wanted and what there is."""
    seating = seat(config, needs)
    wanted = {key: sum(b.get(key, 0.0) for b in seating.bundles) for key in ("CPU", "GPU")}
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    short = [key for key in wanted if wanted[key] > total.get(key, 0.0)]
    homeless = [b for b in seating.bundles if not any(all(n.get(k, 0.0) >= v for k, v in b.items()) for n in nodes)]
    if short or homeless:
        raise UserError(
            f"the run wants more than the cluster has.\n{_table(seating, total)}\n"
            "Lower cluster.roles.*.workers, .engines or .cpus, let roles share bundles with colocate_with, "
            "or use a larger cluster."
        )
    group = placement_group([dict(b) for b in seating.bundles], strategy="PACK")
    began = said = time.monotonic()
    ready = asyncio.ensure_future(asyncio.wrap_future(group.ready().future()))
    while not ready.done():
        waited = time.monotonic() - began
        left = config.start_timeout_s - waited
        if left <= 0:
            state = placement_group_table(group)
            remove_placement_group(group)
            raise RunError(
                f"placement: no room for the run in {waited:.0f} s (cluster.start_timeout_s); the placement group is "
                f"{state['state']}.\n{_table(seating, ray.available_resources())}\nSomething else holds the resources."
            )
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            logger.warning("waiting for resources since %.0f s\n%s", waited, _table(seating, ray.available_resources()))
        await asyncio.wait([ready], timeout=min(left, 1.0))
    return Placement(group=group, seating=seating)


def _table(seating: Seating, have: Mapping[str, float]) -> str:
    rows = [f"  {'role':<12}{'workers':>8}{'CPU each':>10}{'GPU each':>10}"]
    for role, seats in seating.seats.items():
        rows.append(f"  {role:<12}{len(seats):>8}{seats[0].cpus:>10.2f}{seats[0].gpus:>10.2f}")
    for key in ("CPU", "GPU"):
        rows.append(
            f"  wanted {key}: {sum(b.get(key, 0.0) for b in seating.bundles):g}, there are {have.get(key, 0.0):g}"
        )
    return "\n".join(rows)
