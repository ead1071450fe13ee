"""Reserve the places of a run's workers: one placement group, reserved at once or not at all.

Engines that join and leave during the run have a placement group each (Seats).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.connect import OWN_RAY
from rlhf.config.placement_plan import PlacementPlan, assign_nodes, plan_apart, plan_placement, plan_roles
from rlhf.config.schema.cluster import ClusterConfig, EngineRange
from rlhf.config.schema.root import Config
from rlhf.errors import NodeNotReplaced, RunError, UserError
from rlhf.process.stopping import finishes_within
from rlhf.role_table import Role

logger = logging.getLogger(__name__)
SAY_EVERY_S = 30.0
RELEASED_WITHIN_S = 10.0
WHOLE_ASKED_EVERY_S = 0.5
REPORT_ASKED_EVERY_S = 0.5
REPORTED_WITHIN_S = 10.0  # Ray's monitor reports every 5 s
NODE_GROUP = "ray.io/node-group"  # label of each node that Ray's cluster launcher or KubeRay starts
LOST_NODES = "The cluster has lost nodes."


class NoRoom(RunError):
    """Ray could not place bundles within a time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    group: PlacementGroup
    plan: PlacementPlan
    seats: Seats | None = None  # of engines that join and leave; None: all workers are in the group
    at_once: bool = False  # whether all roles compute at the same time, and none waits for another

    def options(self, role: Role, rank: int, env: Mapping[str, str], *, concurrency: int = 1) -> dict[str, Any]:
        """Return the Ray options of one worker: slot, environment, and no retries of any kind."""
        place = self.plan.slots[role][rank]
        return {
            "num_cpus": place.cpus,
            "num_gpus": place.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=place.bundle
            ),
            "runtime_env": {"env_vars": {"PYTHONUTF8": "1", **env}},  # independent of the driver's locale
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": concurrency,
        }

    def nodes_of(self, role: Role) -> list[str]:
        nodes: Mapping[int, str] = placement_group_table(self.group)["bundles_to_node_id"]
        return [nodes[place.bundle] for place in self.plan.slots[role]]

    def addresses_of(self, role: Role) -> list[str]:
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return [addresses[node] for node in self.nodes_of(role)]

    def describe(self) -> str:
        return "; ".join(f"{role} on {', '.join(self.addresses_of(role))}" for role in self.plan.slots)

    def nodes(self) -> set[str]:
        return set(placement_group_table(self.group)["bundles_to_node_id"].values())

    def on_one_host(self) -> bool:
        """Return whether all workers of the run are on one node, and no worker can join on another node."""
        return len(self.nodes()) == 1 and (self.seats is None or bool(OWN_RAY.daemons))

    def threads(self, role: Role, configured: int | Literal["auto"]) -> list[int]:
        """Return the compute threads of each worker of a role. auto: the node's cores, divided by its workers of this
        role, or of all roles `at_once`: threads of two processes on one core would wait for each other."""
        sharing = [node for other in (self.plan.slots if self.at_once else (role,)) for node in self.nodes_of(other)]
        return _threads(self.nodes_of(role), configured, sharing)

    async def wait_until_whole(self, *, limit_s: float) -> None:
        """Wait until Ray has placed the bundles of lost nodes on new nodes. Raise NodeNotReplaced at the limit."""
        if OWN_RAY.is_ending:
            raise RunError("the run's local Ray has died, and no other node can join it.")
        if not _is_whole(self.group):
            logger.warning("the run has lost a node and waits for another node")
            whole = asyncio.ensure_future(_whole(self.group))
            try:
                await _wait(whole, self.group, self.plan, limit_s=limit_s, reason=LOST_NODES)
            except RunError as error:
                logger.error("%s", error)
                limit = f"within {limit_s:.0f} s (cluster.start_timeout_s)"
                raise NodeNotReplaced(f"No other node took its place {limit}") from error

    def release(self) -> None:
        """Release the resources. Has no effect after a local Ray has been killed."""
        if OWN_RAY.killed:  # no call to a killed Ray: it would abort the driver after a minute
            finishes_within(RELEASED_WITHIN_S, ray.shutdown, "ray.shutdown")
            return
        groups = [self.group, *(() if self.seats is None else self.seats.groups())]
        if not finishes_within(RELEASED_WITHIN_S, partial(_remove, groups), "release"):
            logger.warning("Ray did not release the run's resources within %.0f s", RELEASED_WITHIN_S)


