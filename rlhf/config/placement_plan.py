"""Assign the bundles of the run's placement group to workers.

`rlhf plan` shows this pure arithmetic and the actors follow the plan. Colocated roles use the bundles of their host,
and all workers in a bundle get equal shares.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.derive import needs, served_roles, uses_reward_model
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.root import Config
from rlhf.role_table import ROLE_ORDER, ROLES, Role, roles_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSlot:
    """Name a worker's bundle and its share of the bundle."""

    bundle: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """Hold the bundles to reserve, with `CPU` and optional `GPU`, and each role's slots in rank order."""

    bundles: tuple[Mapping[str, float], ...]
    slots: Mapping[Role, tuple[WorkerSlot, ...]]
    labels: tuple[Mapping[str, str], ...]  # required node labels of each bundle

    def total(self, resource: str) -> float:
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)

    def shares_gpus(self, role: Role) -> bool:
        """Return whether a second role has a worker on a GPU of the role."""
        bundles = {slot.bundle for slot in self.slots.get(role, ()) if slot.gpus > 0.0}
        others = [slot for name, slots in self.slots.items() if name != role for slot in slots]
        return any(slot.bundle in bundles and slot.gpus > 0.0 for slot in others)


def plan_placement(config: Config | EvaluationStage) -> PlacementPlan:
    """Return bundles and slots of the roles in the run. The configuration must have passed all checks."""
    if isinstance(config, EvaluationStage):
        return plan_roles(config.needs, config.cluster, with_reward_model=config.uses_reward_model)
    model, served = uses_reward_model(config), served_roles(config)
    return plan_roles(needs(config), config.cluster, with_reward_model=model, served=served)


def plan_roles(
    roles: Collection[Role], cluster: ClusterConfig, *, with_reward_model: bool, served: Collection[Role] = ()
) -> PlacementPlan:
    """Return bundles and slots of the given roles. A role without its host gets separate bundles. The model of a role
    in `served` is behind a URL."""
    placed = [role for role in ROLE_ORDER if role in roles]  # each after its host
    model = with_reward_model
    gpus = {role: 0.0 if role in served else _gpus(role, cluster, with_reward_model=model) for role in placed}
    bundles: list[dict[str, float]] = []
    labels: list[Mapping[str, str]] = []
    places: dict[Role, list[int]] = {}
    for role in placed:
        section = getattr(cluster.roles, role)
        if section.colocate_with in placed:
            hosts = places[section.colocate_with]
            places[role] = [hosts[i % len(hosts)] for i in range(section.workers)]
            continue
        places[role] = list(range(len(bundles), len(bundles) + section.workers))
        guests = [other for other in placed if getattr(cluster.roles, other).colocate_with == role]
        most = max(gpus[one] for one in (role, *guests))
        bundles += [{"CPU": section.cpus} | ({"GPU": most} if most else {})] * section.workers
        labels += [section.node_labels] * section.workers
    tenants = [[role for role, at in places.items() for place in at if place == b] for b in range(len(bundles))]
    with_gpu = [sum(gpus[role] > 0.0 for role in guests) for guests in tenants]
    slots: dict[Role, tuple[WorkerSlot, ...]] = {
        role: tuple(
            WorkerSlot(
                bundle=b,
                cpus=_share(bundles[b]["CPU"], len(tenants[b])),
                gpus=_share(bundles[b].get("GPU", 0.0), with_gpu[b]) if gpus[role] else 0.0,
            )
            for b in at
        )
        for role, at in places.items()
    }
    return PlacementPlan(bundles=tuple(bundles), slots=slots, labels=tuple(labels))


def _share(amount: float, parts: int) -> float:
    """Divide an amount, rounded down to Ray's precision to keep the sum at or below the whole."""
    return math.floor(amount / parts * 10_000) / 10_000


def plan_apart(config: Config) -> tuple[PlacementPlan, PlacementPlan | None]:
    """Return the plan for the whole run, and the plan of an engine that may leave. With a fixed number of engines, the
    first plan has the engines' bundles, and the second is None."""
    if not config.cluster.roles.rollout.is_elastic:
        return plan_placement(config), None
    engines, model = frozenset(roles_of("engines")), uses_reward_model(config)
    needed = needs(config)
    rest = plan_roles(needed - engines, config.cluster, with_reward_model=model, served=served_roles(config))
    if not needed & engines:
        return rest, None
    all_engines = plan_roles(needed & engines, config.cluster, with_reward_model=model)
    one = {role: slots[:1] for role, slots in all_engines.slots.items()}
    return rest, PlacementPlan(bundles=all_engines.bundles[:1], slots=one, labels=all_engines.labels[:1])


def assign_nodes(
    bundles: Sequence[Mapping[str, float]],
    nodes: Sequence[Mapping[str, float]],
    *,
    labels: Sequence[Mapping[str, str]] | None = None,
    node_labels: Sequence[Mapping[str, str]] = (),
) -> list[int] | None:
    """Return the node of each bundle, filled in order as by Ray's PACK strategy, or None if the bundles do not fit. The
    search is first fit: the bundles with the fewest allowed nodes first, then by decreasing size. So None can be wrong
    for bundles of several sizes in tight nodes. `labels` are required of each bundle's node; None: no label."""
    free = [dict(node) for node in nodes]
    where = [0] * len(bundles)
    allowed = [
        [n for n in range(len(nodes)) if labels is None or labels[b].items() <= node_labels[n].items()]
        for b in range(len(bundles))
    ]
    order = sorted(
        range(len(bundles)), key=lambda b: (len(allowed[b]), -bundles[b].get("GPU", 0.0), -bundles[b]["CPU"], b)
    )
    for b in order:
        for index in allowed[b]:
            node = free[index]
            if all(node.get(resource, 0.0) >= amount for resource, amount in bundles[b].items()):
                for resource, amount in bundles[b].items():
                    node[resource] -= amount
                where[b] = index
                break
        else:
            return None
    return where


def copies(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]], *, most: int) -> int:
    """Return how many of at most `most` such runs fit into the nodes at once."""
    return next((count for count in range(most, 0, -1) if assign_nodes([*bundles] * count, nodes) is not None), 0)


def _gpus(role: Role, cluster: ClusterConfig, *, with_reward_model: bool) -> float:
    """Return the GPUs of each process of a role."""
    kind = ROLES[role].kind
    if cluster.device == "cpu" or (kind == "scoring" and not with_reward_model):
        return 0.0
    return float(cluster.roles.rollout.tensor_parallel) if kind == "engines" else 1.0