class Seats:
    """The placement groups of engines that join and leave, by rank. Each group holds one engine."""

    def __init__(self, plan: PlacementPlan, engines: EngineRange) -> None:
        self.plan = plan  # of one engine
        self.engines = engines
        self._placed: dict[int, Placement] = {}
        self._asked: set[PlacementGroup] = set()  # that Ray has not placed yet

    async def take(self, rank: int, *, limit_s: float | None) -> None:
        """Wait until Ray has room for a rank, in place of the rank's earlier room. NoRoom at the limit, if any.

        An autoscaler sees the request, and adds a node if possible.
        """
        self.give_back(rank)
        group = _ask_for(self.plan)
        self._asked.add(group)
        ready = asyncio.ensure_future(_whole(group))
        reason = "No node has room for another engine."
        try:
            await (ready if limit_s is None else _wait(ready, group, self.plan, limit_s=limit_s, reason=reason))
            self._placed[rank] = Placement(group=group, plan=self.plan)
        finally:
            ready.cancel()
            self._asked.discard(group)
            if rank not in self._placed:
                remove_placement_group(group)

    def give_back(self, rank: int) -> None:
        """Release the room of a rank, if any. Processes still running there end."""
        placed = self._placed.pop(rank, None)
        if placed is not None:
            remove_placement_group(placed.group)

    def groups(self) -> list[PlacementGroup]:
        return [*(placed.group for placed in self._placed.values()), *self._asked]

    def nodes(self) -> dict[int, str]:
        return {rank: placed.nodes_of(role)[0] for rank, placed in self._placed.items() for role in placed.plan.slots}

    def options(self, role: Role, rank: int, env: Mapping[str, str], *, concurrency: int = 1) -> dict[str, Any]:
        return self._placed[rank].options(role, 0, env, concurrency=concurrency)

    def threads(self, role: Role, configured: int | Literal["auto"]) -> dict[int, int]:
        """Return the compute threads of each rank's engine. auto: the node's cores, divided by its present engines."""
        nodes = self.nodes()
        places = list(nodes.values())
        return dict(zip(nodes, _threads(places, configured, places), strict=True))


async def reserve(config: Config) -> Placement:
    """Reserve the resources of all roles of a run, with the smallest number of engines if the number may change."""
    rest, engine = plan_apart(config)
    limit_s, engines = config.cluster.start_timeout_s, config.cluster.roles.rollout.engines
    if engine is None or isinstance(engines, int):
        return await _reserve(rest, limit_s=limit_s)
    ends = time.monotonic() + limit_s
    placement = await _reserve(rest, limit_s=limit_s, whole=plan_placement(config))
    seats = Seats(engine, engines)
    try:
        for rank in range(engines.min):
            await seats.take(rank, limit_s=ends - time.monotonic())
    except BaseException:
        _remove([placement.group, *seats.groups()])
        raise
    return replace(placement, seats=seats)


async def reserve_roles(roles: Collection[Role], cluster: ClusterConfig, *, with_reward_model: bool) -> Placement:
    """Reserve the resources of some roles, for work outside of a run."""
    plan = plan_roles(roles, cluster, with_reward_model=with_reward_model)
    return await _reserve(plan, limit_s=cluster.start_timeout_s)


async def _reserve(plan: PlacementPlan, *, limit_s: float, whole: PlacementPlan | None = None) -> Placement:
    """Reserve all bundles, or fail at the deadline with a table of required and available resources.

    UserError: the bundles do not fit into the empty cluster, no autoscaler may add nodes, and no lost node may return.
    whole: these and later bundles of the run, to be tested for room. None: there are no later bundles.
    """
    nodes, whole = ray.nodes(), whole or plan
    alive = [node for node in nodes if node["Alive"]]
    missing, reason = missing_resources(whole, alive), "Other programs hold the resources."
    if missing is not None and may_grow(alive):
        reason = "The cluster did not get the nodes that the run needs."
        table = _table(whole, ray.cluster_resources())
        logger.warning("the run needs more than the cluster has%s: waiting for more nodes\n%s", missing, table)
    elif missing is not None and len(alive) < len(nodes):
        reason = LOST_NODES
        logger.warning("the cluster has lost nodes that the run needs, so the run waits for other nodes")
    elif missing is not None:
        raise UserError(
            f"the run needs more than the cluster has{missing}.\n{_table(whole, ray.cluster_resources())}\n"
            "Lower cluster.roles.*.workers, .engines or .cpus, let roles share bundles with colocate_with, "
            "or use a larger cluster."
        )
    group = _ask_for(plan)
    ready = asyncio.ensure_future(asyncio.wrap_future(group.ready().future()))
    try:
        await _wait(ready, group, plan, limit_s=limit_s, reason=reason)
    except BaseException:
        remove_placement_group(group)
        raise
    placement = Placement(group=group, plan=plan)
    if not placement.on_one_host():
        logger.info("placed: %s", placement.describe())
    return placement


async def _wait(
    ready: asyncio.Future[Any], group: PlacementGroup, plan: PlacementPlan, *, limit_s: float, reason: str
) -> None:
    """Wait until a group is placed. Raise NoRoom at the deadline, with a table and the likely reason."""
    began = last_log = time.monotonic()
    while not ready.done():
        waited = time.monotonic() - began
        left = limit_s - waited
        if left <= 0:
            ready.cancel()
            raise NoRoom(
                f"placement: the run could not be placed within {waited:.0f} s (cluster.start_timeout_s); "
                f"the placement group is {placement_group_table(group)['state']}.\n"
                f"{_table(plan, ray.available_resources())}\n{reason}"
            )
        if time.monotonic() - last_log >= SAY_EVERY_S:
            last_log = time.monotonic()
            logger.warning(
                "the run has waited %.0f s for resources\n%s", waited, _table(plan, ray.available_resources())
            )
        await asyncio.wait([ready], timeout=min(left, 1.0))


def _ask_for(plan: PlacementPlan) -> PlacementGroup:
    return placement_group(
        [dict(b) for b in plan.bundles],
        strategy="PACK",
        bundle_label_selector=[dict(labels) for labels in plan.labels] if any(plan.labels) else None,
    )


def _remove(groups: Sequence[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)


def _threads(nodes: Sequence[str], configured: int | Literal["auto"], sharing: Sequence[str]) -> list[int]:
    """Return the threads of a worker on each node. `sharing`: the nodes of all workers that share the cores."""
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 1)) for node in ray.nodes()}
    return [max(1, cores.get(n, 1) // sharing.count(n)) if configured == "auto" else configured for n in nodes]


def _is_whole(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


async def _whole(group: PlacementGroup) -> None:
    while not _is_whole(group):
        await asyncio.sleep(WHOLE_ASKED_EVERY_S)


def may_grow(alive: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an autoscaler may add nodes to a cluster of Ray's cluster launcher or KubeRay."""
    is_launched = not OWN_RAY.daemons and any(NODE_GROUP in node["Labels"] for node in alive)
    return is_launched and not _has_fixed_size(alive)


def _has_fixed_size(alive: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether Ray's monitor reports no autoscaler. Without a report, an autoscaler may start yet.

    Without an autoscaler, the report lists each node as a separate type with the name `node_` and the node's id. The
    autoscaler of Ray's second version writes no such report.
    """
    ends = time.monotonic() + REPORTED_WITHIN_S
    while True:
        status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
        report = status.get("autoscaler_report")
        if report is not None:
            types = {*report["active_nodes"], *(report["idle_nodes"] or ())}
            return bool(types) and types <= {f"node_{node['NodeID']}" for node in alive}
        if time.monotonic() > ends:
            return False
        time.sleep(REPORT_ASKED_EVERY_S)


def missing_resources(plan: PlacementPlan, alive: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the end of a sentence about the resources missing in an empty cluster of the nodes. None: enough."""
    for wanted in plan.labels:
        if not any(wanted.items() <= node["Labels"].items() for node in alive):
            labels = ", ".join(f"{name}={value}" for name, value in wanted.items())
            return f": no node has the label {labels} (cluster.roles.*.node_labels; `ray start --labels`)"
    if nodes_of_bundles(plan, alive) is not None:
        return None
    if assign_nodes(plan.bundles, [node["Resources"] for node in alive]) is None:
        return ""
    return " on the nodes with the required labels (cluster.roles.*.node_labels)"


def nodes_of_bundles(plan: PlacementPlan, alive: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the node of each bundle in an empty cluster of these nodes. None: the bundles do not fit."""
    nodes, node_labels = [node["Resources"] for node in alive], [node["Labels"] for node in alive]
    return assign_nodes(plan.bundles, nodes, labels=plan.labels, node_labels=node_labels)


def _table(plan: PlacementPlan, have: Mapping[str, float]) -> str:
    rows = [f"  {'role':<12}{'workers':>8}{'CPU each':>10}{'GPU each':>10}"]
    for role, slots in plan.slots.items():
        rows.append(f"  {role:<12}{len(slots):>8}{slots[0].cpus:>10.2f}{slots[0].gpus:>10.2f}")
    for key in ("CPU", "GPU"):
        rows.append(f"  needed {key}: {plan.total(key):g}, available: {have.get(key, 0.0):g}")
    return "\n".join(rows)
